"""The only module that renames or removes: nothing it writes is ever seen half done."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from zimage_train.errors import DiskError, Problem
from zimage_train.io import operating_system
from zimage_train.io.units import format_bytes

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OPEN_ELSEWHERE = ("another program has it open, or it is read-only", "close that program")
MORE_SPACE = "free some space, lower save.keep, or set output and cache.folder to another disk"
ABANDONED_SECONDS = 86_400
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)\.tmp")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` by one rename at the end of the block.

    A reader, or a crash, sees the old file or the new one.

    Raises:
        DiskError: the disk is full, read-only or failing; the old file is still there.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        operating_system.retry_while_open(lambda: temporary.replace(path))
        operating_system.sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise disk_error(path, error) from error
        raise


def temporary_path(path: Path) -> Path:
    """Where this process writes what will be `path`, beside it."""
    return path.with_name(f".{path.name}.{_this_process()}.tmp")


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `chunks` to `path`, whole or not at all.

    Raises:
        DiskError: as `replace_atomically`.
    """
    with replace_atomically(path) as file:
        for chunk in chunks:
            file.write(chunk)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write(path, [text.encode()])


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(file: IO[str], line: str) -> None:
    """Append one whole line to an open log; a log that cannot be written must not stop a run."""
    with contextlib.suppress(OSError):
        file.write(line + "\n")
        file.flush()


def sync(file: IO[str]) -> None:
    """Make what was written to `file` survive a power cut."""
    with contextlib.suppress(OSError):
        file.flush()
        os.fsync(file.fileno())


def close(file: IO[str]) -> None:
    """Close a log; lines that the disk did not take are lost, and nothing else."""
    with contextlib.suppress(OSError):
        file.close()


def remove(path: Path) -> bool:
    """Remove a file; return whether it is gone. A failure to remove is never worth a run."""
    try:
        operating_system.retry_while_open(lambda: path.unlink(missing_ok=True))
    except OSError:
        return False
    return True


def move(path: Path, target: Path) -> Path:
    """Move a file within its volume to `target`, or to a free name beside it; return where it is now.

    Raises:
        DiskError: it cannot be moved.
    """
    place, number = target, 1
    while place.exists():
        number += 1
        place = target.with_name(f"{target.stem}-{number}{target.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        operating_system.retry_while_open(lambda: path.rename(place))
    except OSError as error:
        raise _move_error(path, "moved", error) from error
    return place


def rename_as_backup(path: Path, suffix: str) -> Path:
    """Rename `path` to a free name that ends in `suffix` and return that name; nothing is ever deleted.

    Raises:
        DiskError: it cannot be renamed.
    """
    target = path.with_name(path.name + suffix)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{suffix}-{number}")
    try:
        operating_system.retry_while_open(lambda: path.rename(target))
    except OSError as error:
        raise _move_error(path, "renamed", error) from error
    return target


def remove_stale_temp_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder` and below; a living one's are its own.

    On a shared volume nobody can tell whether a process of another host lives, so its files are left for a day.
    """
    for leftover in folder.rglob(".*.tmp"):
        match = TEMPORARY.fullmatch(leftover.name)
        if match and _is_abandoned(leftover, host=match[1], process_id=int(match[2])):
            remove(leftover)


def _is_abandoned(path: Path, host: str, process_id: int) -> bool:
    if host == _host():
        return process_id == os.getpid() or not operating_system.is_process_alive(process_id)
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    return False


def _this_process() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    """A short name for this host that fits into any file name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def require_writable_folder(folder: Path, setting: str = "") -> None:
    """Refuse a folder that can be neither made nor written to, naming the setting that says it; makes nothing.

    Raises:
        DiskError: it, or the nearest parent that exists, is a file or read-only.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    where = setting or str(folder)
    if not existing.is_dir():
        raise DiskError(Problem(where, f"{existing} is not a folder", "choose another place"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DiskError(Problem(where, f"{existing} cannot be written to", "choose another place"))


def require_free_space(folder: Path, needed_bytes: int, what: str, todo: str = MORE_SPACE) -> None:
    """Refuse to start what cannot be written.

    Raises:
        DiskError: less than `needed_bytes` are free where `folder` is, or will be.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DiskError(
            Problem(
                str(folder),
                f"{format_bytes(free)} free, {what} need {format_bytes(needed_bytes)}",
                todo,
            )
        )


def disk_error(path: Path, error: OSError) -> DiskError:
    """Say why `path` cannot be written, and what to do about it."""
    what, todo = error.strerror or str(error), "check the disk and its permissions"
    if error.errno in FULL_DISK:
        what, todo = "the disk is full", "free some space"
    elif operating_system.is_open_elsewhere(error):
        what, todo = OPEN_ELSEWHERE
    return DiskError(Problem(str(path), f"cannot be written ({what})", f"{todo}; the same command continues"))


def _move_error(path: Path, verb: str, error: OSError) -> DiskError:
    what, todo = error.strerror or str(error), "check its permissions"
    if operating_system.is_open_elsewhere(error):
        what, todo = OPEN_ELSEWHERE
    return DiskError(Problem(str(path), f"cannot be {verb} ({what})", todo))
