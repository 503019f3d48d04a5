"""What commands are there to print, for people or, after `zimage-train --json`, for machines (torch-free).

A machine gets one JSON object a line, on the stream on which a person would get the line: `event` is one of
`progress` (what, done, total, note), `line`, `warning`, `note` and `result` (text), and `error` (where, found, todo,
exit_code; code, a short name of the kind of error, or nothing; file, line and key of the setting, or null).
"""

import contextlib
import json
import os
import sys
from contextvars import ContextVar

from zimage_train.errors import DiskError, Problem

JSON_OUTPUT: ContextVar[bool] = ContextVar("for_machines", default=False)


def as_event(event: str, **fields: str | int | None) -> str:
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
    """Say on standard error, of all processes in the first alone, what is worth knowing of what was asked."""
    if os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, AttributeError):  # nobody has to listen
        for line in lines:
            print(as_event("note", text=line) if JSON_OUTPUT.get() else f"note: {line}", file=sys.stderr)


def discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_lines(lines: list[str]) -> None:
    """Print what a command is there to print; who closes the pipe has seen enough.

    Raises:
        DiskError: it can be written nowhere.
    """
    print_raw("\n".join(as_event("result", text=line) for line in lines) if JSON_OUTPUT.get() else "\n".join(lines))


def print_raw(text: str) -> None:
    """Print a text that is the same for people and machines.

    Raises:
        DiskError: it can be written nowhere.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        discard_stdout()
        if not isinstance(error, BrokenPipeError):
            raise DiskError(Problem("standard output", f"cannot be written ({error.strerror})")) from error
