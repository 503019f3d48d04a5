"""Atomic writes, and every rename and removal of a file: a reader never sees a file that is half written."""

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
SPACE_HINT = "free some space, lower save.keep, or set output_dir and cache.folder to another disk"
ABANDONED_SECONDS = 86_400
"""Age at which a temporary file of another host counts as abandoned: one day."""
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)\.tmp")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write; it replaces `path` by one rename at the end of the block.

    At any time, and after a crash, `path` is the old or the whole new file. If the block fails, the old file stays.

    Raises:
        DiskError: the disk is full, read-only or failing; the old file is still there.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            # The content must be on the disk before the rename is, or a power cut could leave an empty file.
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
    """Return the temporary path, in the folder of `path`, at which this process writes the content of `path`."""
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
    """Append a whole line to an open log. Errors are ignored, since a log must not stop a run."""
    with contextlib.suppress(OSError):
        file.write(line + "\n")
        file.flush()


def sync(file: IO[str]) -> None:
    """Flush `file` to the disk, so that its content survives a power cut. Errors are ignored."""
    with contextlib.suppress(OSError):
        file.flush()
        os.fsync(file.fileno())


def close(file: IO[str]) -> None:
    """Close a log. Errors are ignored; lines that are not yet written are then lost."""
    with contextlib.suppress(OSError):
        file.close()


def remove(path: Path) -> bool:
    """Remove a file, and return whether it is gone. Errors are ignored, since a leftover must not stop a run."""
    try:
        operating_system.retry_while_open(lambda: path.unlink(missing_ok=True))
    except OSError:
        return False
    return True


def remove_folder(path: Path) -> None:
    """Remove a folder with all its content; errors are ignored.

    A link to a folder is removed, and its target stays.
    """
    if path.is_symlink():
        remove(path)
        return
    shutil.rmtree(path, ignore_errors=True)


def move(path: Path, target: Path) -> Path:
    """Move a file within its volume to `target`, or to a free name beside that, and return its new path.

    Raises:
        DiskError: it cannot be moved.
    """
    free, number = target, 1
    while free.exists():
        number += 1
        free = target.with_name(f"{target.stem}-{number}{target.suffix}")
    try:
        free.parent.mkdir(parents=True, exist_ok=True)
        operating_system.retry_while_open(lambda: path.rename(free))
    except OSError as error:
        raise _move_error(path, "moved", error) from error
    return free


def rename_as_backup(path: Path, suffix: str) -> Path:
    """Rename `path` to a free name with `suffix` at its end, and return that path; nothing is overwritten.

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
    """Remove the temporary files that killed processes left in `folder` and below it; those of live processes are kept.

    Whether a process of another host is alive is unknown, so on a shared volume its files are kept for one day.
    """
    for leftover in folder.rglob(".*.tmp"):
        match = TEMPORARY.fullmatch(leftover.name)
        if match and _is_abandoned(leftover, host=match[1], process_id=int(match[2])):
            remove(leftover)


def _is_abandoned(path: Path, host: str, process_id: int) -> bool:
    if host == _host():
        # A file with the id of this process is from an earlier process with the same id, as happens in containers: at
        # the time of the call, this process writes nothing to the folder.
        return process_id == os.getpid() or not operating_system.is_process_alive(process_id)
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    return False


def _this_process() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    """Return a short name of this host that is valid in any file name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def require_writable_folder(folder: Path, setting: str = "") -> None:
    """Require that `folder` can be written to, or created; nothing is created.

    Args:
        setting: the name of the setting that gives the folder, as the location of the error.

    Raises:
        DiskError: it, or its nearest parent that exists, is a file or read-only.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    where = setting or str(folder)
    if not existing.is_dir():
        raise DiskError(Problem(where, f"{existing} is not a folder", "choose another place", "not-a-folder"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DiskError(Problem(where, f"{existing} cannot be written to", "choose another place", "not-writable"))


def require_free_space(folder: Path, needed_bytes: int, what: str, hint: str = SPACE_HINT) -> None:
    """Require the space for files that are about to be written.

    Args:
        what: the files, in the plural, for the message.

    Raises:
        DiskError: less than `needed_bytes` are free where `folder` is, or will be.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        message = f"{format_bytes(free)} free, {what} need {format_bytes(needed_bytes)}"
        raise DiskError(Problem(str(folder), message, hint, "disk-full"))


def disk_error(path: Path, error: OSError) -> DiskError:
    """Return the error for `path`, which could not be written."""
    if error.errno in FULL_DISK:
        reason, hint, code = "the disk is full", "free some space", "disk-full"
    else:
        reason, hint, code = _reason(error, "check the disk and its permissions", "write-failed")
    return DiskError(Problem(str(path), f"cannot be written ({reason})", f"{hint}; the same command continues", code))


def _move_error(path: Path, verb: str, error: OSError) -> DiskError:
    reason, hint, code = _reason(error, "check its permissions", "move-failed")
    return DiskError(Problem(str(path), f"cannot be {verb} ({reason})", hint, code))


def _reason(error: OSError, hint: str, code: str) -> tuple[str, str, str]:
    """Return reason, hint and code of a failure; `hint` and `code` apply unless another program has the file open."""
    if operating_system.is_open_elsewhere(error):
        return "another program has it open, or it is read-only", "close that program", "open-elsewhere"
    return error.strerror or str(error), hint, code
