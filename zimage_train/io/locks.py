"""One run to a folder: the system's lock on `run.lock`, or a lease where there are no locks; `run.holder` says whose.

filelock takes the system's lock (flock, or LockFileEx on Windows), which is free as soon as its holder dies, however it
dies. Two promises filelock does not keep, and they are kept here:

* The holder is named. A native lock of filelock says nothing of its holder, and on Windows nobody else can read the
  beginning of a locked file, so the name stands in a file beside it.
* A volume without locks (some network volumes). filelock's soft lock is never taken over from a dead process of another
  host, and its lease only after the newcomer has watched it for the whole time; a run is refused or begins at once.
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
from zimage_train.io.operating_system import is_process_alive

LEASE_SECONDS = 120


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone.

    Without the system's locks, `run.holder` is a lease: it counts as held while its holder lives on this host, or, for
    another host, for two minutes after it was last touched, which its holder does as long as it lives.

    Raises:
        FolderInUseError: another process holds the folder; names it.
        DiskError: the folder cannot be made or written to.
    """
    lease = folder / "run.holder"
    with _system_lock(folder) as is_locked:
        if not is_locked and _is_held(lease):
            raise _in_use(folder)
        atomic.write_text(lease, f"process {os.getpid()} on {socket.gethostname()}")
        try:
            with contextlib.nullcontext() if is_locked else _touched(lease):
                yield
        finally:
            atomic.remove(lease)


def has_system_locks(folder: Path) -> bool:
    """Whether the file system of `folder` has locks, so that no lease is needed there.

    Raises:
        FolderInUseError: a run holds it.
        DiskError: it cannot be made or written to.
    """
    with _system_lock(folder) as is_locked:
        return is_locked


@contextlib.contextmanager
def _system_lock(folder: Path) -> Iterator[bool]:
    """Hold the system's lock on `run.lock`; False: there are no locks here."""
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
    except (OSError, NotImplementedError):  # a file system without locks; if it is full or gone, `write_text` says so
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
    what = f"in use by {holder or 'another process'}"
    return FolderInUseError(Problem(str(folder), what, "wait for that run, stop it, or choose another name"))


def _is_held(lease: Path) -> bool:
    try:
        words = lease.read_text(encoding="utf-8", errors="replace").split()
        age = time.time() - lease.stat().st_mtime
    except OSError:
        return False
    if len(words) != 4 or not words[1].isdecimal():
        return False
    if words[3] == socket.gethostname():
        return is_process_alive(int(words[1]))
    return age <= LEASE_SECONDS


@contextlib.contextmanager
def _touched(lease: Path) -> Iterator[None]:
    """Touch `lease` now and then, from a thread, until the block ends."""
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
