"""The form of a row of the proof table: a setting, a value, and the number that it must change.

To add a setting: a `Row` in one of the tables beside this module. A setting of the schema without a row fails
tests/end_to_end/test_proof.py, and so does a value of an enumeration that no row uses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from proofs.trials import Trial

Settings = Mapping[str, Any]
"""Key, as `--set` writes it -> value; texts may contain the names of `inputs.make_inputs` in braces."""


@dataclass(frozen=True)
class Number:
    """Something that a run leaves behind, or that its plan says."""

    name: str
    read: Callable[[Trial], Any]


@dataclass(frozen=True)
class Expected:
    """The expected change of a number."""

    text: str
    holds: Callable[[Any, Any], bool]
    """Whether it is true of the number without and with the setting."""
    as_with: Settings | None = None
    """Settings, beside those of both runs, of a third run, whose number has to be exactly that with the setting."""


@dataclass(frozen=True)
class Row:
    """A run with a setting beside a run without it."""

    key: str
    value: Any
    number: Number
    expected: Expected
    neutral: Any = None
    """Value with which the LoRA has the bytes of a run without the setting; None: the default. A mapping is taken as
    several settings."""
    given: Settings = field(default_factory=dict)
    """Settings of both runs."""
    beside: Settings = field(default_factory=dict)
    """Settings that come with this one in one of the runs, since it is refused without them."""
    lora: Literal["other", "same"] = "other"
    """The effect on the LoRA: settings of memory, previews, logs and files leave it as it is, byte for byte."""
    gpu: str = ""
    """The part that only a GPU can show, as docs/untested.md has it: the number of this row is then a plan."""

    refused: str = ""
    """Words of the refusal where there is no GPU; there is then no run with the setting."""

    @property
    def name(self) -> str:
        """The setting and its value, as a test or a table names the row."""
        return f"{self.key}: {shown(self.value)}"

    @property
    def label(self) -> str:
        """The name, with the settings of both runs, which makes it one of a kind."""
        given = ", ".join(f"{key}: {shown(value)}" for key, value in self.given.items())
        return f"{self.name} (given {given})" if given else self.name

    @property
    def without(self) -> Settings:
        """The settings of the run without the setting."""
        return self.given

    @property
    def with_it(self) -> Settings:
        """The settings of the run with the setting."""
        return {**self.given, **self.beside, self.key: self.value}

    @property
    def with_neutral(self) -> Settings:
        """The settings of the run with the neutral value."""
        if isinstance(self.neutral, Mapping):
            return {**self.given, **self.neutral}
        return {**self.given, self.key: self.neutral}


def shown(value: Any) -> str:
    """Return a value as YAML would have it, on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float | int):
        return f"{value:g}" if abs(value) < 1e6 else str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(shown(one) for one in value) + "]"


def becomes(value: Any, before: Any = None) -> Expected:
    """The number is `value` with the setting, and `before`, or else anything different, without it."""

    def holds(without: Any, with_it: Any) -> bool:
        was = without != with_it if before is None else is_close(without, before, 1e-6)
        return was and is_close(with_it, value, 1e-6)

    text = f"{shown(value)}" if before is None else f"{shown(before)} -> {shown(value)}"
    return Expected(text, holds)


def times(factor: float, tolerance: float = 1e-5) -> Expected:
    """Each number is multiplied by `factor`."""
    return Expected(f"x {factor:.6g}", lambda without, with_it: is_close(with_it, scaled(without, factor), tolerance))


def plus(term: float) -> Expected:
    """Each number grows by `term`."""
    return Expected(
        f"{term:+g}", lambda without, with_it: is_close(with_it, [one + term for one in listed(without)], 1e-4)
    )


def same_as(settings: Settings, text: str) -> Expected:
    """The number changes to that of a run with `settings` instead."""
    return Expected(text, lambda without, with_it: without != with_it, settings)


def such_that(text: str, holds: Callable[[Any, Any], bool]) -> Expected:
    """Whatever `holds(without, with_it)` says, in words `text`."""
    return Expected(text, holds)


LESS = Expected("less", lambda without, with_it: with_it < without)
MORE = Expected("more", lambda without, with_it: with_it > without)
EQUAL = Expected("equal", lambda without, with_it: without == with_it)
ANOTHER = Expected("another", lambda without, with_it: without != with_it)


def listed(value: Any) -> list[Any]:
    """Return a number as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def scaled(value: Any, factor: float) -> list[float]:
    """Return each number times `factor`."""
    return [one * factor for one in listed(value)]


def is_close(value: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two numbers, lists of numbers, or anything else, are equal; numbers within a relative error."""
    ours, theirs = listed(value), listed(expected)
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        both = isinstance(one, int | float) and isinstance(other, int | float)
        if both and abs(one - other) > tolerance * max(abs(one), abs(other)):
            return False
        if not both and one != other:
            return False
    return True
