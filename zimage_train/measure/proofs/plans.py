"""The memory of a step by each plan that the device allows, predicted and measured."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from zimage_train.config.types import Quantization
from zimage_train.errors import ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json
from zimage_train.measure import budgets
from zimage_train.measure.budgets import BudgetCase
from zimage_train.measure.proofs.claims import Claim
from zimage_train.measure.proofs.processes import run
from zimage_train.measure.proofs.subject import Subject
from zimage_train.measure.speed import plan_without_limits
from zimage_train.planning import memory
from zimage_train.planning.memory import CONTEXT_BYTES
from zimage_train.planning.planner import MemoryPlan
from zimage_train.report.console import Console

BUDGETS_GB = (24, 16, 12, 8)
KINDS: tuple[Quantization | None, ...] = (None, "int8", "nf4")
MINIATURE_SHARES = (1.0, 0.9)
"""Budgets of the miniature, of what its largest step takes: everything stays on the device, and blocks are streamed."""
STEPS = 4
"""The second of a shape is recorded as a CUDA graph, and the others are replays."""
PREDICTED_WITHIN = 1.05
"""Bytes are predicted within 5 % (docs/memory.md)."""


@dataclass(frozen=True)
class Budget:
    label: str
    num_bytes: float


def memory_claims(subject: Subject) -> Iterator[Claim]:
    """Yield, for each budget, size and quantisation, whether a step fits, and its peak relative to the prediction."""
    for side in subject.sides:
        for budget in budgets_of(subject, side):
            for kind in KINDS[:1] if subject.is_quick else KINDS:
                case = BudgetCase(subject.shape, subject.dtype, side, kind, budget.num_bytes, STEPS)
                yield from plan_claims(subject, case, budget)


def budgets_of(subject: Subject, side: int) -> list[Budget]:
    """Return the whole device, and the usual sizes of cards that are smaller."""
    if subject.device.type != "cuda":
        whole = plan_without_limits(subject.shape, side, subject.dtype, gpu=False)
        return [Budget(f"{share:.0%} of a whole step's memory", share * whole.peak.total) for share in MINIATURE_SHARES]
    own = Budget("this card", subject.device_bytes)
    if subject.is_quick or subject.is_miniature:
        return [own]
    return [own, *(Budget(f"{size} GB", size * 1e9) for size in BUDGETS_GB if size * 1e9 < own.num_bytes)]


def plan_claims(subject: Subject, case: BudgetCase, budget: Budget) -> Iterator[Claim]:
    """Yield the claims on the plan of a case."""
    plan = case.plan(subject.device)
    name = f"{budget.label}, {case.side} px, {case.quantization or case.dtype}"
    found = run_once(subject, case)
    fits, note = f"a step fits its budget ({name})", describe(plan)
    predicted_gb = predicted_bytes(plan) / 1e9
    measured = {key: value for key, value in found.items() if key in ("allocated_gb", "reserved_gb")}
    facts = {
        "budget_gb": round(case.budget_bytes / 1e9, 3),
        "side": case.side,
        "quantization": case.quantization,
        "streamed": plan.placement.streamed,
        "predicted_gb": round(predicted_gb, 6),
        **measured,
    }
    if "failure" in found:
        yield Claim(fits, 1, "errors", 0, "forecast", found["failure"], facts=facts)
        return
    if not found["ran"]:
        # A plan that says that nothing fits keeps its word.
        yield Claim(fits, float(plan.fits), "runs out of memory", 0, "forecast", note, facts=facts)
        return
    if plan.fits and subject.device.type == "cuda":
        share = (found["reserved_gb"] * 1e9 + CONTEXT_BYTES) / case.budget_bytes
        yield Claim(fits, share, "of the budget", 1.0, "forecast", note, facts=facts)
    ratio = found["allocated_gb"] / predicted_gb
    promise = f"the peak is at most what was predicted ({name})"
    note = f"{found['allocated_gb']:.3g} GB allocated, {predicted_gb:.3g} GB predicted; {note}"
    bound = PREDICTED_WITHIN if subject.is_forecast else None
    yield Claim(promise, ratio, "times", bound, "forecast", note, facts=facts)


def run_once(subject: Subject, case: BudgetCase) -> dict[str, Any]:
    """Return the results of a case, or its `failure`; those that are there from an interrupted start are kept."""
    name = hashlib.sha256(budgets.as_argument(case).encode()).hexdigest()[:16]
    path = subject.work / "cases" / f"{name}.json"
    if path.exists():
        return parse_json(path.read_bytes())
    try:
        found = run_apart(case) if subject.device.type == "cuda" else budgets.run_budget(case, subject.device)
    except ZImageTrainError as error:
        Console(is_main=True).warning(str(error))  # the proof has its code alone, since messages name paths
        return {"failure": error.problems[0].code}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, found)
    return found


def run_apart(case: BudgetCase) -> dict[str, Any]:
    """Return the results of `run_budget` in a process of its own, whose allocator nothing else has used."""
    output = run([sys.executable, "-m", "zimage_train.measure.budgets", budgets.as_argument(case)])
    return json.loads(output.strip().splitlines()[-1])


def predicted_bytes(plan: MemoryPlan) -> float:
    """Return the predicted peak of a step; without a GPU, streamed blocks are on the same device as all others."""
    workload = plan.workload
    size = max(workload.sizes, key=workload.tokens)
    streamed = 0 if workload.gpu else memory.host_bytes(workload, plan.placement)
    return plan.step_memory(size).allocated + streamed


def describe(plan: MemoryPlan) -> str:
    """Return the placement of the weights and what is recomputed."""
    placement = asdict(plan.placement)
    streamed = f"{placement['streamed']} of {plan.workload.shape.n_layers} blocks streamed, "
    return f"{streamed if placement['streamed'] else ''}recomputed: {plan.mode_of(plan.workload.max_tokens)}"
