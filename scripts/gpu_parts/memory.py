"""Plans for small cards, each with the allocator held to its budget."""

from typing import Any

import torch

from zimage_train.measure.models import workload_of
from zimage_train.planning import devices
from zimage_train.planning.memory import CONTEXT_BYTES, WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan

import bench
from gpu_parts import measuring
from gpu_parts.parts import PLANS, Budgeted, split

STEPS = 3


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Whether a plan runs a few steps within its budget, and what it takes; the process has done nothing before."""
    planned = PLANS[split(case)[0]]
    device = measuring.device_of(dry)
    if not dry:
        hold_to(planned.budget_gb * 1e9)
    found: dict[str, Any] = {"ran": True}
    try:
        with devices.reproducible(device):
            found |= trained(planned, device, dry)
    except torch.OutOfMemoryError as error:
        found |= {"ran": False, "why": str(error).partition(" If reserved")[0]}
    return found | measuring.peaks() | ({} if dry else allocator())


def trained(planned: Budgeted, device: torch.device, dry: bool) -> dict[str, Any]:
    """Seconds of each step, and the loss of the last."""
    shape = measuring.shape_of(dry)
    side = 64 if dry else planned.side_px
    workload = workload_of(shape, side, "bf16", gpu=not dry)
    placement = WeightPlacement(planned.kind, min(planned.streamed, shape.n_layers))
    plan = MemoryPlan(workload, placement, {planned.mode: NO_LIMIT}, planned.budget_gb * 1e9, True, "as planned before")
    took = bench.train(shape, plan, side, STEPS, device)
    return {"step_seconds": took["seconds"], "loss": took["loss"]}


def hold_to(budget_bytes: float) -> None:
    """Let torch have what a card of that size would leave it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min((budget_bytes - CONTEXT_BYTES) / total, 1.0))


def allocator() -> dict[str, Any]:
    """How often it had to give memory back and try again, and whether its segments could grow."""
    segments = torch.cuda.memory_snapshot()
    return {
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "expandable": any(segment.get("is_expandable", False) for segment in segments),
    }
