"""`lora merge`: several LoRAs as one, exactly, or by a method that keeps them out of each other's way."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_train.app import workbench
from zimage_train.app.workbench import Output
from zimage_train.errors import ConfigError, Problem, ZImageTrainError, collected, raise_all
from zimage_train.lora import arithmetic, blending, metadata, rules
from zimage_train.lora.files import Factors, Lora
from zimage_train.lora.rules import Rule

FILE_RULE = re.compile(r"(\d+):(.+)")


@dataclass(frozen=True)
class Ratio:
    """`FILE=RATIO`."""

    path: Path
    ratio: float


def parse_ratio(text: str) -> Ratio:
    """Take `FILE=RATIO`.

    Raises:
        ConfigError: there is no ratio, or it is no number.
    """
    name, equals, ratio = text.rpartition("=")
    try:
        number = float(ratio)
    except ValueError:
        number = math.nan
    if not equals or not name or not abs(number) <= rules.LARGEST:
        what = f"has no ratio from -{rules.LARGEST:g} to {rules.LARGEST:g}"
        raise ConfigError(Problem(text, what, f"write {name if equals else text}=0.8"))
    return Ratio(Path(name), number)


@dataclass(frozen=True)
class Method:
    """How changes are put together; `name` None is their exact sum."""

    name: str | None
    density: float
    seed: int
    rank: int | None
    """None: the lowest that keeps `energy`, or without that what the exact sum has."""
    energy: float | None


def method_of(name: str, density: float, seed: int, rank: int | None, energy: float | None) -> Method:
    """How to put changes together, as options say it.

    Raises:
        ConfigError: there is no such method, or it would leave nothing.
    """
    if name not in ("sum", *blending.METHODS):
        raise ConfigError(Problem("--method", f"is {name!r}", f"give one of sum, {', '.join(blending.METHODS)}"))
    if density == 0:
        raise ConfigError(Problem("--density", "is 0, so nothing is left", "give a share above 0"))
    return Method(None if name == "sum" else name, density, seed, rank, energy)


def merge(
    inputs: Sequence[Ratio], texts: Sequence[str], method: Method, normalize: bool, output: Output | None
) -> list[str]:
    """Put several LoRAs together; without `output`, only show how much of each module of each goes in.

    Raises:
        ConfigError: a rule is none, or names no file or nothing in it, or all ratios are 0.
        WeightsError: a file is no plain LoRA, or they change weights of different shapes.
    """
    scales = _rules_by_file(texts, len(inputs))
    if output is not None:
        output.require_free(*(one.path for one in inputs))
    sources = workbench.read(*(one.path for one in inputs))
    ratios = _normalized([one.ratio for one in inputs]) if normalize else [one.ratio for one in inputs]
    lines = [line for rules_, source in zip(scales, sources, strict=True) for line in workbench.unmet(rules_, source)]
    factors = [
        {module: ratio * factor for module, factor in rules.weights(rules_, source.lora).items()}
        for ratio, rules_, source in zip(ratios, scales, sources, strict=True)
    ]
    if output is None:
        for source, ratio, one in zip(sources, ratios, factors, strict=True):
            lines += [f"{source.path}: ratio {ratio:g}", *rules.table(one)]
        return lines
    parts = [(source.lora, one) for source, one in zip(sources, factors, strict=True)]
    merged = arithmetic.sum_of(parts)  # also says what does not fit together
    if not merged:
        raise ConfigError(Problem("lora merge", "every ratio is 0, so nothing is left", "give one that is not"))
    if method.name is not None:
        merged, kept = _blended(parts, method, output)
        lines.append(f"{method.name} with density {method.density:g}, then rank {workbench.rank_said(merged)}: {kept}")
    elif method.rank is not None or method.energy is not None:
        merged, kept = workbench.reduced(merged, method.rank, method.energy or 1.0, output)
        lines.append(f"rank {workbench.rank_said(merged)}: {kept}")
    facts = {"method": method.name or "sum", "rank": method.rank, "energy": method.energy}
    facts |= {"density": method.density, "seed": method.seed} if method.name else {}
    facts["from"] = [
        source.facts(ratio=ratio, scale=[rule.text for rule in rules_])
        for source, ratio, rules_ in zip(sources, ratios, scales, strict=True)
    ]
    made = metadata.edited("merge", [source.metadata for source in sources], facts, workbench.ranks_of(merged))
    return [*lines, *workbench.written(merged, output, made)]


def _blended(parts: Sequence[tuple[Lora, Mapping[str, float]]], method: Method, output: Output) -> tuple[Lora, str]:
    modules = dict.fromkeys(name for lora, factors in parts for name in lora if factors[name] != 0)

    def blend(name: str) -> tuple[Factors, float, float]:
        there = [(lora[name], factors[name]) for lora, factors in parts if name in lora and factors[name] != 0]
        changes = [math.copysign(1.0, factor) * one.delta() for one, factor in there]  # so that signs are elected well
        weights = [abs(factor) for _, factor in there]
        assert method.name is not None
        dense = blending.blend(method.name, changes, weights, method.density, method.seed, name)
        rank = method.rank if method.rank or method.energy is not None else sum(one.rank for one, _ in there)
        return arithmetic.of_dense(dense, rank, method.energy or 1.0, name)

    return workbench.each(modules, output, blend)


def _rules_by_file(texts: Sequence[str], count: int) -> list[list[Rule]]:
    """The rules of each file: `2:adaln=0` is for the second, `adaln=0` for all."""
    errors: list[ZImageTrainError] = []
    found: list[list[Rule]] = [[] for _ in range(count)]
    for text in texts:
        match = FILE_RULE.fullmatch(text)
        with collected(errors):
            if match and not 1 <= int(match[1]) <= count:
                what = f"is for file {match[1]}, and there are {count}"
                raise ConfigError(Problem(f"--scale {text}", what, "the first file is 1"))
            rule = rules.parse(match[2] if match else text)
            for number in [int(match[1]) - 1] if match else range(count):
                found[number].append(rule)
    raise_all(errors)
    return found


def _normalized(ratios: Sequence[float]) -> list[float]:
    """Ratios whose sizes sum to 1."""
    total = math.fsum(map(abs, ratios))
    if total == 0:
        raise ConfigError(Problem("lora merge", "every ratio is 0, so nothing is left", "give one that is not"))
    return [ratio / total for ratio in ratios]
