"""What the user sees while a command works: lines, progress, and the same lines in log.txt.

Progress is a live bar on a terminal and an occasional plain line elsewhere; for machines all of it is events. Text is
never taken for markup, since `[trigger]` is an ordinary word here.
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
    """Standard output that nobody has to read: a closed terminal, pipe or full disk must not cost a run its steps."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Lead what is still to be said, and what Python flushes at exit, nowhere."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Console:
    """Lines and progress for one process; a process that is not the main one says nothing."""

    def __init__(self, is_main: bool = True, stream: IO[str] | None = None) -> None:
        output = stream or sys.stdout or io.StringIO()  # without any output, as under pythonw, sys.stdout is None
        unbreakable = cast(IO[str], BrokenPipeSafeStream(cast(IO[str], output)))
        self._rich = RichConsole(
            file=unbreakable, markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=not is_main
        )
        self._is_main, self._for_machines = is_main, JSON_OUTPUT.get()
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._shown: tuple[str, float] = ("", 0.0)

    @classmethod
    def progress_only(cls) -> "Console":
        """Of a command whose lines are its result: progress alone, on standard error, if somebody looks."""
        seen = sys.stderr is not None and (sys.stderr.isatty() or JSON_OUTPUT.get())
        return cls(is_main=seen, stream=sys.stderr)

    def log_to(self, path: Path) -> None:
        """Also append every line, with its time, to `path`; a log that cannot be opened is only mentioned."""
        if not self._is_main:
            return
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            self.warning(f"{path}: cannot be written ({error.strerror}); going on without a log file")

    def close(self) -> None:
        if self._file is not None:
            atomic.close(self._file)
            self._file = None

    def info(self, text: str) -> None:
        self._rich.print(as_event("line", text=text) if self._for_machines else text)
        self._record(text)

    def warning(self, text: str) -> None:
        if self._for_machines:
            self._rich.print(as_event("warning", text=text))
        else:
            self._rich.print(f"warning: {text}", style="yellow")
        self._record(f"warning: {text}")

    @contextmanager
    def live_progress(self) -> Iterator[None]:
        """Show progress as live bars within the block, if this is a terminal."""
        if not self._rich.is_terminal or not self._is_main or self._for_machines:
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
        """Report that `done` of `total` of `what` are done."""
        if self._progress is not None:
            self._tick_bar(self._progress, what, done, total, note)
            return
        last_what, last_time = self._shown
        now = time.monotonic()
        pause = EVENT_EVERY_SECONDS if self._for_machines else PLAIN_EVERY_SECONDS
        if what != last_what or now - last_time >= pause or done == total:
            event = as_event("progress", what=what, done=done, total=total, note=note)
            self._rich.print(event if self._for_machines else f"{what} {done}/{total} {note}".rstrip())
            self._shown = (what, now)

    def _tick_bar(self, progress: Progress, what: str, done: int, total: int, note: str) -> None:
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
