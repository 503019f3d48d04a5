"""Time, memory and equality, as every part takes them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zimage_train.models.arch import TransformerShape

TINY = TransformerShape(dim=384, n_heads=3, n_kv_heads=3, n_layers=2, cap_feat_dim=256)
"""For dry runs: heads of the real size, and blocks that can be quantised and streamed."""


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def shape_of(dry: bool) -> TransformerShape:
    return TINY if dry else TransformerShape()


def milliseconds(work: Callable[[], object], device: torch.device, times: int = 8, first: int = 2) -> dict[str, float]:
    """Median, least and most of `times` runs, after `first` that are not counted; on a GPU by its own clock."""
    if device.type == "cpu":
        times, first = 2, 0
    for _ in range(first):
        work()
    taken = [_once(work, device) for _ in range(times)]
    return {
        "ms": round(statistics.median(taken), 3),
        "ms_least": round(min(taken), 3),
        "ms_most": round(max(taken), 3),
    }


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1000
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def joined(tensors: list[Tensor]) -> Tensor:
    """All of them in a single flat tensor."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def same_bits(work: Callable[[], Tensor], times: int = 4) -> bool:
    """Whether `work` gives the same bits each time."""
    first = work()
    return all(torch.equal(work(), first) for _ in range(times - 1))


def distance(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of `reference`."""
    return float((found.float() - reference.float()).norm() / reference.float().norm())


def forget_peaks() -> None:
    """Peaks that are read later begin here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, Any]:
    """Most that was allocated and reserved since `forget_peaks`; None without a GPU."""
    if not torch.cuda.is_available():
        return {"allocated_gb": None, "reserved_gb": None}
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
    }
