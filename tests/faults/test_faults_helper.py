"""The injected fault itself: it fires once, where it was asked to, and not at all when it was not."""

import errno
from pathlib import Path

import pytest

from zimage_train.errors import DiskError
from zimage_train.io import atomic

from injection import WRITING, Crash, fail_at


def save(path: Path) -> None:
    atomic.write(path, [b"new!" * 2000, memoryview(b"new!" * 3000)])


def test_write_without_fault(tmp_path: Path):
    """A write without a fault makes the new file by a single rename, after syncing."""
    path = tmp_path / "sub" / "deep" / "x.bin"
    with fail_at(WRITING, 0, Crash()) as fault:
        save(path)
    assert fault.fired == 0 and path.read_bytes() == b"new!" * 5000
    assert fault.seen == ["open", "write", "write", "flush", "fsync", "close", "replace", "open folder", "fsync"]


def test_fault_fires_once(tmp_path: Path):
    """A fault fires once, and a fault of another call never does."""
    with fail_at("write", 2, OSError(errno.ENOSPC, "full")) as fault:
        with pytest.raises(DiskError):
            save(tmp_path / "x.bin")
        save(tmp_path / "x.bin")
    assert fault.fired == 1 and fault.seen == ["write"] * 4
    with fail_at("rename", 1, Crash()) as fault:
        save(tmp_path / "x.bin")
    assert fault.fired == 0 and fault.seen == []


def test_write_fault_happens_halfway(tmp_path: Path):
    """A write that fails has written half of its bytes."""
    with fail_at("write", 1, Crash()) as fault, pytest.raises(Crash), (tmp_path / "x").open("wb") as file:
        file.write(b"12345678")
    assert fault.fired == 1 and (tmp_path / "x").read_bytes() == b"1234"


def test_faults_end_with_the_block(tmp_path: Path):
    """After the block, nothing of the injected fault is left."""
    with fail_at(WRITING, 1, Crash()) as fault:
        pass
    save(tmp_path / "x.bin")
    assert (fault.fired, fault.seen) == (0, [])
