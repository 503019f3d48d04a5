"""Console output while a command works: lines, progress, and a copy of the lines in log.txt.

Progress is a live bar on a terminal and an occasional plain line elsewhere; with `--json` everything is an event. Text
is never interpreted as rich's markup, since `[trigger]` is an ordinary word here.
"""

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zimage_train.io import atomic
from zimage_train.report.printing import JSON_OUTPUT, as_event

PLAIN_EVERY_SECONDS, EVENT_EVERY_SECONDS = 10.0, 1.0


class BrokenPipeSafeStream:
    """A text stream whose failures are ignored: a closed terminal or pipe, or a full disk, must not end a run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._redirect_to_null()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_null()

    def _redirect_to_null(self) -> None:
        """Redirect the stream to /dev/null, so that later writes and the flush at exit cannot fail."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Console:
    """Prints lines and progress of a process; processes other than the main process print nothing."""

    def __init__(self, is_main: bool = True, stream: IO[str] | None = None) -> None:
        output = stream or sys.stdout or io.StringIO()  # sys.stdout is None under pythonw
        safe_stream = cast(IO[str], BrokenPipeSafeStream(cast(IO[str], output)))
        self._rich = RichConsole(
            file=safe_stream, markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=not is_main
        )
        self._is_main, self._as_json = is_main, JSON_OUTPUT.get()
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._last_progress: tuple[str, float] = ("", 0.0)
        """Task and time of the last plain progress line."""

    @classmethod
    def progress_only(cls) -> "Console":
        """Create the console of a command whose output is its result.

        It shows progress only, on stderr, and only on a terminal or as JSON events.
        """
        is_visible = sys.stderr is not None and (sys.stderr.isatty() or JSON_OUTPUT.get())
        return cls(is_main=is_visible, stream=sys.stderr)

    def log_to(self, path: Path) -> None:
        """Also append every line, with its time, to `path`; if that cannot be opened, warn and go on."""
        if not self._is_main:
            return
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            self.warning(f"{path}: cannot be written ({error.strerror}); continuing without a log file")

    def close(self) -> None:
        if self._file is not None:
            atomic.close(self._file)
            self._file = None

    def info(self, text: str) -> None:
        self._rich.print(as_event("line", text=text) if self._as_json else text)
        self._record(text)

    def warning(self, text: str, **facts: str) -> None:
        """Print a warning; `facts` tell programs what it is about."""
        if self._as_json:
            self._rich.print(as_event("warning", text=text, **facts))
        else:
            self._rich.print(f"warning: {text}", style="yellow")
        self._record(f"warning: {text}")

    @contextmanager
    def live_progress(self) -> Iterator[None]:
        """Within the block, show progress as live bars if the output is a terminal."""
        if not self._rich.is_terminal or not self._is_main or self._as_json:
            yield
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self._rich, transient=True) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units of the task `what` are done."""
        if self._progress is not None:
            self._update_bar(self._progress, what, done, total, note)
            return
        last_what, last_time = self._last_progress
        now = time.monotonic()
        interval = EVENT_EVERY_SECONDS if self._as_json else PLAIN_EVERY_SECONDS
        if what != last_what or now - last_time >= interval or done == total:
            event = as_event("progress", what=what, done=done, total=total, note=note)
            self._rich.print(event if self._as_json else f"{what} {done}/{total} {note}".rstrip())
            self._last_progress = (what, now)

    def _update_bar(self, progress: Progress, what: str, done: int, total: int, note: str) -> None:
        task = next((task for task in progress.tasks if task.description == what), None)
        if task is None:
            progress.add_task(what, total=total, completed=done, note=note)
        elif done >= total:
            progress.remove_task(task.id)
        else:
            progress.update(task.id, total=total, completed=done, note=note)

    def _record(self, text: str) -> None:
        if self._file is not None:
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            atomic.append_line(self._file, f"{stamp} {text}")
