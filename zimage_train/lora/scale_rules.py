"""How much of each module of a LoRA is kept: rules by layer, by component, or by both, that multiply (torch-free).

`layers.0-9=0.5`, `attention.to_{q,k,v}=0.8`, `adaln=0`, `layers.20-29.w1=1.2`, `layers=bell`. There are three lists, of
rules that name layers, components, or both; of each list the last that matches counts, and the three multiply.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from zimage_train.errors import ConfigError, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.lora import targets
from zimage_train.lora.targets import COMPONENTS, block_and_component

MAX_FACTOR = 100.0
RULE_GROUPS = {
    "attention": ("to_q", "to_k", "to_v", "to_out"),
    "feed_forward": ("w1", "w2", "w3"),
    "adaln": ("adaLN",),
    "adaLN_modulation": ("adaLN",),
    "all": COMPONENTS,
}
PRESETS = {
    "prompt_adherence": ("adaLN", "to_q", "to_k"),
    "composition": ("to_q", "to_k"),
    "likeness": ("to_v", "w1", "w2", "w3"),
    "clothing": ("w1", "w2", "w3"),
    "background": ("to_q", "to_k", "to_out"),
    "colour_light": ("adaLN", "to_v"),
}
"""Community opinion of what a component is for, measured by nobody known to us.

Source: https://blog.hinablue.me/lora-guide-z-image-turbo-training-with-ai-toolkit-and-merging-it
"""
CURVES: dict[str, Callable[[int, int], float]] = {
    "linear_in": lambda index, count: index / max(count - 1, 1) if count > 1 else 1.0,
    "linear_out": lambda index, count: 1.0 - index / max(count - 1, 1),
    "bell": lambda index, count: math.sin(math.pi * (index + 0.5) / count),
}
"""Factor of layer `index` of the `count` that a rule names: 0 to 1, 1 to 0, half a sine with its top in the middle."""

_NUMBERS = r"\d{1,4}(?:-\d{1,4})?"
_BLOCKS = re.compile(rf"(layers|noise_refiner|context_refiner|refiners)(?:\.({_NUMBERS}(?:,{_NUMBERS})*))?(?=\.|$)")
_BRACES = re.compile(r"\{([^{}]*)\}")
Range = tuple[int, int]


@dataclass(frozen=True)
class ScaleRule:
    """One rule: which blocks and components it names, None being all, and the factor of each block."""

    text: str
    block: str | None
    ranges: tuple[Range, ...]
    """Of block numbers, both ends included; empty: all."""
    components: frozenset[str] | None
    factor: float
    curve: str | None

    def names(self, module: str) -> bool:
        """Whether `module` is one that the rule speaks of."""
        block, component = block_and_component(module)
        if self.components is not None and component not in self.components:
            return False
        if self.block is None:
            return True
        group, _, number = block.rpartition(".")
        if group not in (("noise_refiner", "context_refiner") if self.block == "refiners" else (self.block,)):
            return False
        return not self.ranges or any(low <= int(number) <= high for low, high in self.ranges)

    def factor_of(self, module: str, blocks: Sequence[str]) -> float:
        """The factor of a module that the rule names; a curve runs over those of `blocks` that it names."""
        if self.curve is None:
            return self.factor
        return self.factor * CURVES[self.curve](blocks.index(block_and_component(module)[0]), len(blocks))


def parse_rule(text: str, where: str = "--scale") -> ScaleRule:
    """Take `SELECTOR=FACTOR`, FACTOR being a number, a curve, or `0.8*bell`.

    Raises:
        ConfigError: something else; says what there is.
    """
    selector, equals, amount = text.rpartition("=")
    if not equals or not selector:
        what = "says of no module how much" if not equals else "names no module"
        raise ConfigError(Problem(f"{where} {text}", what, "write for example layers.0-9=0.5; all=0.5 is for all"))
    number, _, curve = amount.rpartition("*") if amount.rpartition("*")[2] in CURVES else (amount, "", "")
    try:
        factor = float(number or 1.0)
    except ValueError:
        factor = math.nan
    if not abs(factor) <= MAX_FACTOR:
        what = f"{amount!r} is neither a number from -{MAX_FACTOR:g} to {MAX_FACTOR:g} nor one of {', '.join(CURVES)}"
        raise ConfigError(Problem(f"{where} {text}", what, "write for example layers.0-9=0.5"))
    block, ranges, rest = _block(selector)
    if backwards := [one for one in ranges if one[0] > one[1]]:
        low, high = backwards[0]
        raise ConfigError(Problem(f"{where} {text}", f"{low}-{high} runs backwards", f"write {high}-{low}"))
    components = _components(rest) if rest else None
    if rest and not components:
        what = f"{rest!r} is neither a block nor a component"
        close = difflib.get_close_matches(rest, ["layers", "refiners", *COMPONENTS, *RULE_GROUPS, *PRESETS], 1)
        known = f"layers.0-9, refiners; all, {', '.join(COMPONENTS)}, attention, feed_forward; {', '.join(PRESETS)}"
        todo = f"did you mean {close[0]}?" if close else f"there are {known}"
        raise ConfigError(Problem(f"{where} {text}", what, todo))
    if curve and block is None:
        raise ConfigError(Problem(f"{where} {text}", "is a curve over no layers", f"write layers={amount}"))
    return ScaleRule(text, block, ranges, frozenset(components) if components else None, factor, curve or None)


def parse_rules(texts: Iterable[str], where: str = "--scale") -> list[ScaleRule]:
    """As `parse`, each.

    Raises:
        ConfigError: lists all that are wrong.
    """
    errors: list[ZImageTrainError] = []
    rules: list[ScaleRule] = []
    for text in texts:
        with collect_errors(errors):
            rules.append(parse_rule(text, where))
    raise_all(errors)
    return rules


def module_weights(rules: Sequence[ScaleRule], modules: Iterable[str]) -> dict[str, float]:
    """Module -> the factor of its change."""
    found = list(modules)
    blocks = {rule: _blocks_of(rule, found) for rule in rules}
    result: dict[str, float] = {}
    for module in found:
        factor = 1.0
        for axis in (_by_block, _by_component, _by_both):
            last = next((rule for rule in reversed(rules) if axis(rule) and rule.names(module)), None)
            factor *= last.factor_of(module, blocks[last]) if last is not None else 1.0
        result[module] = factor + 0.0  # and not -0
    return result


def unmatched_rules(rules: Iterable[ScaleRule], modules: Iterable[str]) -> list[ScaleRule]:
    """The rules that name none of `modules`."""
    found = list(modules)
    return [rule for rule in rules if not any(rule.names(module) for module in found)]


def table(factors: Mapping[str, float]) -> list[str]:
    """The factors as lines: a row for each block, a column for each component; `-` where the LoRA has no module."""
    blocks, found, values = targets.modules_table(factors)
    columns = [*targets.COMPONENTS, *(column for column in found if column not in targets.COMPONENTS)]
    lines = [f"{'':20}" + "".join(f"{column:>8}" for column in columns)]
    for block, row in zip(blocks, values, strict=True):
        cells = dict(zip(found, row, strict=True))
        texts = ("-" if (one := cells.get(column)) is None else format(one, ".3g") for column in columns)
        lines.append(f"{block:20}" + "".join(f"{text:>8}" for text in texts))
    return lines


def _blocks_of(rule: ScaleRule, modules: Iterable[str]) -> list[str]:
    """The blocks that a rule names, in order."""
    found = {block_and_component(module)[0] for module in modules if rule.names(module)}
    return sorted(found, key=targets.block_order)


def _by_block(rule: ScaleRule) -> bool:
    return rule.block is not None and rule.components is None


def _by_component(rule: ScaleRule) -> bool:
    return rule.block is None


def _by_both(rule: ScaleRule) -> bool:
    return rule.block is not None and rule.components is not None


def _block(selector: str) -> tuple[str | None, tuple[Range, ...], str]:
    """The blocks that a selector begins with, and what is left of it."""
    match = _BLOCKS.match(selector)
    if match is None:
        return None, (), selector
    ends = [part.split("-") for part in (match[2] or "").split(",") if part]
    ranges = tuple((int(one[0]), int(one[-1])) for one in ends)
    return match[1], ranges, selector[match.end() :].removeprefix(".")


def _components(text: str) -> list[str]:
    """The components that a selector without its blocks names; none: it names something else too."""
    known = {part.lower(): (part,) for part in COMPONENTS} | {
        name.lower(): parts for name, parts in RULE_GROUPS.items()
    }
    found: list[str] = []
    for one in _expanded(text):
        group, dot, leaf = one.removesuffix(".0").lower().partition(".")
        parts = known.get(leaf if dot else group) or PRESETS.get(group)
        if parts is None or (dot and not set(parts) <= set(known.get(group, ()))):
            return []
        found += parts
    return found


def _expanded(text: str) -> list[str]:
    """`to_{q,k}` as `to_q` and `to_k`."""
    pieces = _BRACES.split(text)
    choices = [piece.split(",") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts).strip() for parts in itertools.product(*choices)]
