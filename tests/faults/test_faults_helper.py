"""The injected fault itself: it fires once, where it was asked to, and not at all when it was not."""

import errno
from pathlib import Path

import pytest

from zimage_train.errors import DiskError
from zimage_train.io import atomic

from injection import WRITING, Crash, fail_at


def save(path: Path) -> None:
    atomic.write(path, [b"new!" * 2000, memoryview(b"new!" * 3000)])


def test_an_unfaulted_write_makes_the_new_file_by_one_rename_after_syncing(tmp_path: Path):
    path = tmp_path / "sub" / "deep" / "x.bin"
    with fail_at(WRITING, 0, Crash()) as fault:
        save(path)
    assert fault.fired == 0 and path.read_bytes() == b"new!" * 5000
    assert fault.seen == ["open", "write", "write", "flush", "fsync", "close", "replace", "open folder", "fsync"]


def test_a_fault_fires_once_and_a_fault_of_another_call_never(tmp_path: Path):
    with fail_at("write", 2, OSError(errno.ENOSPC, "full")) as fault:
        with pytest.raises(DiskError):
            save(tmp_path / "x.bin")
        save(tmp_path / "x.bin")
    assert fault.fired == 1 and fault.seen == ["write"] * 4
    with fail_at("rename", 1, Crash()) as fault:
        save(tmp_path / "x.bin")
    assert fault.fired == 0 and fault.seen == []


def test_a_write_that_fails_has_gone_through_by_half(tmp_path: Path):
    with fail_at("write", 1, Crash()) as fault, pytest.raises(Crash), (tmp_path / "x").open("wb") as file:
        file.write(b"12345678")
    assert fault.fired == 1 and (tmp_path / "x").read_bytes() == b"1234"


def test_after_the_block_nothing_is_left_of_it(tmp_path: Path):
    with fail_at(WRITING, 1, Crash()) as fault:
        pass
    save(tmp_path / "x.bin")
    assert (fault.fired, fault.seen) == (0, [])
