"""What was found, in a JSON file per part that is written whole after every case."""

import json
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.io import atomic

TOLD = 2000
"""Characters of an error that are kept."""


@dataclass(frozen=True)
class Stamp:
    """What every record names."""

    torch: str
    triton: str | None
    card: str
    dry: bool


@dataclass(frozen=True)
class Records:
    """Those of a part; only one process writes at a time."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """What is known of each case."""
        return json.loads(self.path.read_text(encoding="utf-8"))["cases"] if self.path.exists() else {}

    def note(self, case: str, found: dict[str, Any], stamp: Stamp) -> None:
        """Add a case, or take the place of what was known of it."""
        record = {"torch": stamp.torch, "triton": stamp.triton, "card": stamp.card, "dry": stamp.dry, **found}
        self._write(self.read() | {case: record})

    def forget_failures(self) -> None:
        """Drop what ended in an error, to be tried again."""
        known = self.read()
        kept = {case: record for case, record in known.items() if "error" not in record}
        if kept != known:
            self._write(kept)

    def missing(self, cases: Iterable[str]) -> list[str]:
        """Those of `cases` of which nothing is known."""
        known = self.read()
        return [case for case in cases if case not in known]

    def _write(self, cases: dict[str, dict[str, Any]]) -> None:
        atomic.write_json(self.path, {"part": self.path.stem, "cases": cases})


def failure(error: Exception) -> dict[str, Any]:
    """What is recorded of an error: what it says, and where it came from."""
    lines = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}"[:TOLD], "traceback": lines[-TOLD:]}
