"""What is written is the old or the new file, whatever fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from zimage_train.errors import DiskError
from zimage_train.io import atomic, locks, safetensors_format
from zimage_train.io.dtypes import ITEM_BYTES, bytes_per_number
from zimage_train.io.safetensors_format import TensorEntry
from zimage_train.io.tensorfile import STORED_DTYPES

ROOT = Path(__file__).parents[2]
OLD, NEW = b"old" * 5000, b"new!" * 5000


def test_writer_error_keeps_the_old_file(tmp_path: Path):
    """An error of the writer itself leaves the old file."""
    path = tmp_path / "x.bin"
    path.write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), atomic.replace_atomically(path) as file:
        file.write(NEW)
        file.write(bytes(1 // 0))
    assert path.read_bytes() == OLD and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", ["file/x.bin", "x.bin/"])
def test_unwritable_place_is_a_disk_error(tmp_path: Path, place: str):
    """A place that cannot be written is a disk error."""
    (tmp_path / "file").write_text("")
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        atomic.write(tmp_path / place, [NEW])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_nothing_stays_open(tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        atomic.write_text(tmp_path / "x", "text")
        with locks.lock_folder(tmp_path):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_text_and_json_are_utf_8(tmp_path: Path):
    atomic.write_text(tmp_path / "x.txt", "é\n猫")
    assert (tmp_path / "x.txt").read_bytes() == "é\n猫".encode()
    atomic.write_json(tmp_path / "x.json", {"b": ["é"], "a": 1e-4})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"b": ["é"], "a": 1e-4}
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")


# safetensors


def entry(array: np.ndarray, dtype: str) -> TensorEntry:
    return TensorEntry(dtype, array.shape, memoryview(np.ascontiguousarray(array).tobytes()))


ARRAYS: dict[str, tuple[str, np.ndarray]] = {
    "z.double": ("F64", np.arange(3.0)),
    "b.float": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "a.float": ("F32", np.float32(2.5)),
    "half": ("F16", np.arange(3, dtype=np.float16)),
    "bytes": ("U8", np.arange(5, dtype=np.uint8)),
    "long": ("I64", np.array([[1], [2]])),
    "empty": ("F32", np.zeros((0, 4), np.float32)),
    "flags": ("BOOL", np.array([True, False, True])),
    "naïve 猫": ("I32", np.array([7], dtype=np.int32)),
}


def save_arrays(path: Path, names: list[str], metadata: dict[str, str]) -> bytes:
    safetensors_format.write_safetensors(
        path, {name: entry(ARRAYS[name][1], ARRAYS[name][0]) for name in names}, metadata
    )
    return path.read_bytes()


def header(content: bytes) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def test_tensors_load_with_safetensors(tmp_path: Path):
    """Tensors are read by the safetensors library."""
    save_arrays(tmp_path / "x.safetensors", list(ARRAYS), {"b": "2", "a": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, (_, array) in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert (found[name] == array).all()
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"a": "é", "b": "2"}


def test_bytes_do_not_depend_on_order(tmp_path: Path):
    """Equal content makes equal bytes, in any order."""
    names = list(ARRAYS)
    metadata = {f"key{number}": str(number) for number in range(20)}
    contents = {
        save_arrays(tmp_path / f"{number}", order, dict(items))
        for number, (order, items) in enumerate(
            [
                (names, metadata.items()),
                (names[::-1], reversed(metadata.items())),
                (sorted(names), sorted(metadata.items(), key=lambda item: item[0][::-1])),
            ]
        )
    }
    assert len(contents) == 1
    assert save_arrays(tmp_path / "y", names[1:], metadata) not in contents
    assert save_arrays(tmp_path / "y", names, metadata | {"key1": "x"}) not in contents


def test_tensors_are_aligned(tmp_path: Path):
    """Every tensor is aligned, and the header is sorted."""
    found, start = header(save_arrays(tmp_path / "x", list(ARRAYS), {"b": "2", "a": "1", "c": "3"}))
    assert start % 8 == 0
    assert list(found["__metadata__"]) == ["a", "b", "c"]
    tensors = [(name, one) for name, one in found.items() if name != "__metadata__"]
    end = 0
    for _, one in tensors:
        assert one["data_offsets"][0] == end, "no holes"
        assert (start + end) % ITEM_BYTES[one["dtype"]] == 0
        end = one["data_offsets"][1]
    assert len((tmp_path / "x").read_bytes()) == start + end
    order = [(-ITEM_BYTES[one["dtype"]], name) for name, one in tensors]
    assert order == sorted(order)


def test_no_metadata_or_no_tensors(tmp_path: Path):
    """A file may have no metadata, or no tensors."""
    found, _ = header(save_arrays(tmp_path / "x", ["half"], {}))
    assert list(found) == ["half"]
    save_arrays(tmp_path / "y.safetensors", [], {"a": "1"})
    assert load_file(tmp_path / "y.safetensors") == {}


def test_the_size_of_every_type_is_known():
    sizes = {
        8: ("F64", "I64", "U64", "C64"),
        4: ("F32", "I32", "U32"),
        2: ("BF16", "F16", "I16", "U16"),
        1: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    }
    assert {name: size for size, names in sizes.items() for name in names} == ITEM_BYTES
    assert {name: dtype.itemsize for name, dtype in STORED_DTYPES.items()}.items() <= ITEM_BYTES.items()
    assert (bytes_per_number("bf16"), bytes_per_number("fp32")) == (2, 4)


# Logs, removing, setting aside


def test_log_lines_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A line of a log is written at once, and synced when requested."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with (tmp_path / "log").open("a") as log:
        atomic.append_line(log, "one")
        atomic.append_line(log, "two")
        assert (tmp_path / "log").read_text() == "one\ntwo\n" and synced == []
        log.write("three")
        atomic.sync(log)
        assert synced == [len("one\ntwo\nthree")]


def test_removing_never_fails(tmp_path: Path):
    (tmp_path / "x").write_text("")
    assert atomic.remove(tmp_path / "x") and not (tmp_path / "x").exists()
    assert atomic.remove(tmp_path / "x")
    (tmp_path / "folder").mkdir()
    assert not atomic.remove(tmp_path / "folder") and (tmp_path / "folder").exists()


def test_setting_aside_keeps_everything(tmp_path: Path):
    for number in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "x").write_text(str(number))
        assert atomic.rename_as_backup(tmp_path / "run", ".old").name == ("run.old", "run.old-2", "run.old-3")[number]
    assert [(tmp_path / name / "x").read_text() for name in ("run.old", "run.old-2", "run.old-3")] == ["0", "1", "2"]
    with pytest.raises(DiskError, match=r"run: cannot be renamed \(No such file"):
        atomic.rename_as_backup(tmp_path / "run", ".old")


def test_stale_temp_files_are_removed(tmp_path: Path):
    """Temporary files of dead processes are removed, and no others."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    here, there = atomic._host(), "0123abcd"
    old = f".old.{there}-{alive.pid}.tmp"
    names = [
        f".x.bin.{here}-{dead.pid}.tmp",
        f"sub/deep/.y.{here}-{dead.pid}.tmp",
        f".own.{here}-{os.getpid()}.tmp",
        old,
    ]
    kept = [f".busy.{here}-{alive.pid}.tmp", f".theirs.{there}-{dead.pid}.tmp"]
    kept += ["x.bin", "x.tmp", ".odd.tmp", f"sub/.y.{here}-{dead.pid}.txt"]
    for name in names + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    os.utime(tmp_path / old, (0, time.time() - atomic.ABANDONED_SECONDS - 1))
    atomic.remove_stale_temp_files(tmp_path)
    assert {one.relative_to(tmp_path).as_posix() for one in tmp_path.rglob("*") if one.is_file()} == set(kept)
    atomic.remove_stale_temp_files(tmp_path / "none")
    assert alive.poll() is None, "asking whether a process lives does not end it"
    alive.kill()
    alive.communicate()
