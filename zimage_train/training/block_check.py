"""The check before step 1 that fused blocks compute on this machine what diffusers' blocks compute.

Fused blocks run kernels that were compiled for this GPU a moment ago. If one of them fails, or differs by more than
rounding, the run uses diffusers' blocks.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from zimage_train.dataset.sample_order import Sample
from zimage_train.models import region_ops
from zimage_train.planning.planner import MemoryPlan
from zimage_train.training import distributed, run_dir
from zimage_train.training.device_plan import apply_recompute_plan
from zimage_train.training.loss import load_batch, losses
from zimage_train.training.state import TrainState

LARGEST_DISTANCE = {"bf16": 0.05, "fp32": 1e-4}
"""Largest relative distance of loss and gradients; rounding alone makes about 0.003 in bf16 and 1e-6 in fp32."""


def check_blocks(state: TrainState, sample: Sample) -> MemoryPlan:
    """Compare a step on `sample` with fused blocks and with modules, and return the plan of the run.

    That is the plan of `state`, or if fused blocks fail, the same with blocks that are modules. What was found is added
    to run.json.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
    """
    plan, dropout = state.memory_plan, state.config.lora.dropout
    if not plan.workload.is_fused or not region_ops.has_kernels(state.world.device):
        return plan
    as_modules = replace(plan, workload=replace(plan.workload, is_fused=False))
    apply_recompute_plan(state.frozen, state.lora, as_modules, dropout)
    wanted = _loss_and_gradients(state, sample)
    apply_recompute_plan(state.frozen, state.lora, plan, dropout)
    try:
        distance = _distance(_loss_and_gradients(state, sample), wanted)
        failure = None
        if not distance <= LARGEST_DISTANCE[state.config.model.dtype]:  # also if it is not a number
            failure = f"they differ from diffusers' blocks by {distance:.2g}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a kernel may fail in any way, and the run can do without it
        first_line = str(error).partition("\n")[0]
        distance, failure = math.nan, f"{type(error).__name__}: {first_line[:160]}"
    state.lora.flat.zero_grad()
    # All processes take the same way, so that their gradients are of the same arithmetic.
    all_agree = distributed.all_reduce_min(state.world, float(failure is None)) == 1.0
    if not all_agree and failure is None:
        failure = "they fail in another process"
    if state.world.is_main:
        known = distance if math.isfinite(distance) else None  # JSON has no NaN
        run_dir.add_facts(state.folder, {"fused_blocks": {"distance": known, "failure": failure}})
    if failure is None:
        return plan
    state.console.warning(f"fused blocks are off in this run, which is slower and takes more memory: {failure}")
    apply_recompute_plan(state.frozen, state.lora, as_modules, dropout)
    return as_modules


def _loss_and_gradients(state: TrainState, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradients of a step on `sample`."""
    state.lora.flat.zero_grad()
    model = state.frozen.model.train()
    batch = load_batch(state.config, state.dataset, (sample,)).to(state.world.device, model.dtype)
    values = []
    for loss in losses(model, batch, state.config):
        loss.objective.backward()
        values.append(loss.plain)
    return torch.stack(values), state.lora.flat.grads.clone()


def _distance(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Return the larger of the relative distances of the losses and of the gradients."""
    distances = torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, wanted, strict=True)])
    return float(distances.max())  # NaN if either is
