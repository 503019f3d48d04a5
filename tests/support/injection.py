"""A fault, injected once: the nth of some calls by which the program reaches the disk fails."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest import mock

OF_OS = {"fsync": "fsync", "replace": "replace", "rename": "rename", "unlink": "unlink", "open folder": "open"}
WRITING = ("open", "write", "flush", "close", "fsync", "replace", "open folder", "unlink")
"""Every call of a save, the removal of old files included."""


class Crash(BaseException):
    """Stands for a process that ends here: nothing catches it."""


@dataclass
class Fault:
    calls: tuple[str, ...]
    n: int
    error: BaseException
    seen: list[str] = field(default_factory=list)
    fired: int = 0

    def meet(self, call: str) -> None:
        if call in self.calls:
            self.seen.append(call)
            if len(self.seen) == self.n:
                self.fired += 1
                raise self.error


class File:
    """A file being written; a write that fails has gone through by half."""

    def __init__(self, file: IO[Any], fault: Fault) -> None:
        self.file, self.fault = file, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.fault.meet("close")

    def write(self, data: Any) -> None:
        try:
            self.fault.meet("write")
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        self.file.write(data)

    def flush(self) -> None:
        self.fault.meet("flush")
        self.file.flush()


@contextlib.contextmanager
def fail_at(calls: str | tuple[str, ...], n: int, error: BaseException) -> Iterator[Fault]:
    """Within the block, the `n`th of `calls` (names of WRITING, or "read") raises `error`; 0: none does."""
    fault = Fault((calls,) if isinstance(calls, str) else calls, n, error)

    def meeting(call: str, original: Any) -> Any:
        def met(*args: Any, **options: Any) -> Any:
            fault.meet(call)
            return original(*args, **options)

        return met

    open_path = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" not in mode:
            return open_path(path, mode, *args, **options)
        fault.meet("open")
        return File(open_path(path, mode, *args, **options), fault)

    with contextlib.ExitStack() as stack:
        for call, name in OF_OS.items():
            stack.enter_context(mock.patch.object(os, name, meeting(call, getattr(os, name))))
        stack.enter_context(mock.patch.object(Path, "read_bytes", meeting("read", Path.read_bytes)))
        stack.enter_context(mock.patch.object(Path, "open", opened))
        yield fault
