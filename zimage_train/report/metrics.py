"""metrics.jsonl and events.jsonl: one record a line, written as a run goes on, read back by everything else."""

import json
from pathlib import Path
from typing import Any

from zimage_train import files


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a JSON-lines file; a line torn by a crash is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class Records:
    """A JSON-lines file that is continued after `start`: later and torn records are dropped first.

    Without a path, as in all processes but the main one, records go nowhere.
    """

    def __init__(self, path: Path | None, start: int) -> None:
        self._file = None
        if path is not None:
            kept = [record for record in read(path) if record.get("step", 0) <= start]
            files.write_text(path, "".join(_line(record) + "\n" for record in kept))
            self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            files.append_line(self._file, _line(record))

    def sync(self) -> None:
        """Make every record survive a power cut."""
        if self._file is not None:
            files.sync(self._file)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
