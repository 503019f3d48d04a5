"""Reading and writing of tensors in safetensors files, optionally with a digest of the content in the metadata."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import safetensors_format
from zimage_train.io.dtypes import PRECISIONS
from zimage_train.io.safetensors_format import TensorEntry, read_header

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' name of a dtype -> the dtype of torch, for those that are written here."""
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
TORCH_DTYPES = {precision: STORED_DTYPES[name] for precision, name in PRECISIONS.items()}
"""The dtypes that a config can name: `bf16` and `fp32`."""
DIGEST = "sha256"
"""Key of the digest in the metadata."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata`; equal inputs give equal bytes.

    Raises:
        DiskError: the file cannot be written; an older file is kept.
    """
    entries = {name: tensor_entry(tensor) for name, tensor in tensors.items()}
    safetensors_format.write_safetensors(path, entries, metadata)


def save_with_digest(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Do as `save`, and add a digest by which `load_with_digest` detects any changed bit.

    Raises:
        DiskError: as `save`.
    """
    entries = {name: tensor_entry(tensor) for name, tensor in tensors.items()}
    safetensors_format.write_safetensors(path, entries, {**metadata, DIGEST: _digest(entries, metadata)})


def load_with_digest(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a file that `save_with_digest` wrote, after comparing them with their digest.

    Raises:
        WeightsError: the file is missing, damaged, or without a digest.
    """
    tensors, metadata = load(path)
    stored_digest = metadata.pop(DIGEST, None)
    is_ours = stored_digest is not None and all(tensor.dtype in DTYPE_NAMES for tensor in tensors.values())
    entries = {name: tensor_entry(tensor) for name, tensor in tensors.items()} if is_ours else {}
    if not is_ours or _digest(entries, metadata) != stored_digest:
        message = "is damaged: its content does not match its digest"
        raise WeightsError(Problem(str(path), message, "remove it", "damaged-file"))
    return tensors, metadata


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU, and the metadata of a safetensors file.

    Raises:
        WeightsError: missing, cut off, a pickle, or not a safetensors file.
    """
    metadata = read_header(path).metadata
    try:
        return load_bytes(path.read_bytes()), metadata
    except KeyError as error:
        message = f"holds a tensor of dtype {error}, which is not read here"
        raise WeightsError(
            Problem(str(path), message, safetensors_format.PLAIN_WEIGHTS_HINT, "unsupported-dtype")
        ) from None
    except (SafetensorError, OSError) as error:
        message = f"cannot be read ({error})"
        raise WeightsError(Problem(str(path), message, "get the file again", "unreadable-file")) from None


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """Return the bytes of a tensor of any device and dtype."""
    flat = tensor.detach().contiguous().cpu()
    data = flat.reshape(-1).view(torch.uint8).numpy().data if flat.numel() else b""
    return TensorEntry(DTYPE_NAMES[flat.dtype], tuple(flat.shape), data)


def _digest(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of names, dtypes, shapes, data and metadata."""
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(entries):
        dtype, shape, data = entries[name]
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(data)
    return digest.hexdigest()
