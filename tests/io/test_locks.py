"""A folder belongs to a single process that lives, by the system's lock or by a lease."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zimage_train.errors import DiskError, FolderInUseError
from zimage_train.io import locks

fcntl = pytest.importorskip("fcntl", reason="these tests take flock away, which Windows does not have")


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, which reports it with any of three error codes."""

    def fail(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_lock_folder_cannot_be_made(tmp_path: Path, name: str):
    """A folder that cannot be made is a disk error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError) as caught, locks.lock_folder(tmp_path / name):
        raise AssertionError("locked nothing")
    assert caught.value.exit_code == 7 and (tmp_path / "file").read_text() == ""


def test_lock_file_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A lock file that may not be opened is a disk error."""

    def deny(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "flock", deny)
    with pytest.raises(DiskError, match=r"run\.lock: cannot be written"), locks.lock_folder(tmp_path):
        raise AssertionError("locked nothing")


def test_lock_holder_without_a_name(tmp_path: Path):
    """A holder without a name is reported as another process."""
    with locks.lock_folder(tmp_path):
        (tmp_path / "run.holder").unlink()
        with pytest.raises(FolderInUseError, match="in use by another process"), locks.lock_folder(tmp_path):
            raise AssertionError("locked twice")


def test_lock_of_a_dead_holder(tmp_path: Path):
    """Where the system locks, the file of a dead holder does not count."""
    (tmp_path / "run.holder").write_text("process 1 on elsewhere")
    with locks.lock_folder(tmp_path):
        assert (tmp_path / "run.holder").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_lease_without_flock(tmp_path: Path, no_flock: None):
    """Without `flock`, a holder has a lease."""
    path = tmp_path / "run.holder"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    here, now = socket.gethostname(), time.time()

    def is_free(text: str, age: float = 0.0) -> bool:
        path.write_text(text)
        os.utime(path, (now - age, now - age))
        try:
            with locks.lock_folder(tmp_path):
                return path.read_text() == f"process {os.getpid()} on {here}"
        except FolderInUseError as error:
            assert text in str(error)
            return False

    assert not locks.has_system_locks(tmp_path)
    assert is_free("")
    assert is_free(f"process {dead.pid} on {here}")
    assert is_free(f"process {os.getpid()} on {here}"), "an earlier process with the same id, as in containers"
    assert not is_free(f"process {alive.pid} on {here}")
    assert not is_free(f"process {alive.pid} on {here}", age=10_000)
    assert alive.poll() is None, "asking whether a process lives does not end it"
    alive.kill()
    alive.communicate()
    assert is_free(f"process {alive.pid} on {here}")
    assert not is_free("process 1 on elsewhere", age=60)
    assert is_free("process 1 on elsewhere", age=180)
    assert is_free("half a word")
    assert is_free("process x on elsewhere")
    with locks.lock_folder(tmp_path), pytest.raises(FolderInUseError), locks.lock_folder(tmp_path):
        raise AssertionError("locked twice")
    assert not is_free(f"process 1 on {here}", age=10_000), "another user's process lives"


def test_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_flock: None):
    """A lease is renewed as long as it is held."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.2)
    threads = threading.active_count()
    with locks.lock_folder(tmp_path):
        assert age_after(tmp_path, 0.3) < 1
    assert threading.active_count() == threads and not (tmp_path / "run.holder").exists()


def test_lease_is_not_needed_with_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system's lock needs no lease."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.2)
    threads = threading.active_count()
    assert locks.has_system_locks(tmp_path)
    with locks.lock_folder(tmp_path):
        assert age_after(tmp_path, 0.3) > 1000 and threading.active_count() == threads
        with pytest.raises(FolderInUseError):
            locks.has_system_locks(tmp_path)


def age_after(folder: Path, seconds: float) -> float:
    """Return how long ago the holder was touched, after a wait of `seconds`."""
    os.utime(folder / "run.holder", (0, 0))
    time.sleep(seconds)
    return time.time() - (folder / "run.holder").stat().st_mtime
