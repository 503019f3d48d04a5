"""Parsing and loading of the LoRA arguments of commands: `FILE` or `FILE=WEIGHT`."""

import math
from dataclasses import dataclass
from pathlib import Path

from zimage_train.errors import Argument, ConfigError, Location, Problem
from zimage_train.lora import headers, lora_file
from zimage_train.lora.deltas import Deltas
from zimage_train.models import locate
from zimage_train.models.arch import TransformerShape

LARGEST_WEIGHT = 100.0
"""A larger weight is a typo: the change is linear in it, so 100 already is far beyond any use."""


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA file and the weight that its delta is multiplied by."""

    path: Path
    weight: float


def parse_weighted_lora(text: str, where: str = "--lora", is_weight_needed: bool = False) -> WeightedLora:
    """Parse `FILE` or `FILE=WEIGHT`; an existing file whose name contains `=` takes precedence.

    Args:
        where: the option or command that an error names.
        is_weight_needed: whether `FILE` alone is an error instead of a weight of 1.

    Raises:
        WeightsError: it is a folder that holds no LoRA.
        ConfigError: the text is empty, or the weight is missing though needed, is not a number, or is too large.
    """
    if not text:
        raise ConfigError(Problem(where, "is empty", "give a LoRA file", "bad-argument"))
    name, equals, weight = text.rpartition("=")
    if not equals or not name or Path(text).exists():
        if not is_weight_needed:
            return WeightedLora(locate.lora_in(Path(text)), 1.0)
        # Some tools write `FILE:0.8`.
        before_colon, _, after_colon = text.rpartition(":")
        file = before_colon if _is_number(after_colon) else text
        raise ConfigError(Problem(f"{where} {text}", "has no ratio", f"write {file}=0.8", "bad-argument"))
    number = float(weight) if _is_number(weight) else math.nan
    if not abs(number) <= LARGEST_WEIGHT:  # written so that NaN fails as well
        message = f"{weight!r} is not a number from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        raise ConfigError(Problem(f"{where} {text}", message, f"write {name}=0.8", "bad-argument"))
    return WeightedLora(locate.lora_in(Path(name)), number)


def read_weighted_lora(name: Path, *shapes: TransformerShape) -> Deltas:
    """Return the LoRA `name`, a path or another source that `locate.lora_at` accepts.

    Raises:
        WeightsError: it cannot be obtained, is not a LoRA, or a module of it does not fit the `shapes`.
    """
    path = name
    if not name.is_file():
        path = locate.lora_at(name.as_posix(), Location(argument=Argument("--lora")))
    lora = lora_file.read_deltas(path, headers.READ)
    for shape in shapes:
        lora_file.require_modules(path, lora, shape.linears)
    return lora


def match_message(weighted: WeightedLora, lora: Deltas) -> str:
    """Return the line that reports a LoRA as loaded; `read_weighted_lora` has checked that every module matches."""
    return f"{weighted.path}: matched {len(lora)}/{len(lora)} modules, weight {weighted.weight:g}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
