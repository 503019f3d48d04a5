"""Output of commands, as text or, after `zimage-train --json`, as JSON events (torch-free).

An event is a JSON object per line, on the stream where the text would be: `event` is one of `progress` (what, done,
total, note), `line`, `warning`, `note` and `result` (text), and `error` (where, found, todo, exit_code; code, a short
name of the kind of error, or empty; file, line and key of the setting, or null).
"""

import contextlib
import json
import os
import sys
from contextvars import ContextVar

from zimage_train.errors import DiskError, Problem

JSON_OUTPUT: ContextVar[bool] = ContextVar("for_machines", default=False)
"""Whether output is JSON events."""


def as_event(event: str, **fields: str | int | None) -> str:
    """Return an event as a line of JSON."""
    return json.dumps({"event": event, **fields})


def error_event(problem: Problem, exit_code: int) -> str:
    """The event of a problem: its texts, and what programs choose it by."""
    place = problem.place
    return as_event(
        "error",
        where=str(problem.location),
        found=problem.message,
        todo=problem.hint,
        exit_code=exit_code,
        code=problem.code,
        file=place.file,
        line=place.line,
        key=place.key,
    )


def print_notes(lines: list[str]) -> None:
    """Print notes about the given arguments and config on stderr, in the first process only."""
    if os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, AttributeError):  # a closed stderr is not an error
        for line in lines:
            print(as_event("note", text=line) if JSON_OUTPUT.get() else f"note: {line}", file=sys.stderr)


def discard_stdout() -> None:
    """Redirect stdout to /dev/null, so that the flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_lines(lines: list[str]) -> None:
    """Print a command's result. A closed pipe is not an error.

    Raises:
        DiskError: stdout cannot be written.
    """
    if JSON_OUTPUT.get():
        lines = [as_event("result", text=line) for line in lines]
    print_raw("\n".join(lines))


def print_raw(text: str) -> None:
    """Print a text that is the same with and without `--json`. A closed pipe is not an error.

    Raises:
        DiskError: stdout cannot be written.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        discard_stdout()
        if not isinstance(error, BrokenPipeError):
            raise DiskError(
                Problem("standard output", f"cannot be written ({error.strerror})", code="disk-full")
            ) from error
