"""Groups, blocks and components of the transformer's linear modules, by name (torch-free)."""

import re
from collections.abc import Iterable, Mapping

from zimage_train.config.module_groups import COMPONENTS, TARGET_GROUPS
from zimage_train.errors import ConfigError, Problem


def group_of(module: str) -> str:
    """Return the group of a module, or `other`."""
    for name, pattern in TARGET_GROUPS.items():
        if pattern.fullmatch(module):
            return name
    return "other"


def count_by_group(modules: Iterable[str]) -> dict[str, int]:
    """Return the number of `modules` in each group; empty groups are left out."""
    counts: dict[str, int] = {}
    for module in modules:
        group = group_of(module)
        counts[group] = counts.get(group, 0) + 1
    return counts


def select_modules(targets: list[str] | str, linears: Iterable[str]) -> list[str]:
    """Return the linear modules that `targets` names: a list of groups, or a regular expression for full names.

    Raises:
        ConfigError: no module matches.
    """
    patterns = [re.compile(targets)] if isinstance(targets, str) else [TARGET_GROUPS[name] for name in targets]
    names = list(linears)
    chosen = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
    if not chosen:
        message = f"{targets!r} matches none of the {len(names)} linear modules"
        hint = "names look like layers.0.attention.to_q; the whole name must match"
        if isinstance(targets, str) and targets in TARGET_GROUPS:
            hint = f"a string is a regular expression; give the group as a list: [{targets}]"
        raise ConfigError(Problem("lora.targets", message, hint, "bad-value"))
    return chosen


def block_and_component(module: str) -> tuple[str, str]:
    """Return (`layers.0`, `to_q`) for `layers.0.attention.to_q`; outside the blocks, (the module, `other`)."""
    match = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)", module)
    if match is None:
        return module, "other"
    for component in COMPONENTS:
        if component in match[2]:
            return match[1], component
    return match[1], match[2]


def block_order(block: str) -> tuple[str, int]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    name, _, number = block.rpartition(".")
    return (name, int(number)) if number.isdecimal() else (block, 0)


def modules_table(values: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return the table of `values` by module: blocks, components, and a row of values for each block.

    A value is None where the block has no such module in `values`.
    """
    cells: dict[str, dict[str, float]] = {}
    for module, value in values.items():
        block, component = block_and_component(module)
        cells.setdefault(block, {})[component] = value
    components = {component for row in cells.values() for component in row}
    columns = [name for name in COMPONENTS if name in components] + sorted(components - set(COMPONENTS))
    blocks = sorted(cells, key=block_order)
    rows = [[cells[block].get(column) for column in columns] for block in blocks]
    return blocks, columns, rows
