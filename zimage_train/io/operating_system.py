"""Everything that depends on the operating system; no other module asks which it is.

The default is Linux. macOS has no memory limits of containers, and cannot signal a child when its parent ends. Windows
has no stop signal but Ctrl-C (closing the window ends a run at once; it continues from its last checkpoint), cannot
sync a folder, reserves some file names for devices, opens no path of 260 characters or more, and neither renames nor
removes a file that a program has open.
"""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

SYSTEM = sys.platform
"""`linux`, `darwin` or `win32`; tests replace it."""
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Waits between attempts, while a virus scanner or an indexer has a file open."""
WINDOWS_PATH_LENGTH = 259
MAX_NAME, MAX_PATH = 255, 4095
"""Longest name and longest path on a file system: bytes, or on Windows units of UTF-16."""
PORTS = {f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³"}
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *PORTS}

T = TypeVar("T")


def is_windows() -> bool:
    """Return whether this is Windows."""
    return SYSTEM == "win32"


def is_process_alive(process_id: int) -> bool:
    """Return whether a process of this machine is alive."""
    # Not `os.kill` with signal 0, which would end the process on Windows.
    return psutil.pid_exists(process_id)


def process_start(process_id: int) -> float | None:
    """Return when a process of this machine began, in seconds since the epoch, or None if it has ended."""
    try:
        process = psutil.Process(process_id)
        # One that has ended is a zombie until its parent asks for its exit code.
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to stop: Ctrl-C, and on Unix those of a scheduler and of a closed terminal."""
    names = ["SIGINT"] if is_windows() else ["SIGINT", "SIGTERM", "SIGHUP"]
    return [signal.Signals[name] for name in names]


def signal_when_parent_dies(number: int) -> None:
    """Let Linux send signal `number` to this process when its parent ends; elsewhere do nothing."""
    if SYSTEM == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def main_memory_bytes() -> int:
    """Return the main memory that this process may use, bytes: the machine's, or the limit of its container."""
    limits = [_read_limit(Path(path)) for path in CGROUP_LIMITS]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit)])


def peak_memory_bytes() -> int:
    """Return the peak of this process's main memory, bytes."""
    if is_windows():
        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]  # Windows only
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if SYSTEM == "darwin" else peak * 1024  # KiB on Linux


def sync_folder(folder: Path) -> None:
    """Sync `folder`, so that new names in it survive a power cut; on Windows do nothing.

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
    """Return the result of `action`; on Windows retry it for about 1.5 s while a file is open elsewhere.

    Raises:
        OSError: as `action` raises it, on Windows at the last attempt.
    """
    for seconds in RETRY_SECONDS if is_windows() else ():
        try:
            return action()
        except PermissionError:
            time.sleep(seconds)
    return action()


def is_open_elsewhere(error: OSError) -> bool:
    """Return whether a file may be open in another program; Windows has the same error for a lack of permission."""
    return is_windows() and isinstance(error, PermissionError)


def is_too_long(path: str) -> bool:
    """Return whether no file can have this path: asking for it raises an OSError."""
    lengths = [_length(part) for part in re.split(r"[\\/]", path)]
    return max(lengths) > MAX_NAME or _length(path) > MAX_PATH


def _length(text: str) -> int:
    if is_windows():
        return len(text.encode("utf-16-le", "surrogatepass")) // 2
    return len(text.encode("utf-8", "surrogateescape"))


def is_device_name(name: str) -> bool:
    """Return whether Windows reserves a file name for a device, which it does with any extension and in any case."""
    return name.partition(".")[0].rstrip(" ").upper() in WINDOWS_DEVICES


def user_cache_folder() -> Path:
    """Return the folder of this user's caches: $XDG_CACHE_HOME, %LOCALAPPDATA% on Windows, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(base) if base else Path.home() / ".cache"


def _read_limit(path: Path) -> int | None:
    """Return the number in a file of the cgroup, or None if there is no such file or no limit, written `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
