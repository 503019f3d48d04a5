"""Groups, blocks and components of the transformer's linear modules, by name (torch-free)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from zimage_train.config.lora import LoraSettings
from zimage_train.config.module_groups import COMPONENTS, TARGET_GROUPS, module_pattern
from zimage_train.config.optimizers import OptimizerSettings
from zimage_train.errors import ConfigError, Location, Problem

Number = TypeVar("Number", int, float)


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


def values_by_module(
    values: Mapping[str, Number], modules: Iterable[str], key: str, default: Number
) -> dict[str, Number]:
    """Return module -> value of the pattern in `values` that matches it, or `default` if none does.

    Args:
        values: by group, or by regular expression for full names.
        key: the setting, for messages.

    Raises:
        ConfigError: lists the patterns that match no module, and the modules that match two.
    """
    found = dict.fromkeys(modules, default)
    pattern_of: dict[str, str] = {}
    problems: list[Problem] = []
    for name, value in values.items():
        matched = [module for module in found if module_pattern(name).fullmatch(module)]
        if not matched:
            message = f"{name!r} matches none of the {len(found)} modules of lora.targets"
            hint = f"a group is one of {', '.join(TARGET_GROUPS)}; names look like layers.0.attention.to_q, whole"
            problems.append(Problem(Location(key=key), message, hint, "bad-value"))
        twice = [module for module in matched if module in pattern_of]
        if twice:
            message = f"{pattern_of[twice[0]]!r} and {name!r} both match {twice[0]}, and {len(twice) - 1} more"
            hint = "give each module to one of them, by narrower regular expressions"
            problems.append(Problem(Location(key=key), message, hint, "bad-value"))
        for module in matched:
            found[module], pattern_of[module] = value, name
    if problems:
        raise ConfigError(*problems)
    return found


def ranks_of(settings: LoraSettings, modules: Iterable[str]) -> dict[str, int]:
    """Return module -> rank of its LoRA.

    Raises:
        ConfigError: as `values_by_module`.
    """
    assert settings.rank is not None
    return values_by_module(settings.ranks, modules, "lora.ranks", settings.rank)


def count_ranks(settings: LoraSettings, modules: Iterable[str]) -> dict[int, int]:
    """Return rank -> number of the `modules` that have it, in rising order."""
    return dict(sorted(Counter(ranks_of(settings, modules).values()).items()))


def lr_factors_of(settings: OptimizerSettings, modules: Iterable[str]) -> dict[str, float]:
    """Return module -> factor on the learning rate of its matrices, without that of `lora_plus`.

    Raises:
        ConfigError: as `values_by_module`.
    """
    return values_by_module(settings.lr_factors, modules, "optimizer.lr_factors", 1.0)


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
