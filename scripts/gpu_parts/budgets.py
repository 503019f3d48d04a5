"""Plans for small cards, as the planner makes them today, each with the allocator held to its budget."""

from typing import Any

import torch

from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.measure.budgets import hold_to, run_plan
from zimage_train.measure.models import workload_of
from zimage_train.planning import planner
from zimage_train.planning.planner import PlanConstraints

from gpu_parts import measuring
from gpu_parts.parts import DRY_SIDE, Budget, pixels, split

STEPS = 5
"""Of one shape: the second is recorded as a CUDA graph, and the others are replays."""


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Whether a plan runs a few steps within its budget, and what it takes; the process has done nothing before."""
    budget = Budget.named(split(case)[0])
    device, shape = measuring.device_of(dry), measuring.shape_of(dry)
    side = pixels(DRY_SIDE) if dry else budget.side_px
    workload = workload_of(shape, side, "bf16", gpu=not dry)
    wanted = PlanConstraints((budget.kind,), None, None)
    plan = planner.choose_plan(workload, wanted, budget.gb * 1e9, main_memory_bytes(), None)
    if not dry:
        hold_to(budget.gb * 1e9)
        torch.cuda.set_stream(torch.cuda.Stream())  # as a run does
    found = run_plan(shape, plan, side, STEPS, device)
    return plan.facts() | {"fits": plan.fits} | found | ({} if dry else allocator())


def allocator() -> dict[str, Any]:
    """How often it had to give memory back and try again, and whether its segments could grow."""
    segments = torch.cuda.memory_snapshot()
    return {
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "expandable": any(segment.get("is_expandable", False) for segment in segments),
    }
