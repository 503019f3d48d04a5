"""Claims that are measured, their bounds, and what follows from both."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

BoundSource = Literal["equality", "fp64", "own rounding", "miniature", "forecast"]
"""Where a bound comes from: results that must be equal; a calculation in fp64; how far the reference's own run in the
same precision is from one in higher precision; what the miniature showed; what was predicted."""
Verdict = Literal["holds", "fails", "outside what the miniature showed", "not tried", "reported"]


@dataclass(frozen=True)
class Claim:
    """A number that was measured for a promise."""

    promise: str
    value: float | None
    """None: it was not tried."""
    unit: str = ""
    bound: float | None = None
    """The largest value with which the promise holds; None: the number is only reported."""
    bound_from: BoundSource | None = None
    note: str = ""
    """What was compared, or why it was not tried."""

    def verdict(self, is_miniature: bool) -> Verdict:
        """Return what the value says; a bound of the miniature alone refutes nothing about another model."""
        if self.value is None:
            return "not tried"
        if self.bound is None:
            return "reported"
        if self.value <= self.bound:  # a NaN is not
            return "holds"
        if self.bound_from == "miniature" and not is_miniature:
            return "outside what the miniature showed"
        return "fails"

    def as_json(self, is_miniature: bool) -> dict[str, Any]:
        """Return the fields that are set, and the verdict."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")} | {
            "verdict": self.verdict(is_miniature)
        }


def not_tried(promise: str, why: str) -> Claim:
    """Return a claim that could not be measured here."""
    return Claim(promise, None, note=why)
