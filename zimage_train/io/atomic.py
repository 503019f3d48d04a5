"""The only module that renames, fsyncs, locks or removes: nothing it writes is ever seen half done."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from zimage_train.errors import DiskError, FolderInUseError, Problem
from zimage_train.io.units import format_bytes

try:
    import fcntl
except ImportError:  # Windows has no flock; the lease file below takes its place
    fcntl = None

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEASE_SECONDS = 120
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
    temporary = path.with_name(f".{path.name}.{_this_process()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _disk_error(path, error) from error
        raise


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `chunks` to `path`, whole or not at all.

    Raises:
        DiskError: as `replacing`.
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
        path.unlink(missing_ok=True)
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
        path.rename(place)
    except OSError as error:
        raise DiskError(Problem(str(path), f"cannot be moved ({error.strerror})", "check its permissions")) from error
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
        path.rename(target)
    except OSError as error:
        raise DiskError(Problem(str(path), f"cannot be renamed ({error.strerror})", "check its permissions")) from error
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
        return process_id == os.getpid() or not _is_alive(process_id)
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


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone.

    The kernel frees a flock when its holder dies, however it dies. Where flock is missing (Windows, some network
    volumes) the lock file is a lease: it counts as held while its holder lives on this host, or, for another host,
    for two minutes after it was last touched, which its holder does as long as it lives.

    Raises:
        FolderInUseError: another process holds the folder; names it.
        DiskError: the folder cannot be made or written to.
    """
    path = folder / "run.lock"
    with _open_lock(path) as file:
        flocked = _flock(file)
        if flocked is False or (flocked is None and not _lease_is_over(file, path)):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise FolderInUseError(
                Problem(str(folder), f"in use by {holder}", "wait for that run, stop it, or choose another name")
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            with contextlib.nullcontext() if flocked else _touched(path):
                yield
        finally:
            file.seek(0)
            file.truncate()


def _open_lock(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _disk_error(path, error) from error


def _lease_is_over(file: IO[str], path: Path) -> bool:
    file.seek(0)
    words = file.read().split()
    if len(words) != 4 or not words[1].isdecimal():
        return True
    if words[3] == socket.gethostname():
        return not _is_alive(int(words[1]))
    return time.time() - path.stat().st_mtime > LEASE_SECONDS


@contextlib.contextmanager
def _touched(path: Path) -> Iterator[None]:
    """Touch `path` now and then, from a thread, until the block ends."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(LEASE_SECONDS / 4):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _flock(file: IO[str]) -> bool | None:
    """Whether the lock is ours now; None where there is no flock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without flock
        return None
    return True


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> DiskError:
    what = "the disk is full" if error.errno in FULL_DISK else (error.strerror or str(error))
    todo = "free some space" if error.errno in FULL_DISK else "check the disk and its permissions"
    return DiskError(Problem(str(path), f"cannot be written ({what})", f"{todo}; the same command continues"))
