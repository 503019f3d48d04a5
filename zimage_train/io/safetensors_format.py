"""The headers of safetensors files, and a writer whose bytes depend only on the content (torch-free)."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zimage_train.errors import Location, Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.io.dtypes import ITEM_BYTES
from zimage_train.io.json_text import parse_json

MAX_HEADER_BYTES = 100_000_000
PLAIN_WEIGHTS_HINT = "take the .safetensors of the same weights in bf16, or in fp8"
"""The hint for weights that are stored in a way that is not read here."""
GGUF_MESSAGE = "is a GGUF, the format of llama.cpp, which is not read here"
PICKLE_MESSAGE = "is a pickle, which can run code and is never opened"
PICKLE_HINT = "get the .safetensors of the same weights"
PICKLE_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file, without its values."""

    file: Path
    name: str
    """Its name in the file."""
    dtype: str
    """Safetensors' name, such as `BF16`."""
    shape: tuple[int, ...]
    begin: int
    """Position of its first byte in the file."""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without reading its tensors.

    Raises:
        WeightsError: missing, cut off, or not a safetensors file; the message says what it is instead, as far as its
            first bytes show. Pickles are never opened.
    """
    hint = "get the file again"
    try:
        file_size = path.stat().st_size
        if not path.is_file():
            message = "is a folder" if path.is_dir() else "is no regular file"
            raise WeightsError(Problem(str(path), message, "give the .safetensors file itself", "not-a-file"))
        with open(path, "rb") as file:
            start = file.read(8)
            header_size = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= header_size <= min(MAX_HEADER_BYTES, file_size - 8):
                message, hint = _describe_content(start + file.read(64), file_size)
                raise WeightsError(Problem(str(path), message, hint, "not-safetensors"))
            entries = parse_json(file.read(header_size))
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WeightsError(Problem(str(path), "has metadata that is no text", hint, "damaged-file"))
        tensors: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int]] = []
        for name, entry in entries.items():
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            if isinstance(dtype, str) and dtype not in ITEM_BYTES:
                message = f"is of dtype {dtype}, which is not read here"
                raise WeightsError(Problem(f"{path}: {name}", message, PLAIN_WEIGHTS_HINT, "unsupported-dtype"))
            if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
                raise WeightsError(Problem(f"{path}: {name}", "has a shape of no whole numbers", hint, "damaged-file"))
            if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
                message = f"{dtype} {shape} does not fit its bytes"
                raise WeightsError(Problem(f"{path}: {name}", message, hint, "damaged-file"))
            tensors[name] = TensorInfo(path, name, dtype, tuple(shape), 8 + header_size + begin)
            spans.append((begin, end))
        expected_size = 8 + header_size + _end_of(spans)
    except FileNotFoundError:
        raise WeightsError(Problem(str(path), "does not exist", "check the path", "missing-file")) from None
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise WeightsError(Problem(str(path), message, "check the path", "unreadable-file")) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        message = "is not a safetensors file, or damaged"
        raise WeightsError(Problem(str(path), message, hint, "damaged-file")) from None
    if file_size != expected_size:
        message = f"{file_size:,} bytes instead of {expected_size:,}: cut off or overwritten"
        raise WeightsError(Problem(str(path), message, hint, "damaged-file"))
    return Header(tensors, metadata)


def _end_of(spans: list[tuple[int, int]]) -> int:
    """Return where the data ends.

    Raises:
        ValueError: tensors overlap or leave gaps, which the format forbids: a small file could claim to be endless.
    """
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise ValueError("tensors overlap or leave gaps")
        reached = end
    return reached


def read_bytes(info: TensorInfo) -> bytes:
    """Return the data of a tensor.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        with open(info.file, "rb") as file:
            file.seek(info.begin)
            return file.read(math.prod(info.shape) * ITEM_BYTES[info.dtype])
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise WeightsError(Problem(str(info.file), message, "check the path", "unreadable-file")) from None


def read_sharded(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """Return the tensors of `folder/stem.safetensors`, or of the shards that `stem.safetensors.index.json` names.

    Raises:
        WeightsError: neither file exists, a shard is missing, or index and shards disagree.
    """
    single = folder / f"{stem}.safetensors"
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.exists():
        if not single.exists():
            message = f"holds neither {single.name} nor {index_path.name}"
            raise WeightsError(
                Problem(str(folder), message, hint_for_folder(folder) or "check the path", "missing-file")
            )
        return read_header(single).tensors
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(Problem(str(index_path), "has no weight_map", "get the file again", "damaged-file"))
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            message = f"names a file elsewhere: {shard}"
            raise WeightsError(Problem(str(index_path), message, "get the file again", "damaged-file"))
        tensors |= read_header(folder / shard).tensors
    missing: list[str] = []
    for name, shard in index.items():
        if name not in tensors or tensors[name].file.name != shard:
            missing.append(name)
    if missing:
        message = f"{len(missing)} tensors are not in the shard that it names, such as {min(missing)}"
        raise WeightsError(Problem(str(index_path), message, "get the folder again", "incomplete-model"))
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        WeightsError: missing, or not a JSON object.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(Problem(str(path), "does not exist", "is the folder complete?", "missing-file")) from None
    except (OSError, ValueError):
        raise WeightsError(Problem(str(path), "is not JSON", "get the file again", "damaged-file")) from None
    if not isinstance(value, dict):
        raise WeightsError(Problem(str(path), "is not a JSON object", "get the file again", "damaged-file"))
    return value


def hint_for_folder(folder: Path) -> str:
    """Return the hint for a folder without the safetensors that were looked for, by what it holds instead; or ""."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.endswith(PICKLE_SUFFIXES):
            return f"{name} is a pickle, which is never opened; get the safetensors"
        if name.endswith(".gguf"):
            return f"{name} {GGUF_MESSAGE}; {PLAIN_WEIGHTS_HINT}"
    return ""


def require_readable_name(name: str, where: Location) -> None:
    """Refuse a path or hub id that ends like a pickle or a GGUF, before it is taken for anything else.

    Raises:
        WeightsError: it does.
    """
    lowered = name.lower()
    if lowered.endswith(".gguf"):
        raise WeightsError(Problem(where, GGUF_MESSAGE, PLAIN_WEIGHTS_HINT, "not-safetensors"))
    if lowered.endswith(PICKLE_SUFFIXES):
        raise WeightsError(Problem(where, PICKLE_MESSAGE, PICKLE_HINT, "not-safetensors"))


def _describe_content(start: bytes, size: int) -> tuple[str, str]:
    """Return what a file that is not safetensors seems to be, by its first bytes, and what to do about it."""
    text = start.lstrip().lower()
    if size == 0:
        return "is empty", "get the file again"
    if start.startswith(b"GGUF"):
        return GGUF_MESSAGE, PLAIN_WEIGHTS_HINT
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return PICKLE_MESSAGE, PICKLE_HINT
    if text.startswith(b"version http"):
        return "is a Git LFS pointer, not the weights themselves", "get the file again, with Git LFS or from its page"
    if text.startswith((b"<!doct", b"<html")):
        return "is a web page, not weights", "get the file again"
    if text.startswith((b"{", b"[")):
        return "is JSON, not weights", "give the .safetensors itself, or the folder that it is in"
    return "is not a safetensors file, or cut off", "get the file again"


class TensorEntry(NamedTuple):
    """A tensor as bytes: safetensors' name of its dtype, its shape, and its contiguous little-endian data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def write_safetensors(path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend only on its content."""
    infos = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    write_safetensors_of(path, infos, lambda name: entries[name].data, metadata)


def write_safetensors_of(
    path: Path,
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    data_of: Callable[[str], bytes | memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Do as `write_safetensors`, with a single tensor in memory at a time.

    Args:
        infos: dtype and shape of each tensor.
        data_of: returns the data of a tensor by its name; called once for each, in the order of the file.
    """
    header = encode_header(infos, metadata or None)
    atomic.write(path, itertools.chain([header], map(data_of, tensor_order(infos))))


def tensor_order(infos: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Return the names of the tensors in the order of the file, which is that of the safetensors library.

    It is by decreasing item size, which aligns each of them, and then by name.
    """
    return sorted(infos, key=lambda name: (-ITEM_BYTES[infos[name][0]], name))


def encode_header(infos: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> bytes:
    """Return all that precedes the data of the tensors in a file.

    The safetensors library writes the keys of the metadata in random order; here they are sorted.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in tensor_order(infos):
        dtype, shape = infos[name]
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
