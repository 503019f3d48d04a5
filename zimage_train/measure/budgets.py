"""Steps of a run within a memory budget: whether they fit, what they take, and how long they last.

As a program, so that a case has an allocator of its own: the argument is a `BudgetCase` as JSON, and the last line of
the output what `run_budget` returned.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from zimage_train.config.types import Quantization
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.measure.counting import LiveBytes
from zimage_train.measure.models import random_batch, workload_of
from zimage_train.measure.speed import CAPTION_TOKENS, our_step, peak_memory, seconds_of
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import devices, planner
from zimage_train.planning.memory import CONTEXT_BYTES
from zimage_train.planning.planner import MemoryPlan, PlanConstraints


@dataclass(frozen=True)
class BudgetCase:
    """A memory budget, and the steps that are planned for it."""

    shape: TransformerShape
    dtype: str
    side: int
    """Width and height of the image, px."""
    quantization: Quantization | None
    budget_bytes: float
    steps: int

    def plan(self, device: torch.device) -> MemoryPlan:
        """Return what the planner chooses for the budget on a device of this kind."""
        workload = workload_of(self.shape, self.side, self.dtype, device.type == "cuda")
        wanted = PlanConstraints((self.quantization,), None, None)
        return planner.choose_plan(workload, wanted, self.budget_bytes, main_memory_bytes(), None)


def run_budget(case: BudgetCase, device: torch.device) -> dict[str, Any]:
    """Train a few steps within a budget, to which this process is held from now on; return `run_plan`'s results."""
    plan = case.plan(device)
    if device.type == "cuda":
        hold_to(case.budget_bytes)
        torch.cuda.set_stream(torch.cuda.Stream())  # as a run does
    return run_plan(case.shape, plan, case.side, case.steps, device)


def hold_to(budget_bytes: float) -> None:
    """Let torch's allocator have what a card of that size would leave it, from now on."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min((budget_bytes - CONTEXT_BYTES) / total, 1.0))


def run_plan(shape: TransformerShape, plan: MemoryPlan, side: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Train a few steps by `plan` on images of `side` px; running out of memory is a result as well.

    Return the `step_seconds` of each step, the last loss, and the peaks; without a GPU the peak is that of all tensors
    that are alive, which slows the steps.
    """
    dtype = torch.bfloat16 if plan.workload.dtype == "bf16" else torch.float32
    found: dict[str, Any] = {"ran": True}
    seconds: list[float] = []
    with devices.reproducible(device), _peaks(device) as peaks:
        try:
            step = our_step(shape, plan, device)
            batch = random_batch(shape, dtype, side, side, CAPTION_TOKENS)
            for _ in range(steps):
                seconds.append(round(seconds_of(lambda: found.update(loss=step(batch)), device), 4))
        except torch.OutOfMemoryError as error:
            found |= {"ran": False, "error": str(error).partition(" If reserved")[0]}
    return found | {"step_seconds": seconds} | {f"{name}_gb": value for name, value in peaks.items()}


@contextmanager
def _peaks(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill the dict with the peaks of memory within the block, GB."""
    if device.type == "cuda":
        with peak_memory(device) as peaks:
            yield peaks
        return
    counted: dict[str, float] = {}
    with LiveBytes() as live:
        yield counted
    counted["allocated"] = round(live.peak / 1e9, 6)


def as_argument(case: BudgetCase) -> str:
    """Return `case` as the argument of this program."""
    return json.dumps(asdict(case))


def main(argument: str) -> None:
    """Print the results of the `BudgetCase` that `argument` is the JSON of."""
    case = TypeAdapter(BudgetCase).validate_json(argument)
    print(json.dumps(run_budget(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))))


if __name__ == "__main__":
    main(sys.argv[1])
