"""Reading and writing of metrics.jsonl and events.jsonl, which hold a record per line."""

import json
from pathlib import Path
from typing import Any

from zimage_train.errors import DiskError, Problem
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json

LAST_STEP = 10_000_000
"""No run has a later step."""
LARGEST = 1e100
"""No number of a record is larger, so that sums and differences are finite, too."""
NUMBERS = (
    *("loss", "lr", "grad_norm", "preservation", "seconds", "gb", "loss_turbo", "drift"),
    *("change_with_trigger", "change_without_trigger", "sharpness_kept", "sharpness_kept_also"),
)
"""Fields of a record that are finite numbers, or null."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the complete records of a JSON-lines file, or none if there is no file; skip lines torn by a crash.

    Raises:
        DiskError: the file exists and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise DiskError(
            Problem(str(path), what, "move it away; the same command continues", "unreadable-file")
        ) from error
    records = []
    for line in content.split(b"\n"):
        record = parse_record(line)
        if record is not None:
            records.append(record)
    return records


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, or None if it is none: torn by a crash, or with values that no run writes."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and _is_sound(record) else None


def _is_sound(record: dict[str, Any]) -> bool:
    step, event, sigmas = record.get("step"), record.get("event", ""), record.get("sigma", [])
    if type(step) is not int or not 0 <= step <= LAST_STEP or not isinstance(event, str):
        return False
    if event == "validation" and not all(record.get(name) is not None for name in ("of", "loss", "loss_turbo")):
        return False
    values = [record[name] for name in NUMBERS if record.get(name) is not None]
    if not isinstance(sigmas, list) or not all(_is_finite(value) for value in (*values, *sigmas)):
        return False
    return all(0 <= sigma <= 1 for sigma in sigmas)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST  # False for other types


class RecordWriter:
    """Appends to a JSON-lines file that a run continues after step `start`; later and torn records are dropped first.

    Without a path, as in all processes but the main process, records are discarded.

    Raises:
        DiskError: the file cannot be opened.
    """

    def __init__(self, path: Path | None, start: int) -> None:
        self._file = None
        self._of_start: list[dict[str, Any]] = []
        if path is not None:
            kept = [record for record in read_records(path) if record["step"] <= start]
            # A run that continues from `start` does again what is due after it: saving, validation, previews. Equal
            # records of that step are not written twice.
            self._of_start = [record for record in kept if record["step"] == start]
            atomic.write_text(path, "".join(_line(record) + "\n" for record in kept))
            try:
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise atomic.disk_error(path, error) from error

    def append(self, record: dict[str, Any]) -> None:
        if self._file is not None and record not in self._of_start:
            atomic.append_line(self._file, _line(record))

    def sync(self) -> None:
        """Make every record survive a power cut."""
        if self._file is not None:
            atomic.sync(self._file)

    def close(self) -> None:
        if self._file is not None:
            atomic.close(self._file)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
