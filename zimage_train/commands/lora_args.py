"""LoRAs as commands are given them: files with weights, all of which must fit the model."""

import math
from dataclasses import dataclass
from pathlib import Path

from zimage_train.errors import Argument, ConfigError, Location, Problem
from zimage_train.lora import lora_file
from zimage_train.lora.lora_file import Lora
from zimage_train.models import locate
from zimage_train.models.arch import TransformerShape

LARGEST_WEIGHT = 100.0


@dataclass(frozen=True)
class WeightedLora:
    """`FILE` or `FILE=WEIGHT`."""

    path: Path
    weight: float


def parse_weighted_lora(text: str, where: str = "--lora", is_weight_needed: bool = False) -> WeightedLora:
    """Take `FILE` or `FILE=WEIGHT`; a file whose own name has a `=` wins.

    Raises:
        ConfigError: the weight is missing where it is needed, no number, or too large for one.
    """
    name, equals, weight = text.rpartition("=")
    if not equals or not name or Path(text).exists():
        if not is_weight_needed:
            return WeightedLora(Path(text), 1.0)
        bare = text.rpartition(":")[0] if _is_number(text.rpartition(":")[2]) else text
        raise ConfigError(Problem(f"{where} {text}", "has no ratio", f"write {bare}=0.8"))
    number = float(weight) if _is_number(weight) else math.nan
    if not abs(number) <= LARGEST_WEIGHT:
        what = f"{weight!r} is not a number from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        raise ConfigError(Problem(f"{where} {text}", what, f"write {name}=0.8"))
    return WeightedLora(Path(name), number)


def read_weighted_lora(name: Path, *shapes: TransformerShape) -> Lora:
    """The LoRA `name`, a path or what else `sources.lora_at` takes, all of which fits each model of these shapes.

    Raises:
        WeightsError: it does not, is no LoRA, or is not to be had.
    """
    path = name if name.is_file() else locate.lora_at(name.as_posix(), Location(argument=Argument("--lora")))
    lora = lora_file.read_lora(path)
    for shape in shapes:
        lora_file.require_modules(path, lora, shape.linears)
    return lora


def matched(one: WeightedLora, lora: Lora) -> str:
    """What is said of a LoRA that was read so."""
    return f"{one.path}: matched {len(lora)}/{len(lora)} modules, weight {one.weight:g}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
