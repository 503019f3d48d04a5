"""The checks before step 1 of what was compiled and recorded for this machine.

Fused blocks run kernels that were compiled for this GPU a moment ago: their step is compared with that of diffusers'
blocks. A CUDA graph is compared with the step that it repeats. What fails is not used in this run.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from zimage_train.dataset.sample_order import Sample
from zimage_train.errors import ConfigError
from zimage_train.models import region_ops
from zimage_train.planning.planner import MemoryPlan
from zimage_train.training import distributed, run_dir
from zimage_train.training.batches import Batch, load_batch
from zimage_train.training.device_plan import other_path
from zimage_train.training.state import TrainState

LARGEST_DISTANCE = {"bf16": 0.05, "fp32": 1e-4}
"""Largest relative distance of loss and gradients; rounding alone makes about 0.003 in bf16 and 1e-6 in fp32."""


def check_blocks(state: TrainState, sample: Sample) -> MemoryPlan:
    """Compare a step on `sample` with fused blocks and with modules, and return the plan of the run.

    That is the plan of `state`, or if fused blocks fail, the same with blocks that are modules. What was found is added
    to run.json.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
        ConfigError: fused blocks fail, and the run has steps with them.
    """
    plan = state.memory_plan
    if not plan.workload.is_fused or not region_ops.has_kernels(state.world.device):
        return plan
    as_modules = replace(plan, workload=replace(plan.workload, is_fused=False))
    state.run_step.use_plan(as_modules)
    wanted = _loss_and_gradients(state, sample)
    state.run_step.use_plan(plan)
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
    if state.keeps_path:
        raise ConfigError(other_path(state.path, f"fused blocks fail here: {failure}"))
    state.console.warning(f"fused blocks are off in this run, which is slower and takes more memory: {failure}")
    state.run_step.use_plan(as_modules)
    return as_modules


def check_replay(state: TrainState, batch: Batch) -> None:
    """Compare a replay of a step on `batch` with the step; if they differ, no step of this run is replayed.

    What was found is added to run.json.
    """
    if not state.run_step.records:
        return
    failure = state.run_step.check(batch)
    if state.world.is_main:
        run_dir.add_facts(state.folder, {"captured_steps": {"failure": failure}})
    if failure is not None:
        state.console.warning(f"steps are not captured as CUDA graphs in this run, which is slower: {failure}")


def _loss_and_gradients(state: TrainState, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradients of a step on `sample`."""
    state.lora.flat.zero_grad()
    state.frozen.model.train()
    values = state.run_step(load_batch(state.config, state.dataset, (sample,)), 1.0)
    return values.clone(), state.lora.flat.grads.clone()


def _distance(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Return the larger of the relative distances of the losses and of the gradients."""
    distances = torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, wanted, strict=True)])
    return float(distances.max())  # NaN if either is
