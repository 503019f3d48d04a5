"""What holds on Windows and macOS, with their names set on this system; nobody has seen it there."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from zimage_train.errors import DiskError
from zimage_train.io import atomic, operating_system


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Windows' rules; yields the waits, which take no time."""
    waits: list[float] = []
    monkeypatch.setattr(operating_system, "SYSTEM", "win32")
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def open_elsewhere(times: int, original: Callable[..., object]) -> Callable[..., object]:
    """What fails as Windows does while a file is open, so many times."""
    calls: list[object] = []

    def call(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return original(*args, **options)

    return call


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "written": ("replace", lambda path: atomic.write_text(path, "new")),
    "moved": ("rename", lambda path: atomic.move(path, path.with_name("moved"))),
    "renamed": ("rename", lambda path: atomic.rename_as_backup(path, ".old")),
}


@pytest.mark.parametrize("verb", CHANGES)
def test_windows_retries_an_open_file(tmp_path: Path, monkeypatch, windows: list[float], verb: str):
    """On Windows, changing a file that is open elsewhere is tried again."""
    name, change = CHANGES[verb]
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, name, open_elsewhere(3, getattr(os, name)))
    change(tmp_path / "x")
    assert windows == list(operating_system.RETRY_SECONDS[:3])
    assert [path.name for path in tmp_path.iterdir()] == [{"written": "x", "moved": "moved", "renamed": "x.old"}[verb]]


@pytest.mark.parametrize("verb", CHANGES)
def test_windows_gives_up_on_an_open_file(tmp_path: Path, monkeypatch, windows: list[float], verb: str):
    """On Windows, a file that stays open is a disk error, and stays as it was."""
    name, change = CHANGES[verb]
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, name, open_elsewhere(99, getattr(os, name)))
    with pytest.raises(
        DiskError, match=rf"x: cannot be {verb} \(another program has it open.*close that program"
    ) as error:
        change(tmp_path / "x")
    assert error.value.exit_code == 7 and windows == list(operating_system.RETRY_SECONDS)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_windows_retries_to_remove(tmp_path: Path, monkeypatch, windows: list[float]):
    """On Windows, removing an open file is tried again."""
    (tmp_path / "x").write_text("")
    monkeypatch.setattr(os, "unlink", open_elsewhere(1, os.unlink))
    assert atomic.remove(tmp_path / "x") and len(windows) == 1


def test_elsewhere_a_refusal_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "replace", open_elsewhere(1, os.replace))
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with pytest.raises(DiskError, match="check the disk and its permissions"):
        atomic.write_text(tmp_path / "x", "new")


def test_windows_syncs_no_folder(tmp_path: Path, monkeypatch, windows: list[float]):
    monkeypatch.setattr(os, "open", pytest.fail)
    operating_system.sync_folder(tmp_path)


def test_windows_has_ctrl_c_only(windows: list[float]):
    """Ctrl-C is the only signal on Windows."""
    assert operating_system.stop_signals() == [signal.SIGINT]


def test_unix_has_more_signals():
    assert operating_system.stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_parent_death_signal_is_for_linux(monkeypatch: pytest.MonkeyPatch, system: str):
    """Only Linux signals the death of a parent."""
    monkeypatch.setattr(operating_system, "SYSTEM", system)
    monkeypatch.setattr("ctypes.CDLL", pytest.fail)
    operating_system.signal_when_parent_dies(signal.SIGTERM)


@pytest.mark.parametrize(("system", "expected"), [("linux", 5 * 1024), ("darwin", 5), ("win32", 7)])
def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, system: str, expected: int):
    class Process:
        def memory_info(self) -> "Process":
            return self

        peak_wset = 7

    resource = pytest.importorskip("resource")
    monkeypatch.setattr(operating_system, "SYSTEM", system)
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 5}))
    assert operating_system.peak_memory_bytes() == expected


def test_process_is_alive_does_not_end_it():
    """Asking whether a process is alive does not end it."""
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert operating_system.is_process_alive(alive.pid) and alive.poll() is None
    alive.kill()
    alive.communicate()
    assert not operating_system.is_process_alive(alive.pid)


def test_memory_of_a_container(tmp_path: Path, monkeypatch):
    """The memory of a container counts, and not that of its host."""
    physical = operating_system.main_memory_bytes()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(operating_system, "CGROUP_LIMITS", (str(limit),))
    for text, expected in (("4000000000", 4 * 10**9), ("max", physical), ("9223372036854771712", physical)):
        limit.write_text(text + "\n")
        assert operating_system.main_memory_bytes() == min(expected, physical)


@pytest.mark.parametrize("name", ["CON", "nul", "Aux.v2", "com1", "LPT9.lora", "COM²", "prn .x"])
def test_names_of_devices_are_known(name: str):
    assert operating_system.is_device_name(name)


@pytest.mark.parametrize("name", ["console", "com", "com10", "COM0", "my.con", "zorb"])
def test_other_names_are_free(name: str):
    assert not operating_system.is_device_name(name)


def test_longest_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name is too long if this system has no file of it: bytes count, and on Windows units of UTF-16."""
    longest = "画" * 85
    (tmp_path / longest).touch()
    assert not operating_system.is_too_long(str(tmp_path / longest))
    with pytest.raises(OSError, match="too long"):
        (tmp_path / f"{longest}x").touch()
    assert operating_system.is_too_long(f"{longest}x") and operating_system.is_too_long("ab/" * 1366)
    monkeypatch.setattr(operating_system, "is_windows", lambda: True)
    assert not operating_system.is_too_long("画" * 255) and operating_system.is_too_long("😀" * 128)
