"""Rules that scale the modules of a LoRA by layer, by component, or by both (torch-free).

Examples: `layers.0-9=0.5`, `attention.to_{q,k,v}=0.8`, `adaln=0`, `layers.20-29.w1=1.2`, `layers=bell`. Rules that name
layers, components, or both form three lists. In each list the last rule that matches a module counts, and the three
factors multiply.

Scaling is linear: a factor multiplies scale * B @ A as a whole, so 0.5 is half of the change to the weight.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from zimage_train.config.module_groups import BLOCK_GROUPS, COMPONENTS
from zimage_train.errors import ConfigError, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.lora import targets
from zimage_train.lora.targets import block_and_component

MAX_FACTOR = 100.0
RULE_GROUPS: dict[str, tuple[str, ...]] = {
    **{group: tuple(components) for group, components in BLOCK_GROUPS.items()},
    "adaLN_modulation": tuple(BLOCK_GROUPS["adaln"]),
    "all": COMPONENTS,
}
"""Group -> its components. `adaLN_modulation` is the group's name in the keys of files."""
PRESETS = {
    "prompt_adherence": ("adaLN", "to_q", "to_k"),
    "composition": ("to_q", "to_k"),
    "likeness": ("to_v", "w1", "w2", "w3"),
    "clothing": ("w1", "w2", "w3"),
    "background": ("to_q", "to_k", "to_out"),
    "colour_light": ("adaLN", "to_v"),
}
"""Sets of components by what the community takes them for; we know of no measurements.

Source: https://blog.hinablue.me/lora-guide-z-image-turbo-training-with-ai-toolkit-and-merging-it
"""
CURVES: dict[str, Callable[[int, int], float]] = {
    "linear_in": lambda index, count: index / max(count - 1, 1) if count > 1 else 1.0,
    "linear_out": lambda index, count: 1.0 - index / max(count - 1, 1),
    "bell": lambda index, count: math.sin(math.pi * (index + 0.5) / count),
}
"""Curve -> factor of layer `index` among the `count` that a rule names: 0 to 1, 1 to 0, half a sine."""

_NUMBERS = r"\d{1,4}(?:-\d{1,4})?"
_BLOCKS = re.compile(rf"(layers|noise_refiner|context_refiner|refiners)(?:\.({_NUMBERS}(?:,{_NUMBERS})*))?(?=\.|$)")
_BRACES = re.compile(r"\{([^{}]*)\}")
Range = tuple[int, int]


@dataclass(frozen=True)
class ScaleRule:
    """A rule: the blocks and components that it names (None: all), and the factor or curve that it gives them."""

    text: str
    block: str | None
    ranges: tuple[Range, ...]
    """Ranges of block numbers, both ends included; empty means all."""
    components: frozenset[str] | None
    factor: float
    curve: str | None

    def matches(self, module: str) -> bool:
        """Return whether the rule names `module`."""
        block, component = block_and_component(module)
        if self.components is not None and component not in self.components:
            return False
        if self.block is None:
            return True
        group, _, number = block.rpartition(".")
        groups = ("noise_refiner", "context_refiner") if self.block == "refiners" else (self.block,)
        if group not in groups:
            return False
        return not self.ranges or any(low <= int(number) <= high for low, high in self.ranges)

    def factor_of(self, module: str, blocks: Sequence[str]) -> float:
        """Return the factor of a module that the rule matches; a curve runs over `blocks`, those of all its matches."""
        if self.curve is None:
            return self.factor
        return self.factor * CURVES[self.curve](blocks.index(block_and_component(module)[0]), len(blocks))


def parse_rule(text: str, where: str = "--scale") -> ScaleRule:
    """Parse `SELECTOR=FACTOR`, where FACTOR is a number, a curve, or a product such as `0.8*bell`.

    Raises:
        ConfigError: it is something else; the message lists the possible values.
    """
    selector, equals, amount = text.rpartition("=")
    if not equals or not selector:
        message = "has no factor" if not equals else "names no module"
        raise ConfigError(
            Problem(f"{where} {text}", message, "write for example layers.0-9=0.5, or all=0.5", "bad-argument")
        )
    number, curve = amount, ""
    if amount.rpartition("*")[2] in CURVES:
        number, _, curve = amount.rpartition("*")
    try:
        factor = float(number or 1.0)
    except ValueError:
        factor = math.nan
    if not abs(factor) <= MAX_FACTOR:
        limits = f"-{MAX_FACTOR:g} to {MAX_FACTOR:g}"
        message = f"{amount!r} is neither a number from {limits} nor one of {', '.join(CURVES)}"
        raise ConfigError(Problem(f"{where} {text}", message, "write for example layers.0-9=0.5", "bad-argument"))
    block, ranges, rest = _parse_block(selector)
    for low, high in ranges:
        if low > high:
            raise ConfigError(
                Problem(f"{where} {text}", f"{low}-{high} runs backwards", f"write {high}-{low}", "bad-argument")
            )
    components = _parse_components(rest) if rest else None
    if rest and not components:
        message = f"{rest!r} is neither a block nor a component"
        close = difflib.get_close_matches(rest, ["layers", "refiners", *COMPONENTS, *RULE_GROUPS, *PRESETS], 1)
        choices = f"layers.0-9, refiners; all, {', '.join(COMPONENTS)}, attention, feed_forward; {', '.join(PRESETS)}"
        hint = f"did you mean {close[0]}?" if close else f"choose from {choices}"
        raise ConfigError(Problem(f"{where} {text}", message, hint, "bad-argument"))
    if curve and block is None:
        raise ConfigError(
            Problem(f"{where} {text}", "is a curve over no layers", f"write layers={amount}", "bad-argument")
        )
    return ScaleRule(text, block, ranges, frozenset(components) if components else None, factor, curve or None)


def parse_rules(texts: Iterable[str], where: str = "--scale") -> list[ScaleRule]:
    """Parse each of `texts`, as `parse_rule` does.

    Raises:
        ConfigError: some are not valid; it lists all of them.
    """
    errors: list[ZImageTrainError] = []
    rules: list[ScaleRule] = []
    for text in texts:
        with collect_errors(errors):
            rules.append(parse_rule(text, where))
    raise_all(errors)
    return rules


def module_weights(rules: Sequence[ScaleRule], modules: Iterable[str]) -> dict[str, float]:
    """Return module -> factor of its delta, 1 where no rule matches."""
    names = list(modules)
    blocks = {rule: _blocks_of(rule, names) for rule in rules}
    weights: dict[str, float] = {}
    for module in names:
        weight = 1.0
        for is_in_list in (_names_blocks_only, _names_components_only, _names_both):
            for rule in reversed(rules):
                if is_in_list(rule) and rule.matches(module):
                    weight *= rule.factor_of(module, blocks[rule])
                    break
        weights[module] = weight + 0.0  # 0 instead of -0
    return weights


def unmatched_rules(rules: Iterable[ScaleRule], modules: Iterable[str]) -> list[ScaleRule]:
    """Return the rules that match none of `modules`."""
    names = list(modules)
    return [rule for rule in rules if not any(rule.matches(module) for module in names)]


def format_table(values: Mapping[str, float]) -> list[str]:
    """Return the lines of a table of `values` by module: a row per block, a column per component.

    A cell is `-` where the block has no such module in `values`.
    """
    blocks, present_columns, rows = targets.modules_table(values)
    columns = [*COMPONENTS, *(column for column in present_columns if column not in COMPONENTS)]
    lines = [f"{'':20}" + "".join(f"{column:>8}" for column in columns)]
    for block, row in zip(blocks, rows, strict=True):
        cells = dict(zip(present_columns, row, strict=True))
        line = f"{block:20}"
        for column in columns:
            value = cells.get(column)
            text = "-" if value is None else format(value, ".3g")
            line += f"{text:>8}"
        lines.append(line)
    return lines


def _blocks_of(rule: ScaleRule, modules: Iterable[str]) -> list[str]:
    """Return the blocks of `modules` that a rule matches, in order."""
    blocks = {block_and_component(module)[0] for module in modules if rule.matches(module)}
    return sorted(blocks, key=targets.block_order)


def _names_blocks_only(rule: ScaleRule) -> bool:
    return rule.block is not None and rule.components is None


def _names_components_only(rule: ScaleRule) -> bool:
    return rule.block is None


def _names_both(rule: ScaleRule) -> bool:
    return rule.block is not None and rule.components is not None


def _parse_block(selector: str) -> tuple[str | None, tuple[Range, ...], str]:
    """Return the kind of blocks that a selector begins with (None: no blocks), their ranges, and the remaining text."""
    match = _BLOCKS.match(selector)
    if match is None:
        return None, (), selector
    ranges: list[Range] = []
    for text in (match[2] or "").split(","):
        if text:
            low, _, high = text.partition("-")
            ranges.append((int(low), int(high or low)))
    return match[1], tuple(ranges), selector[match.end() :].removeprefix(".")


def _parse_components(text: str) -> list[str]:
    """Return the components that a selector without its blocks names; empty if any name in it is unknown."""
    groups: dict[str, tuple[str, ...]] = {component.lower(): (component,) for component in COMPONENTS}
    groups |= {name.lower(): components for name, components in RULE_GROUPS.items()}
    selected: list[str] = []
    for name in _expand_braces(text):
        group, dot, leaf = name.removesuffix(".0").lower().partition(".")
        components = groups.get(leaf if dot else group) or PRESETS.get(group)
        if components is None:
            return []
        # In `attention.w1` both names are known, but w1 is not part of attention.
        if dot and not set(components) <= set(groups.get(group, ())):
            return []
        selected += components
    return selected


def _expand_braces(text: str) -> list[str]:
    """Return all alternatives of a text with braces: `to_q` and `to_k` for `to_{q,k}`."""
    # The split puts the contents of braces at odd indices.
    pieces = _BRACES.split(text)
    choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ["".join(parts).strip() for parts in itertools.product(*choices)]
