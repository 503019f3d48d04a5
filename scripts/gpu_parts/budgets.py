"""Plans for small cards, as the planner makes them today, each with the allocator held to its budget."""

from typing import Any

import torch

from zimage_train.measure.budgets import BudgetCase, run_budget

from gpu_parts import measuring
from gpu_parts.parts import DRY_SIDE, Budget, pixels, split

STEPS = 5
"""Of one shape: the second is recorded as a CUDA graph, and the others are replays."""


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Whether a plan runs a few steps within its budget, and what it takes; the process has done nothing before."""
    budget = Budget.named(split(case)[0])
    device, shape = measuring.device_of(dry), measuring.shape_of(dry)
    side = pixels(DRY_SIDE) if dry else budget.side_px
    measured = BudgetCase(shape, "bf16", side, budget.kind, budget.gb * 1e9, STEPS)
    plan, found = measured.plan(device), run_budget(measured, device)
    return plan.facts() | {"fits": plan.fits} | found | ({} if dry else allocator())


def allocator() -> dict[str, Any]:
    """How often it had to give memory back and try again, and whether its segments could grow."""
    segments = torch.cuda.memory_snapshot()
    return {
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "expandable": any(segment.get("is_expandable", False) for segment in segments),
    }
