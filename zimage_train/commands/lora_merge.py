"""`lora merge`: several LoRAs as one, exactly, or by a method that keeps them out of each other's way."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zimage_train.commands import lora_edit
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.commands.lora_edit import OutputFile
from zimage_train.errors import ConfigError, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.lora import arithmetic, blending, metadata, scale_rules
from zimage_train.lora.lora_file import Factors, Lora
from zimage_train.lora.scale_rules import ScaleRule

FILE_RULE = re.compile(r"(\d{1,6}):(.+)")
DENSITY, SEED = 0.5, 42


@dataclass(frozen=True)
class MergeMethod:
    """How changes are put together; `name` None is their exact sum."""

    name: str | None
    density: float
    seed: int
    rank: int | None
    """None: the lowest that keeps `energy`, or without that what the exact sum has."""
    energy: float | None


def method_of(
    name: str, density: float | None, seed: int | None, rank: int | None, energy: float | None
) -> MergeMethod:
    """How to put changes together, as options say it.

    Raises:
        ConfigError: there is no such method, it would leave nothing, or an option does nothing for it.
    """
    if name not in ("sum", *blending.METHODS):
        raise ConfigError(Problem("--method", f"is {name!r}", f"give one of sum, {', '.join(blending.METHODS)}"))
    given = [option for option, value in (("--density", density), ("--seed", seed)) if value is not None]
    unused = given if name == "sum" else [option for option in given if option == "--seed" and name == "ties"]
    if unused:
        raise ConfigError(Problem(unused[0], f"does nothing for --method {name}", "leave it out, or choose dare_ties"))
    if density == 0:
        raise ConfigError(Problem("--density", "is 0, so nothing is left", "give a share above 0"))
    share, number = DENSITY if density is None else density, SEED if seed is None else seed
    return MergeMethod(None if name == "sum" else name, share, number, rank, energy)


def merge_files(
    inputs: Sequence[WeightedLora],
    texts: Sequence[str],
    method: MergeMethod,
    normalize: bool,
    output: OutputFile | None,
) -> list[str]:
    """Put several LoRAs together; without `output`, only show how much of each module of each goes in.

    Raises:
        ConfigError: a rule is none, or names no file or nothing in it, or all ratios are 0.
        WeightsError: a file is no plain LoRA, or they change weights of different shapes.
    """
    scales = _rules_by_file(texts, len(inputs))
    if output is not None:
        output.require_free(*(one.path for one in inputs))
    sources = lora_edit.read(*(one.path for one in inputs))
    ratios = _normalized([one.weight for one in inputs]) if normalize else [one.weight for one in inputs]
    lines = lora_edit.unmet([(rule, [sources[i] for i in numbers]) for rule, numbers in scales])
    of_file = [[rule for rule, numbers in scales if number in numbers] for number in range(len(sources))]
    factors = [
        {module: ratio * factor for module, factor in scale_rules.module_weights(rules_, source.lora).items()}
        for ratio, rules_, source in zip(ratios, of_file, sources, strict=True)
    ]
    if output is None:
        for source, ratio, one in zip(sources, ratios, factors, strict=True):
            lines += [f"{source.path}: ratio {ratio:g}", *scale_rules.format_table(one)]
        return lines
    parts = [(source.lora, one) for source, one in zip(sources, factors, strict=True)]
    merged = arithmetic.sum_loras(parts)  # also says what does not fit together
    if not merged:
        raise ConfigError(Problem("lora merge", "every ratio is 0, so nothing is left", "give one that is not"))
    if method.name is not None:
        merged, kept = _blended(parts, method, output)
        lines.append(f"{method.name} with density {method.density:g}, then rank {lora_edit.rank_said(merged)}: {kept}")
    elif method.rank is not None or method.energy is not None:
        merged, kept = lora_edit.reduced(merged, method.rank, 1.0 if method.energy is None else method.energy, output)
        lines.append(f"rank {lora_edit.rank_said(merged)}: {kept}")
    facts = {"method": method.name or "sum", "rank": method.rank, "energy": method.energy, "normalize": normalize}
    facts |= {"density": method.density, "seed": method.seed} if method.name else {}
    facts["from"] = [
        source.facts(ratio=ratio, scale=[rule.text for rule in rules_])
        for source, ratio, rules_ in zip(sources, ratios, of_file, strict=True)
    ]
    made = metadata.edited_metadata("merge", [source.metadata for source in sources], facts, lora_edit.ranks_of(merged))
    return [*lines, *lora_edit.written(merged, output, made)]


def _blended(
    parts: Sequence[tuple[Lora, Mapping[str, float]]], method: MergeMethod, output: OutputFile
) -> tuple[Lora, str]:
    modules = dict.fromkeys(name for lora, factors in parts for name in lora if factors[name] != 0)

    def blend(name: str) -> tuple[Factors, float, float]:
        there = [(lora[name], factors[name]) for lora, factors in parts if name in lora and factors[name] != 0]
        changes = [math.copysign(1.0, factor) * one.delta() for one, factor in there]  # so that signs are elected well
        weights = [abs(factor) for _, factor in there]
        assert method.name is not None
        dense = blending.blend_deltas(method.name, changes, weights, method.density, method.seed, name)
        rank = method.rank if method.rank or method.energy is not None else sum(one.rank for one, _ in there)
        return arithmetic.factorize(dense, rank, 1.0 if method.energy is None else method.energy, name)

    return lora_edit.each(modules, output, blend)


def _rules_by_file(texts: Sequence[str], count: int) -> list[tuple[ScaleRule, list[int]]]:
    """Each rule, and the numbers of the files that it is for: `2:adaln=0` is for the second, `adaln=0` for all."""
    errors: list[ZImageTrainError] = []
    found: list[tuple[ScaleRule, list[int]]] = []
    for text in texts:
        match = FILE_RULE.fullmatch(text)
        with collect_errors(errors):
            if match and not 1 <= int(match[1]) <= count:
                what = f"is for file {match[1]}, and there are {count}"
                raise ConfigError(Problem(f"--scale {text}", what, "the first file is 1"))
            rule = scale_rules.parse_rule(match[2] if match else text)
            found.append((rule, [int(match[1]) - 1] if match else list(range(count))))
    raise_all(errors)
    return found


def _normalized(ratios: Sequence[float]) -> list[float]:
    """Ratios whose sizes sum to 1."""
    total = math.fsum(map(abs, ratios))
    if total == 0:
        raise ConfigError(Problem("lora merge", "every ratio is 0, so nothing is left", "give one that is not"))
    return [ratio / total for ratio in ratios]
