"""The kinds of rows in the table of AI Toolkit's keys, and the readers of values.

A reader returns the value of a key, or raises a ValueError that names what it expects.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OFF: tuple[Any, ...] = (False, 0, "", [], {})
"""Values with which a switch, a number, a path or a list is off; null is that for every key."""


@dataclass(frozen=True)
class Mapped:
    """A key that becomes a setting."""

    to: str
    """The setting, or several with commas between them; empty if there is none of its own."""
    read: Callable[[Any], Any]
    """Reader of the value."""
    default: Any = None
    """Default of AI Toolkit."""
    remark: str = ""
    """Addition to the documentation of the key."""
    derived: bool = False
    """Whether the setting depends on other keys too; then sections.py, optimizers.py or previews.py converts it."""


@dataclass(frozen=True)
class WithoutEffect:
    """A key that has no effect in AI Toolkit on Z-Image, and none here."""

    why: str
    neutral: tuple[Any, ...] = OFF


@dataclass(frozen=True)
class HandledHere:
    """A key that does not change the trained weights: zimage-train has its own speed, memory, logs and the like."""

    why: str
    neutral: tuple[Any, ...] = OFF


@dataclass(frozen=True)
class Refused:
    """A key that cannot be honoured, and is an error unless it has a `neutral` value."""

    why: str
    hint: str = "leave it out"
    neutral: tuple[Any, ...] = OFF


Row = Mapped | WithoutEffect | HandledHere | Refused


def rows(section: str, row: Row, names: str) -> dict[str, Row]:
    """Return the same row for each of `names`, which are separated by spaces, in `section`."""
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
    """Read true or false, or the words of YAML 1.1 for them, as AI Toolkit does."""
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
    return [text(item) for item in value]


def section(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a section")
    return value


def anything(value: object) -> Any:
    return value


def one_of(choices: Mapping[str, Any]) -> Callable[[object], Any]:
    """Return a reader that takes a key of `choices` and returns its value."""

    def read(value: object) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[value]

    return read


loss_type = one_of({"mse": "mse", "mae": "mae", "pseudo_huber": "pseudo_huber", "wavelet": "mse"})
"""Reads a loss. `wavelet` is the mean square of one level of the Haar transform, which is that of the error itself
where the sides are even, as they are for Z-Image."""
guidance_schedule = one_of({"constant": "constant", "sigma": "sigma"})
