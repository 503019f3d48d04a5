"""The lock of a run folder, which only one process may hold.

It is the operating system's lock on `run.lock`, or a lease where the file system has no locks. filelock takes the
system's lock (flock, or LockFileEx on Windows), which is released whenever its holder ends, however it ends. Two things
are added to it here:

* `run.holder` names the holder. filelock does not record it, and on Windows the beginning of a locked file cannot be
  read by another process, so the name is in a file of its own.
* The lease, for volumes without locks, as some network volumes are. filelock's soft lock is never taken over from a
  dead process of another host, and filelock's own lease only after waiting for its full duration. The lease here is
  valid or not when a run begins, so the run begins or is refused without waiting.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from zimage_train.errors import FolderInUseError, Problem
from zimage_train.io import atomic
from zimage_train.io.operating_system import is_process_alive, process_start

LEASE_SECONDS = 120
"""Validity of a lease after it was last touched."""
_held_here: set[Path] = set()
"""Leases that this process holds."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone.

    Without the system's locks, `run.holder` is a lease. A lease of this host is valid while its process is alive, and
    that of another host until `LEASE_SECONDS` after it was last touched, which its holder does while it is alive.

    Raises:
        FolderInUseError: another process holds the folder; the message names it.
        DiskError: the folder cannot be created or written to.
    """
    lease = folder / "run.holder"
    with _system_lock(folder) as is_locked:
        if not is_locked and _is_held(lease):
            raise _in_use(folder)
        atomic.write_text(lease, f"process {os.getpid()} on {socket.gethostname()}")
        _held_here.add(lease.absolute())
        try:
            with contextlib.nullcontext() if is_locked else _touched(lease):
                yield
        finally:
            _held_here.discard(lease.absolute())
            atomic.remove(lease)


def is_held(folder: Path) -> bool:
    """Return whether a process holds `folder`, by its entry in `run.holder`; the lock itself is not touched.

    Trying the lock would refuse a run that begins at that moment. A holder on another host counts for `LEASE_SECONDS`
    after it has last written.
    """
    holder = folder / "run.holder"
    words, written_at = _read_lease(holder)
    if words is None:
        return False
    process_id, host = words
    if host == socket.gethostname():
        started_at = process_start(process_id)
        # An older file is of an earlier process with the same id. File systems round their times.
        return started_at is not None and started_at <= written_at + 2
    times = [path.stat().st_mtime for path in (holder, folder / "metrics.jsonl", folder / "log.txt") if path.exists()]
    return time.time() - max(times, default=0.0) <= LEASE_SECONDS


def holder_process(folder: Path) -> int | None:
    """Return the process of this machine that holds `folder`, or None."""
    holder, _ = _read_lease(folder / "run.holder")
    return holder[0] if holder and holder[1] == socket.gethostname() and is_held(folder) else None


def has_system_locks(folder: Path) -> bool:
    """Return whether the file system of `folder` has locks, so that no lease is needed there.

    Raises:
        FolderInUseError: a run holds the folder.
        DiskError: it cannot be created or written to.
    """
    with _system_lock(folder) as is_locked:
        return is_locked


@contextlib.contextmanager
def _system_lock(folder: Path) -> Iterator[bool]:
    """Hold the system's lock on `run.lock`, and yield True; yield False if the file system has no locks."""
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.disk_error(path, error) from error
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(folder) from None
    except PermissionError as error:
        raise atomic.disk_error(path, error) from error
    except (OSError, NotImplementedError):  # no locks here; on a full disk, writing the lease will raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _in_use(folder: Path) -> FolderInUseError:
    try:
        holder = (folder / "run.holder").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        holder = ""
    message = f"in use by {holder or 'another process'}"
    hint = "wait for that run, stop it, or choose another name"
    return FolderInUseError(Problem(str(folder), message, hint, "folder-in-use"))


def _is_held(lease: Path) -> bool:
    """Return whether a lease, `process PID on HOST`, is valid."""
    holder, written_at = _read_lease(lease)
    if holder is None:
        return False
    process_id, host = holder
    if host == socket.gethostname():
        if process_id == os.getpid():
            # Otherwise an earlier process had this id: in a container that starts again, ids repeat.
            return lease.absolute() in _held_here
        return is_process_alive(process_id)
    return time.time() - written_at <= LEASE_SECONDS


def _read_lease(lease: Path) -> tuple[tuple[int, str] | None, float]:
    """Return process and host of a lease, or None if there is no valid one, and when it was written or touched."""
    try:
        words = lease.read_text(encoding="utf-8", errors="replace").split()
        written_at = lease.stat().st_mtime
    except OSError:
        return None, 0.0
    is_valid = len(words) == 4 and words[1].isdecimal()
    return ((int(words[1]), words[3]) if is_valid else None), written_at


@contextlib.contextmanager
def _touched(lease: Path) -> Iterator[None]:
    """Touch `lease` from a thread until the block ends, four times in each `LEASE_SECONDS`."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(LEASE_SECONDS / 4):
            with contextlib.suppress(OSError):
                os.utime(lease)

    thread = threading.Thread(target=touch, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
