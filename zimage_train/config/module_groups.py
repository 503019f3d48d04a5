"""The linear modules of a transformer block, and the groups of them that `lora.targets` can name (torch-free)."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]  the only parser that reads what `re` does
from typing import Any

from zimage_train.config.types import SettingError

BLOCK_GROUPS: dict[str, dict[str, str]] = {
    "attention": {
        "to_q": "attention.to_q",
        "to_k": "attention.to_k",
        "to_v": "attention.to_v",
        "to_out": "attention.to_out.0",
    },
    "feed_forward": {"w1": "feed_forward.w1", "w2": "feed_forward.w2", "w3": "feed_forward.w3"},
    "adaln": {"adaLN": "adaLN_modulation.0"},
}
"""Group -> component -> the name of its module in a block."""
_MODULES_BY_COMPONENT = dict(chain.from_iterable(modules.items() for modules in BLOCK_GROUPS.values()))
MAX_REPETITIONS, MAX_OPTIONAL = 4, 8
"""Repetitions in a regular expression; the time of a search grows with a power of their number. Parts that can be left
out double it."""
COMPONENTS = tuple(_MODULES_BY_COMPONENT)
BLOCK_MODULES = tuple(_MODULES_BY_COMPONENT.values())


def _pattern(blocks: str, groups: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of the modules of `groups` in every block whose list is called `blocks`."""
    names: list[str] = []
    for group in groups:
        names += map(re.escape, BLOCK_GROUPS[group].values())
    return re.compile(rf"(?:{blocks})\.\d+\.(?:{'|'.join(names)})")


TARGET_GROUPS = {group: _pattern("layers", [group]) for group in BLOCK_GROUPS} | {
    "refiners": _pattern("noise_refiner|context_refiner", ["attention", "feed_forward"])
}
"""Group -> pattern of the full names of its modules; `refiners` are those of both refiners, without adaLN."""


class UnboundedPatternError(ValueError):
    """A regular expression that may take for ever."""


def module_pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of the group `name`, or of a regular expression for full module names.

    Raises:
        SettingError: it is neither.
    """
    if name in TARGET_GROUPS:
        return TARGET_GROUPS[name]
    try:
        return compile_bounded(name)
    except ValueError as error:
        raise SettingError(f"not a regular expression: {error}") from None


def compile_bounded(pattern: str, within: str = "{}") -> re.Pattern[str]:
    """Return a compiled regular expression that decides on a name at once, put into the `{}` of `within`.

    Python's `re` goes back and tries again, which takes for ever where a repetition is itself repeated.

    Raises:
        UnboundedPatternError: it may take for ever.
        ValueError: it is no regular expression.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on syntax that later versions of `re` may read otherwise
            _require_bounded(_parser.parse(pattern))
            return re.compile(within.replace("{}", pattern))
    except UnboundedPatternError:
        raise
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _require_bounded(parsed: Any) -> None:
    repetitions, optional = _count(parsed, is_repeated=False)
    if repetitions > MAX_REPETITIONS or optional > MAX_OPTIONAL:
        what = f"more than {MAX_REPETITIONS} repetitions or {MAX_OPTIONAL} optional parts in a row"
        raise UnboundedPatternError(f"it has {what}, which may take for ever")


def _count(parsed: Any, is_repeated: bool) -> tuple[int, int]:
    """Return the largest numbers of repetitions and of optional parts on a way through a parsed pattern.

    Raises:
        UnboundedPatternError: a repeated part holds repetitions, optional parts or alternatives.
    """
    repetitions = optional = 0
    for operation, argument in parsed:
        name = str(operation)
        inner = [part for part in _parts(argument) if isinstance(part, _parser.SubPattern)]
        is_repetition = "REPEAT" in name
        low, high = argument[:2] if is_repetition else (1, 1)
        if is_repeated and (name == "BRANCH" or low != high):
            raise UnboundedPatternError("it repeats a part that can be repeated or left out, which may take for ever")
        if name == "GROUPREF":
            raise UnboundedPatternError("it refers to a group, which may take for ever")
        counts = [_count(part, is_repeated or int(high) > 1) for part in inner]
        repetitions += max((count for count, _ in counts), default=0) + int(low != high and int(high) > 1)
        optional += max((count for _, count in counts), default=0) + int((low, int(high)) == (0, 1))
    return repetitions, optional


def _parts(argument: Any) -> Iterator[Any]:
    """Yield the parts of a parsed operation's argument, at any depth of lists and tuples."""
    if isinstance(argument, list | tuple):
        for part in argument:
            yield from _parts(part)
    else:
        yield argument


def require_patterns(values: Mapping[str, Any]) -> None:
    """Require that every key of `values` is a group or a regular expression.

    Raises:
        SettingError: names the first that is not.
    """
    for name in values:
        try:
            module_pattern(name)
        except SettingError as error:
            hint = f"give a group ({', '.join(TARGET_GROUPS)}) or a regular expression for full module names"
            raise SettingError(f"{name!r} is {error.finding}", hint) from None
