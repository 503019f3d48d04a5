"""The state of runs, from their folders: which there are, how far each is, and how it ended."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from zimage_train.config import strict_yaml
from zimage_train.config.load import read_config
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import YamlError
from zimage_train.dataset.images import without_warnings
from zimage_train.errors import ZImageTrainError
from zimage_train.io import locks
from zimage_train.io.json_text import parse_json
from zimage_train.io.operating_system import process_start
from zimage_train.report import metrics
from zimage_train.report.preview_images import NAME, parse_request

Status = Literal["waiting", "starting", "running", "done", "stopped", "failed", "never started"]
STOP_CODES = (128 + 1, 128 + 2, 128 + 15)
"""Exit codes of a run that was asked to stop."""
LOG_LINES = 20
TAIL_BYTES = 64 * 1024
WORKER_LOG, WORKER = "worker.jsonl", "worker.json"
"""Output of the process that the page has started, as events, and the process."""

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerOutput:
    """The last output of a run's process."""

    progress: dict[str, Any] | None = None
    """The last `progress` event, if nothing came after it but others."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """The `error` events at its end."""
    lines: list[str] = field(default_factory=list)
    """The last lines, as text."""
    warnings: list[str] = field(default_factory=list)
    """Its warnings, without the verdicts, which the records of previews give."""


@dataclass(frozen=True)
class RunState:
    """A run, as its folder shows it."""

    name: str
    folder: Path
    status: Status
    step: int
    steps: int
    loss: float | None
    changed_at: float
    """Time of the last change to its records, seconds since the epoch."""
    output: WorkerOutput

    @property
    def fraction(self) -> float:
        return min(self.step / self.steps, 1.0) if self.steps else 0.0


class _FileCache:
    """Values read from files, for as long as the files do not change."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[str, Path], tuple[tuple[int, int], Any]] = OrderedDict()

    def get(self, what: str, path: Path, read: Callable[[Path], T], missing: T) -> T:
        """Return `read(path)`, or `missing` if there is no such file."""
        try:
            status = path.stat()
        except OSError:
            return missing
        version, key = (status.st_mtime_ns, status.st_size), (what, path)
        found = self._entries.get(key)
        if found is None or found[0] != version:
            try:
                found = (version, read(path))
            except FileNotFoundError:  # the run has been moved in this moment
                return missing
        self._entries[key] = found
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return found[1]


_files = _FileCache(4000)


def list_runs(runs: Path) -> list[RunState]:
    """Return the runs of a folder, those that changed last first."""
    try:
        folders = [path for path in runs.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []
    states = [read_run(folder) for folder in folders if is_run(folder)]
    return sorted(states, key=lambda state: (state.changed_at, state.name), reverse=True)


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "job.yaml", WORKER_LOG))


def read_run(folder: Path) -> RunState:
    """Return the state of the run in `folder`."""
    last = _files.get("last", folder / "metrics.jsonl", _last_record, {})
    output = _files.get("output", folder / WORKER_LOG, _read_output, WorkerOutput())
    step, loss = last.get("step", 0), last.get("loss")
    steps = _files.get("steps", folder / "config.yaml", _steps_of, 0)
    return RunState(
        name=folder.name,
        folder=folder,
        status=_status_of(folder, step, steps, output),
        step=step,
        steps=steps,
        loss=loss,
        changed_at=_changed_at(folder),
        output=output,
    )


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all steps of a run."""
    return _files.get("records", folder / "metrics.jsonl", metrics.read_records, [])


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run: previews, validation, saves."""
    return _files.get("events", folder / "events.jsonl", metrics.read_records, [])


def config_of(folder: Path) -> Config | None:
    """Return the config of a run, or None if it has none that can be read."""
    return _files.get("config", folder / "config.yaml", _read_config, None)


def previews_of(folder: Path) -> dict[int, list[str]]:
    """Return step -> names of its preview images in `samples`: those of its own model first, then those in subfolders.

    They are read from the names alone.
    """
    found: dict[int, list[str]] = {}
    samples = folder / "samples"
    for path in [*sorted(samples.glob("*.png")), *sorted(samples.glob("*/*.png"))]:
        if match := NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(str(path.relative_to(samples)))
    return found


def prompt_of(preview: Path) -> str:
    """Return the prompt of a preview image, or its name if it does not say."""
    prompt = _files.get("prompt", preview, _read_prompt, "")
    return prompt or preview.name


def log_tail(folder: Path, output: WorkerOutput, count: int = LOG_LINES) -> list[str]:
    """Return the last lines that a run has said: those of its process, or else of its log."""
    if output.lines:
        return output.lines[-count:]
    return _files.get("log", folder / "log.txt", _last_lines, [])[-count:]


def _status_of(folder: Path, step: int, steps: int, output: WorkerOutput) -> Status:
    if locks.is_held(folder):
        return "running"
    worker = _files.get("worker", folder / WORKER, read_json, {})
    if is_alive(worker):
        return "starting"
    events = events_of(folder)
    if steps and step >= steps and any(event.get("event") == "done" for event in events[-3:]):
        return "done"
    if output.errors:
        return "stopped" if output.errors[-1].get("exit_code") in STOP_CODES else "failed"
    if worker:
        return "failed"  # its process ended without a word
    return "stopped" if (folder / "log.txt").exists() else "never started"


def _changed_at(folder: Path) -> float:
    times: list[float] = []
    for name in ("metrics.jsonl", "events.jsonl", WORKER_LOG, "job.yaml", "config.yaml"):
        with contextlib.suppress(OSError):  # not there, or moved in this moment
            times.append((folder / name).stat().st_mtime)
    return max(times, default=0.0)


def _tail(path: Path) -> list[bytes]:
    """Return the lines in the last bytes of a file, without the first if it may be torn."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - TAIL_BYTES, 0))
        lines = file.read().split(b"\n")
    return lines if size <= TAIL_BYTES else lines[1:]


def _last_record(path: Path) -> dict[str, Any]:
    records = (metrics.parse_record(line) for line in reversed(_tail(path)))
    return next((record for record in records if record is not None), {})


def _read_output(path: Path) -> WorkerOutput:
    progress: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = []
    lines: list[str] = []
    warnings: list[str] = []
    for line in _tail(path):
        event = event_of(line)
        if event is None:
            continue
        kind = event.get("event")
        progress = event if kind == "progress" else None
        errors = [*errors, event] if kind == "error" else []
        if kind == "warning" and "verdict" not in event:
            warnings.append(str(event.get("text", "")))
        if kind != "progress":
            lines.append(text_of(event))
    return WorkerOutput(progress, errors, lines[-200:], list(dict.fromkeys(warnings)))


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line; a traceback or a library's own line becomes an event too."""
    text = line.decode("utf-8", "replace").rstrip()
    if not text:
        return None
    try:
        event = parse_json(text)
    except ValueError:
        event = None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else {"event": "line", "text": text}


def text_of(event: dict[str, Any]) -> str:
    """Return an event of `zimage-train --json` as the line that a terminal would show."""
    if event["event"] == "error":
        where, found, todo = (str(event.get(name, "")) for name in ("where", "found", "todo"))
        return f"{where}: {found}" + (f"; {todo}" if todo else "")
    prefix = {"warning": "warning: ", "note": "note: "}.get(event["event"], "")
    return prefix + str(event.get("text", ""))


def _read_config(path: Path) -> Config | None:
    try:
        return read_config(path)
    except ZImageTrainError:
        return None


def _read_prompt(path: Path) -> str:
    try:
        with without_warnings(), Image.open(path) as image:
            texts = {str(key): str(value) for key, value in image.info.items()}  # read without decoding the image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    request = parse_request(texts)
    return "" if request is None else request.prompt


def _steps_of(path: Path) -> int:
    try:
        steps = strict_yaml.parse(path.read_text(encoding="utf-8")).value["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError, YamlError):
        return 0
    return steps if isinstance(steps, int) else 0


def is_alive(worker: dict[str, Any]) -> bool:
    """Return whether the process that `worker.json` names is still the same and has not ended."""
    process_id, began = worker.get("pid"), worker.get("began")
    if not isinstance(process_id, int) or not isinstance(began, int | float) or not 0 < process_id < 2**31:
        return False
    return process_start(process_id) == began


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _last_lines(path: Path) -> list[str]:
    return [line.decode("utf-8", "replace") for line in _tail(path) if line]
