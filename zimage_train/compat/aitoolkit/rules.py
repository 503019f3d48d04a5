"""What the table of AI Toolkit's keys can say of a key, and how the values of a job are read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OFF: tuple[Any, ...] = (False, 0, "", [], {})
"""Values by which a switch, a number, a path or a list says nothing, as null does for every key."""


@dataclass(frozen=True)
class Mapped:
    """Becomes `to` here; `read` checks and translates the value, and `default` is AI Toolkit's when it is left out."""

    to: str
    read: Callable[[Any], Any]
    default: Any = None
    remark: str = ""
    derived: bool = False
    """Other keys have a say too, so parts.py makes the setting."""


@dataclass(frozen=True)
class WithoutEffect:
    """Changes nothing in AI Toolkit on Z-Image, and nothing here."""

    why: str
    neutral: tuple[Any, ...] = OFF


@dataclass(frozen=True)
class HandledHere:
    """Changes nothing that is trained: speed, memory, logs and the like, which zimage-train sees to in its own way."""

    why: str
    neutral: tuple[Any, ...] = OFF


@dataclass(frozen=True)
class Refused:
    """Cannot be honoured; only the `neutral` values pass."""

    why: str
    todo: str = "leave it out"
    neutral: tuple[Any, ...] = OFF


Row = Mapped | WithoutEffect | HandledHere | Refused


def rows(section: str, row: Row, names: str) -> dict[str, Row]:
    """The same row for each of `names` in `section`."""
    return {f"{section}.{name}" if section else name: row for name in names.split()}


def number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise ValueError("a whole number")
    return int(value)


def flag(value: object) -> bool:
    """True or false, also by YAML 1.1's words, which AI Toolkit reads."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("text (put it in quotes)")
    return value


def texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of texts")
    return [text(one) for one in value]


def section(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a section")
    return value


def anything(value: object) -> Any:
    return value


def one_of(choices: Mapping[str, Any]) -> Callable[[object], Any]:
    """A reader of the keys of `choices`, for their values."""

    def read(value: object) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[value]

    return read
