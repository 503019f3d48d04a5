"""The headers of .safetensors files, and files written so that their bytes depend on content only (torch-free)."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.io.dtypes import ITEM_BYTES

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: where it is, what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Everything that a safetensors file says before its data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        WeightsError: missing, cut off, or not a safetensors file; says what it is instead. Pickles are never opened.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no regular file"
            raise WeightsError(Problem(str(path), what, "give the .safetensors file itself"))
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(Problem(str(path), _what_is(start + file.read(64), size), "get the file again"))
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: TensorInfo(path, item["dtype"], tuple(item["shape"])) for name, item in header.items()}
        ends = [item["data_offsets"][1] for item in header.values()]
        expected = 8 + length + max(ends, default=0)
        for name, item in header.items():
            begin, end = item["data_offsets"]
            count = 1
            for side in item["shape"]:
                count *= side
            if end - begin != count * ITEM_BYTES.get(item["dtype"], 0):
                raise WeightsError(
                    Problem(
                        f"{path}: {name}", f"{item['dtype']} {item['shape']} does not fit its bytes", "get it again"
                    )
                )
    except FileNotFoundError:
        raise WeightsError(Problem(str(path), "does not exist", "check the path")) from None
    except OSError as error:
        raise WeightsError(Problem(str(path), f"cannot be read ({error.strerror})", "check the path")) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise WeightsError(Problem(str(path), "is not a safetensors file, or damaged", "get the file again")) from None
    if size != expected:
        what = f"{size:,} bytes instead of {expected:,}: cut off or overwritten"
        raise WeightsError(Problem(str(path), what, "get the file again"))
    return Header(tensors, metadata)


def read_sharded(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """The tensors of `folder/stem.safetensors`, or of the shards that `stem.safetensors.index.json` names.

    Raises:
        WeightsError: neither is there, a shard is missing, or the index and the shards disagree.
    """
    single = folder / f"{stem}.safetensors"
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.exists():
        if not single.exists():
            raise WeightsError(
                Problem(str(folder), f"holds neither {single.name} nor {index_path.name}", _pickle_hint(folder))
            )
        return read_header(single).tensors
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(Problem(str(index_path), "has no weight_map", "get the file again"))
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            raise WeightsError(Problem(str(index_path), f"names a file elsewhere: {shard}", "get the file again"))
        tensors |= read_header(folder / shard).tensors
    lost = sorted(name for name, shard in index.items() if name not in tensors or tensors[name].file.name != shard)
    if lost:
        what = f"{len(lost)} tensors are not in the shard that it names, such as {lost[0]}"
        raise WeightsError(Problem(str(index_path), what, "get the folder again"))
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: missing, or no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(Problem(str(path), "does not exist", "is the folder complete?")) from None
    except (OSError, ValueError, RecursionError):
        raise WeightsError(Problem(str(path), "is not JSON", "get the file again")) from None
    if not isinstance(value, dict):
        raise WeightsError(Problem(str(path), "is not a JSON object", "get the file again"))
    return value


def _pickle_hint(folder: Path) -> str:
    pickles = (
        [p.name for ext in ("*.bin", "*.pt", "*.ckpt", "*.pth") for p in folder.glob(ext)] if folder.exists() else []
    )
    return f"{pickles[0]} is a pickle, which is never opened; get the safetensors" if pickles else "check the path"


def _what_is(start: bytes, size: int) -> str:
    text = start.lstrip().lower()
    if size == 0:
        return "is empty"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle, which can run code and is never opened"
    if text.startswith(b"version http"):
        return "is a Git LFS pointer, not the weights themselves"
    if text.startswith((b"<!doct", b"<html")):
        return "is a web page, not weights"
    return "is not a safetensors file, or cut off"


class TensorEntry(NamedTuple):
    """One tensor as bytes: safetensors' name of its dtype, its shape, its contiguous little-endian data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


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
    order = sorted(infos, key=lambda name: (-ITEM_BYTES[infos[name][0]], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = infos[name]
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    atomic.write(path, itertools.chain([len(text).to_bytes(8, "little"), text], map(data_of, order)))
