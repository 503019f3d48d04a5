"""Summary of a LoRA file: layout, ranks, scales, and how much each module changes."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import headers, keys, lora_file, qkv, readers, targets
from zimage_train.lora.deltas import Delta, Dora, Factors, Hadamard, Kronecker, Rotation
from zimage_train.lora.lora_file import Changes
from zimage_train.lora.readers import LoraTraits


@dataclass(frozen=True)
class LoraSummary:
    """The properties of a LoRA file."""

    layout: str
    readers: list[str]
    """The programs that load it as it is; see `readers`."""
    scales_from: str
    """Where alpha / rank stands."""
    dtypes: Counter[str]
    ranks: Counter[str]
    """Rank of a LoRA, or kind and size of another adapter -> number of modules."""
    scales: Counter[float]
    """alpha / rank -> number of modules."""
    groups: dict[str, int]
    """Target group -> number of modules."""
    norms: dict[str, float]
    """Module -> Frobenius norm of its delta; of an OFT, of how far it turns."""
    metadata: dict[str, str]


def summarize_lora(path: Path) -> LoraSummary:
    """Return the properties of the LoRA at `path`.

    Raises:
        WeightsError: it is not a LoRA that this trainer reads; the message names what it is instead.
    """
    content = lora_file.read_changes(path)
    deltas = lora_file.read_deltas(path, headers.READ)
    header = read_header(path)
    name = keys.layout_name(header.tensors)
    return LoraSummary(
        layout=keys.layout_of(header.tensors),
        readers=readers.readers_of(name, traits_of(content.changes, header.tensors, content.scale_in)) if name else [],
        scales_from=content.scales_from,
        dtypes=Counter(info.dtype for key, info in header.tensors.items() if not key.endswith(".alpha")),
        ranks=Counter(map(_size, deltas.values())),
        scales=Counter(round(qkv.scale_of(change), 6) for change in content.changes.values()),
        groups=targets.count_by_group(deltas),
        norms={module: delta.norm() for module, delta in deltas.items()},
        metadata=header.metadata,
    )


def traits_of(changes: Changes, keys_of_file: Iterable[str], scale_in: frozenset[str]) -> LoraTraits:
    """Return what decides which program reads a file with these changes and keys, and scales in these places."""
    return LoraTraits(
        kinds=frozenset(str(lora_file.kind_of(change)) for change in changes.values()),
        alpha_is_rank=all(math.isclose(qkv.scale_of(change), 1.0, rel_tol=1e-6) for change in changes.values()),
        has_alpha_tensors=any(key.endswith(".alpha") for key in keys_of_file),
        scale_in=scale_in,
        is_uniform=len({qkv.rank_of(change) for change in changes.values()}) == 1,
        modules=frozenset(changes),
    )


def _size(delta: Delta) -> str:
    if isinstance(delta, Kronecker):
        rows, columns = delta.w1[0].shape[0], delta.w1[-1].shape[1]
        return f"LoKr {rows}x{columns}" + (f" of rank {delta.rank}" if delta.rank else "")
    if isinstance(delta, Dora):
        return f"DoRA {delta.factors.rank}"
    if isinstance(delta, Hadamard):
        return f"LoHa {delta.rank}"
    if isinstance(delta, Rotation):
        return f"OFT {delta.blocks.shape[1]}"
    assert isinstance(delta, Factors)
    return str(delta.rank)
