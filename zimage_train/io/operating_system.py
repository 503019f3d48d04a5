"""What differs between operating systems; no other module asks where it runs.

Linux is what this was written on. macOS has no limits of a container and does not tell a child that its parent died.
Windows has no signal but Ctrl-C (closing the window ends a run at once, and it continues from its last checkpoint),
makes no folder durable on request, keeps some names for devices, opens no path of 260 characters, and neither renames
nor removes a file that any program has open.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

SYSTEM = sys.platform
"""`linux`, `darwin` or `win32`; tests set another."""
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""How long to wait, each time, for a virus scanner or an indexer to close a file."""
WINDOWS_PATH_LENGTH = 259
PORTS = {f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³"}
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *PORTS}

T = TypeVar("T")


def is_windows() -> bool:
    """Whether Windows' rules hold for files and signals."""
    return SYSTEM == "win32"


def is_process_alive(process_id: int) -> bool:
    """Whether a process of this machine lives; asking does not disturb it, as signal 0 would on Windows."""
    return psutil.pid_exists(process_id)


def stop_signals() -> list[signal.Signals]:
    """The signals by which a run is asked to stop: Ctrl-C everywhere, and what else the system sends."""
    names = ["SIGINT"] if is_windows() else ["SIGINT", "SIGTERM", "SIGHUP"]
    return [signal.Signals[name] for name in names]


def signal_when_parent_dies(number: int) -> None:
    """Have Linux send signal `number` to this process when its parent ends; elsewhere a child lives on."""
    if SYSTEM == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, number)


def main_memory_bytes() -> int:
    """The main memory that this process may use: the machine's, or that of its container on Linux."""
    limits = [_number_in(Path(path)) for path in CGROUP_LIMITS]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit)])


def peak_memory_bytes() -> int:
    """The most main memory that this process has had."""
    if is_windows():
        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]  # Windows alone
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if SYSTEM == "darwin" else peak * 1024


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut; Windows cannot be asked to.

    Raises:
        OSError: the disk fails.
    """
    if is_windows():
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retry_while_open(action: Callable[[], T]) -> T:
    """Return what `action` returns; on Windows try again for a while when it meets a file that is open.

    Raises:
        OSError: what `action` raises, on Windows at the last attempt.
    """
    for seconds in RETRY_SECONDS if is_windows() else ():
        try:
            return action()
        except PermissionError:
            time.sleep(seconds)
    return action()


def is_open_elsewhere(error: OSError) -> bool:
    """Whether `error` is what Windows says of a file that a program has open; of a forbidden one it says the same."""
    return is_windows() and isinstance(error, PermissionError)


def is_device_name(name: str) -> bool:
    """Whether Windows keeps the file name `name`, with any extension and in any case, for a device."""
    return name.partition(".")[0].rstrip(" ").upper() in WINDOWS_DEVICES


def user_cache_folder() -> Path:
    """The folder for what programs of this user can make again: what the environment names, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")  # the latter is Windows' own
    return Path(base) if base else Path.home() / ".cache"


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None
