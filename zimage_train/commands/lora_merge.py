"""The command `lora merge`: the exact sum of LoRAs, or a merge by TIES or DARE, which reduce interference."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zimage_train.commands import lora_edit
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.commands.lora_edit import OutputFile
from zimage_train.errors import ConfigError, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.lora import arithmetic, blending, metadata, scale_rules
from zimage_train.lora.deltas import Factors, Lora
from zimage_train.lora.scale_rules import ScaleRule
from zimage_train.typing import Weight

FILE_RULE = re.compile(r"(\d{1,6}):(.+)")
"""`2:adaln=0`: the rule `adaln=0` for the second file."""
DEFAULT_DENSITY, DEFAULT_SEED = 0.5, 42


@dataclass(frozen=True)
class MergeMethod:
    """How deltas are merged; `name` None is their exact sum."""

    name: str | None
    density: float
    seed: int
    rank: int | None
    """None: the lowest rank that keeps `energy`, or if that is None too, the sum of the ranks."""
    energy: float | None


def parse_merge_method(
    name: str, density: float | None, seed: int | None, rank: int | None, energy: float | None
) -> MergeMethod:
    """Return the merge method that the options describe; an option that is None has its default.

    Raises:
        ConfigError: the method does not exist, an option has no effect on it, or the density is 0.
    """
    if name not in ("sum", *blending.METHODS):
        raise ConfigError(
            Problem("--method", f"is {name!r}", f"give one of sum, {', '.join(blending.METHODS)}", "bad-argument")
        )
    unused: list[str] = []
    if name == "sum" and density is not None:
        unused.append("--density")
    if name in ("sum", "ties") and seed is not None:
        unused.append("--seed")
    if unused:
        raise ConfigError(
            Problem(
                unused[0],
                f"does nothing for --method {name}",
                "leave it out, or choose dare_ties",
                "conflicting-arguments",
            )
        )
    if density == 0:
        raise ConfigError(Problem("--density", "is 0, so nothing is left", "give a share above 0", "bad-argument"))
    return MergeMethod(
        name=None if name == "sum" else name,
        density=DEFAULT_DENSITY if density is None else density,
        seed=DEFAULT_SEED if seed is None else seed,
        rank=rank,
        energy=energy,
    )


def merge_files(
    inputs: Sequence[WeightedLora],
    texts: Sequence[str],
    method: MergeMethod,
    normalize: bool,
    output: OutputFile | None,
) -> list[str]:
    """Merge several LoRAs; without `output`, return the table of factors that each module of each file would have.

    Args:
        texts: `--scale` rules, as for `lora weight`, optionally for a single file: `2:adaln=0`.
        normalize: divide the ratios by the sum of their absolute values.

    Raises:
        ConfigError: a rule is not valid, applies to no file, or names nothing in it; or all ratios are 0.
        WeightsError: a file is not a plain LoRA, or they change weights of different shapes.
    """
    rules = _parse_file_rules(texts, len(inputs))
    paths = [weighted.path for weighted in inputs]
    ratios = [weighted.weight for weighted in inputs]
    if output is not None:
        output.require_free(*paths)
    sources = lora_edit.read_sources(*paths)
    if normalize:
        ratios = _normalize(ratios)
    lines = lora_edit.unmatched_notes([(rule, [sources[index] for index in indices]) for rule, indices in rules])

    parts: list[tuple[Lora, dict[str, float]]] = []
    file_facts: list[dict[str, Any]] = []
    for index, (source, ratio) in enumerate(zip(sources, ratios, strict=True)):
        file_rules = [rule for rule, indices in rules if index in indices]
        weights = scale_rules.module_weights(file_rules, source.lora)
        weights = {module: ratio * weight for module, weight in weights.items()}
        parts.append((source.lora, weights))
        if output is None:
            lines += [f"{source.path}: ratio {ratio:g}", *scale_rules.format_table(weights)]
        else:
            file_facts.append(source.facts(ratio=ratio, scale=[rule.text for rule in file_rules]))
    if output is None:
        return lines

    # Summed even if another method follows: this checks that something is left, and that the shapes agree.
    merged = arithmetic.sum_loras(parts)
    if not merged:
        raise ConfigError(
            Problem("lora merge", "every ratio is 0, so nothing is left", "give a number other than 0", "nothing-left")
        )
    if method.name is not None:
        merged, kept = _blend(parts, method)
        ranks = lora_edit.format_ranks(merged)
        lines.append(f"{method.name} with density {method.density:g}, then rank {ranks}: {kept}")
    elif method.rank is not None or method.energy is not None:
        merged, kept = lora_edit.reduce_lora(merged, method.rank, 1.0 if method.energy is None else method.energy)
        lines.append(f"rank {lora_edit.format_ranks(merged)}: {kept}")
    facts: dict[str, Any] = {"method": method.name or "sum", "rank": method.rank, "energy": method.energy}
    facts["normalize"] = normalize
    if method.name:
        facts |= {"density": method.density, "seed": method.seed}
    facts["from"] = file_facts
    source_metadata = [source.metadata for source in sources]
    header = metadata.edited_metadata("merge", source_metadata, facts, lora_edit.ranks_of(merged))
    return [*lines, *lora_edit.write_lora(merged, output, header)]


def _blend(parts: Sequence[tuple[Lora, Mapping[str, float]]], method: MergeMethod) -> tuple[Lora, str]:
    """Return the merge by TIES or DARE as a LoRA, and the sentence that reports how much its rank keeps."""
    modules: dict[str, None] = {}  # an ordered set
    for lora, weights in parts:
        modules |= dict.fromkeys(module for module in lora if weights[module] != 0)

    def blend_module(name: str) -> tuple[Factors, float, float]:
        deltas: list[Weight] = []
        magnitudes: list[float] = []
        rank_sum = 0
        for lora, weights in parts:
            if name in lora and weights[name] != 0:
                # The sign goes into the delta: peft elects signs from the deltas, and would not see that of a weight.
                deltas.append(math.copysign(1.0, weights[name]) * lora[name].delta())
                magnitudes.append(abs(weights[name]))
                rank_sum += lora[name].rank
        assert method.name is not None
        blended = blending.blend_deltas(method.name, deltas, magnitudes, method.density, method.seed, name)
        # Masks and signs act on single elements, so the result has full rank and must be approximated.
        rank = method.rank if method.rank or method.energy is not None else rank_sum
        return arithmetic.factorize(blended, rank, 1.0 if method.energy is None else method.energy, name)

    return lora_edit.factorize_modules(modules, blend_module)


def _parse_file_rules(texts: Sequence[str], count: int) -> list[tuple[ScaleRule, list[int]]]:
    """Return each rule with the indices of the files that it applies to: one for `2:adaln=0`, all for `adaln=0`."""
    errors: list[ZImageTrainError] = []
    rules: list[tuple[ScaleRule, list[int]]] = []
    for text in texts:
        match = FILE_RULE.fullmatch(text)
        with collect_errors(errors):
            if match is None:
                rules.append((scale_rules.parse_rule(text), list(range(count))))
                continue
            number = int(match[1])
            if not 1 <= number <= count:
                message = f"is for file {match[1]}, but there are {count}"
                raise ConfigError(Problem(f"--scale {text}", message, "the first file is 1", "bad-argument"))
            rules.append((scale_rules.parse_rule(match[2]), [number - 1]))
    raise_all(errors)
    return rules


def _normalize(ratios: Sequence[float]) -> list[float]:
    """Return the ratios divided by the sum of their absolute values."""
    total = math.fsum(map(abs, ratios))
    if total == 0:
        raise ConfigError(
            Problem("lora merge", "every ratio is 0, so nothing is left", "give a number other than 0", "nothing-left")
        )
    return [ratio / total for ratio in ratios]
