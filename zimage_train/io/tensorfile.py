"""Tensors to and from safetensors files, with a digest inside the file that its content must meet."""

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
"""Safetensors' name of a dtype -> the dtype, for those that are written here."""
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
TORCH_DTYPES = {precision: STORED_DTYPES[name] for precision, name in PRECISIONS.items()}
"""The dtypes that a config can name: `bf16` and `fp32`."""
DIGEST = "sha256"


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata`; equal inputs give equal bytes.

    Raises:
        DiskError: the file cannot be written; an older one is still there.
    """
    safetensors_format.write_safetensors(
        path, {name: tensor_entry(tensor) for name, tensor in tensors.items()}, metadata
    )


def save_with_digest(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Like `save`, with a digest of everything, so that `load_sealed` notices any changed bit."""
    entries = {name: tensor_entry(tensor) for name, tensor in tensors.items()}
    safetensors_format.write_safetensors(path, entries, {**metadata, DIGEST: _digest(entries, metadata)})


def load_with_digest(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_sealed` wrote, and check all of it.

    Raises:
        WeightsError: missing, damaged, or not sealed.
    """
    tensors, metadata = load(path)
    expected = metadata.pop(DIGEST, None)
    if expected is None or _digest({name: tensor_entry(t) for name, t in tensors.items()}, metadata) != expected:
        raise WeightsError(Problem(str(path), "is damaged: its content does not meet its digest", "remove it"))
    return tensors, metadata


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor and the metadata of a safetensors file.

    Raises:
        WeightsError: missing, cut off, a pickle, or not a safetensors file.
    """
    metadata = read_header(path).metadata
    try:
        return load_bytes(path.read_bytes()), metadata
    except (SafetensorError, OSError) as error:
        raise WeightsError(Problem(str(path), f"cannot be read ({error})", "get the file again")) from None


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """The bytes of a tensor, whatever its device and type."""
    flat = tensor.detach().contiguous().cpu()
    data = flat.reshape(-1).view(torch.uint8).numpy().data if flat.numel() else b""
    return TensorEntry(DTYPE_NAMES[flat.dtype], tuple(flat.shape), data)


def _digest(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(entries):
        dtype, shape, data = entries[name]
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(data)
    return digest.hexdigest()
