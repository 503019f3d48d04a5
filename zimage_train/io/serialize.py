"""The bytes of a safetensors file, which depend on its content only (torch-free)."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from zimage_train.io import atomic


class TensorEntry(NamedTuple):
    """One tensor as bytes: safetensors' name of its dtype, its shape, its contiguous little-endian data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def write_safetensors(path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content only."""
    infos = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    write_safetensors_of(path, infos, lambda name: entries[name].data, metadata)


def write_safetensors_of(
    path: Path,
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    data_of: Callable[[str], bytes | memoryview],
    metadata: Mapping[str, str],
) -> None:
    """As `write_safetensors`, of tensors that are made one after the other; `infos` has their types and shapes.

    The safetensors library writes metadata keys in random order; here every key is sorted. Tensors are ordered by
    falling item size, so that each one is aligned, then by name.
    """
    order = sorted(infos, key=lambda name: (-DTYPE_BYTES[infos[name][0]], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = infos[name]
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    atomic.write(path, itertools.chain([len(text).to_bytes(8, "little"), text], map(data_of, order)))
