"""Steps of a run within a memory budget: whether they fit, what they take, and how long they last."""

from typing import Any

import torch

from zimage_train.measure.models import random_batch
from zimage_train.measure.speed import CAPTION_TOKENS, our_step, peak_memory, seconds_of
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import devices
from zimage_train.planning.memory import CONTEXT_BYTES
from zimage_train.planning.planner import MemoryPlan


def hold_to(budget_bytes: float) -> None:
    """Let torch's allocator have what a card of that size would leave it, from now on."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min((budget_bytes - CONTEXT_BYTES) / total, 1.0))


def run_plan(shape: TransformerShape, plan: MemoryPlan, side: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Train a few steps by `plan` on images of `side` px; running out of memory is a result as well.

    Return the `step_seconds` of each step, the last loss, and on a GPU the peaks.
    """
    dtype = torch.bfloat16 if plan.workload.dtype == "bf16" else torch.float32
    found: dict[str, Any] = {"ran": True}
    seconds: list[float] = []
    with devices.reproducible(device), peak_memory(device) as peaks:
        try:
            step = our_step(shape, plan, device)
            batch = random_batch(shape, dtype, side, side, CAPTION_TOKENS)
            for _ in range(steps):
                seconds.append(round(seconds_of(lambda: found.update(loss=step(batch)), device), 4))
        except torch.OutOfMemoryError as error:
            found |= {"ran": False, "error": str(error).partition(" If reserved")[0]}
    return found | {"step_seconds": seconds} | {f"{name}_gb": value for name, value in peaks.items()}
