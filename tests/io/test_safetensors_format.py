"""Headers of weights that claim what is not there: refused by what the file is, at once, without memory for it."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from zimage_train.errors import WeightsError
from zimage_train.io.safetensors_format import read_header


def written(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "size"),
    [
        ({"a": entry([2], 0, 8)}, bytes(8), 2**62),
        ({"a": entry([2], 0, 8)}, bytes(8), 99_999_999),
        ({"a": entry([2], 0, 8)}, bytes(8), 1),
        ({"a": entry([10**12], 0, 4 * 10**12)}, bytes(8), None),
        ({"a": entry([10**12, 10**12], 0, 8)}, bytes(8), None),
        ({"a": entry([-2], 8, 0)}, bytes(8), None),
        ({"a": entry([2], -8, 0)}, bytes(8), None),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8), None),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), None),
        ({"a": entry([2], 8, 16)}, bytes(16), None),
        ({"a": entry([2.0], 0, 8)}, bytes(8), None),
        ({"a": entry(["2"], 0, 8)}, bytes(8), None),
        ({"a": entry([2], 0, 8, ["F32"])}, bytes(8), None),
        ({"a": []}, b"", None),
        ([], b"", None),
        (b"[" * 90_000, b"", None),
        (b"\xff\xfe" * 100, b"", None),
        (b'{"a": 1' + b"0" * 5000 + b"}", b"", None),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, data: bytes, size: int | None):
    path = written(tmp_path / "x.safetensors", header, data, size)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(WeightsError) as error:
        read_header(path)
    taken, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.exit_code == 4 and str(path.name) in str(error.value)
    assert taken < 1 and peak < 20e6


def test_a_true_header(tmp_path: Path):
    """The same helper makes a file that is read, so that lies alone are refused above."""
    path = written(tmp_path / "x.safetensors", {"a": entry([2], 0, 8), "b": entry([], 8, 12)}, bytes(12))
    assert set(read_header(path).tensors) == {"a", "b"}
