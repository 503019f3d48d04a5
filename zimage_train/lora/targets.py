"""Groups, blocks and components of the transformer's linear modules, by name (torch-free)."""

import re
from collections.abc import Iterable, Mapping

from zimage_train.errors import ConfigError, Problem

_ATTENTION = r"attention\.(?:to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"feed_forward\.w[123]"

TARGET_GROUPS = {
    "attention": re.compile(rf"layers\.\d+\.{_ATTENTION}"),
    "feed_forward": re.compile(rf"layers\.\d+\.{_FEED_FORWARD}"),
    "adaln": re.compile(r"layers\.\d+\.adaLN_modulation\.0"),
    "refiners": re.compile(rf"(?:noise|context)_refiner\.\d+\.(?:{_ATTENTION}|{_FEED_FORWARD})"),
}
"""Groups of linear modules by full name; refiners are those of both refiners, without adaLN."""


def group_of(module: str) -> str:
    """The group of a module, or `other`."""
    return next((name for name, pattern in TARGET_GROUPS.items() if pattern.fullmatch(module)), "other")


def count_by_group(modules: Iterable[str]) -> dict[str, int]:
    """How many of `modules` belong to each group; groups without any are left out."""
    counts: dict[str, int] = {}
    for module in modules:
        counts[group_of(module)] = counts.get(group_of(module), 0) + 1
    return counts


def select_modules(targets: list[str] | str, linears: Iterable[str]) -> list[str]:
    """The linear modules that `targets` names: groups, or one regular expression of whole names.

    Raises:
        ConfigError: nothing matches.
    """
    patterns = [re.compile(targets)] if isinstance(targets, str) else [TARGET_GROUPS[name] for name in targets]
    names = list(linears)
    chosen = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
    if not chosen:
        what = f"{targets!r} matches none of the {len(names)} linear modules"
        todo = "names look like layers.0.attention.to_q; the whole name must match"
        if isinstance(targets, str) and targets in TARGET_GROUPS:
            todo = f"text is a regular expression; the group is a list: [{targets}]"
        raise ConfigError(Problem("lora.targets", what, todo))
    return chosen


COMPONENTS = ("to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3", "adaLN")
"""The linear modules of a block, in the order in which data meets them."""


def block_and_component(module: str) -> tuple[str, str]:
    """(`layers.0`, `to_q`) of `layers.0.attention.to_q`; of a module outside the blocks its own name twice over."""
    match = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)", module)
    if match is None:
        return module, "other"
    return match[1], next((part for part in COMPONENTS if part in match[2]), match[2])


def block_order(block: str) -> tuple[str, int]:
    """A key that sorts `layers.2` before `layers.10`."""
    name, _, number = block.rpartition(".")
    return (name, int(number)) if number.isdecimal() else (block, 0)


def modules_table(values: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Blocks, components, and the value of each; None where there is no such module."""
    cells: dict[str, dict[str, float]] = {}
    for module, value in values.items():
        block, component = block_and_component(module)
        cells.setdefault(block, {})[component] = value
    found = {component for row in cells.values() for component in row}
    columns = [name for name in COMPONENTS if name in found] + sorted(found - set(COMPONENTS))
    rows = sorted(cells, key=block_order)
    return rows, columns, [[cells[row].get(column) for column in columns] for row in rows]
