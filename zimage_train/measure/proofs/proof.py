"""The form of prove.json: claims by part, with the machine, the versions and the model that they were measured on."""

import math
from dataclasses import asdict
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from zimage_train.measure.proofs.claims import BoundSource, Claim, Verdict


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ClaimRow(_Row):
    """A claim with its verdict; see `Claim`."""

    promise: str
    verdict: Verdict
    value: float | None = None
    unit: str = ""
    bound: float | None = None
    bound_from: BoundSource | None = None
    note: str = ""
    facts: dict[str, Any] = {}

    @classmethod
    def of(cls, claim: Claim, is_miniature: bool) -> Self:
        """Return the row of a claim. A value that is not finite has no form in JSON, and is told by the note."""
        fields = asdict(claim)
        del fields["is_tried"]
        if claim.value is not None and not math.isfinite(claim.value):
            fields |= {"value": None, "note": f"{claim.value} was measured; {claim.note}".removesuffix("; ")}
        return cls(**fields, verdict=claim.verdict(is_miniature))

    @property
    def claim(self) -> Claim:
        """The claim that the verdict is on."""
        is_tried = self.verdict != "not tried"
        fields = self.model_dump(exclude={"verdict"})
        return Claim(**fields, is_tried=is_tried)


class PartRow(_Row):
    """The claims of a part, and the time that they took."""

    seconds: float
    claims: list[ClaimRow] = Field(min_length=1)

    @property
    def has_failed(self) -> bool:
        return any(claim.verdict == "fails" for claim in self.claims)


class MachineRow(_Row):
    """What computes: a card, or a processor."""

    card: str | None = None
    memory_gb: float | None = None
    multiprocessors: int | None = None
    processor: str | None = None
    threads: int | None = None


class ModelRow(_Row):
    """The model that was measured."""

    variant: str
    is_miniature: bool
    parameters: int
    dtype: str
    digest: str
    """Of the files of all its parts."""


class Proof(_Row):
    """The content of prove.json."""

    machine: MachineRow
    versions: dict[str, str]
    model: ModelRow
    quick: bool
    """Whether it is the short form."""
    parts: dict[str, PartRow] = {}

    @property
    def claims(self) -> list[ClaimRow]:
        """The claims of all parts."""
        return [claim for part in self.parts.values() for claim in part.claims]

    @property
    def verdicts(self) -> list[Verdict]:
        return [claim.verdict for claim in self.claims]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file, without fields that say nothing."""
        return self.model_dump(mode="json", exclude_defaults=True)
