"""Claims that are measured, their bounds, and what follows from both."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

BoundSource = Literal["equality", "fp64", "own rounding", "reference", "forecast", "miniature"]
"""Where a bound comes from: results that must be equal; a calculation in fp64; how far the reference's own run in the
same precision is from one in higher precision; the reference measured beside it; what was predicted; what the miniature
showed."""
Verdict = Literal["holds", "fails", "outside what the miniature showed", "not tried", "reported"]


@dataclass(frozen=True)
class Claim:
    """A number that was measured for a promise."""

    promise: str
    value: float | None
    """None: it was not tried, or is reported by `note` alone."""
    unit: str = ""
    bound: float | None = None
    """The largest value with which the promise holds; None: the number is only reported."""
    bound_from: BoundSource | None = None
    note: str = ""
    """The things that were compared, or the reason why it was not tried."""
    is_tried: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers behind the value, by name, for programs that put proofs together."""

    def __post_init__(self) -> None:
        """Refuse a bound that is not finite, with which anything would hold, or nothing.

        Raises:
            ValueError: it is not.
        """
        if self.bound is not None and not math.isfinite(self.bound):
            raise ValueError(f"the bound of {self.promise!r} is {self.bound}")

    def verdict(self, is_miniature: bool) -> Verdict:
        """Return what the value says; a bound of the miniature alone refutes nothing about another model."""
        if not self.is_tried:
            return "not tried"
        if self.bound is None:
            return "reported"
        if self.value is not None and self.value <= self.bound:  # a NaN is not
            return "holds"
        if self.bound_from == "miniature" and not is_miniature:
            return "outside what the miniature showed"
        return "fails"


def not_tried(promise: str, why: str) -> Claim:
    """Return a claim that could not be measured here."""
    return Claim(promise, None, note=why, is_tried=False)


def largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if one is; `max` would leave that out."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed)
