"""The memory plan of a process on its device: the same for the same devices on resume."""

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from zimage_train.config.types import AttentionName, Quantization
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.errors import ConfigError, Location, Problem, WeightsError
from zimage_train.io.json_text import parse_json
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.units import format_bytes
from zimage_train.lora import fused_block
from zimage_train.lora.layers import AdapterLayers
from zimage_train.models import checkpointing, region_ops
from zimage_train.planning import devices, forecast, memory, planner, preflight
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.training import checkpoint, distributed
from zimage_train.training.distributed import World
from zimage_train.training.run_dir import RunDir

BlockPath = Literal["triton", "plain", "modules"]
"""What computes the blocks of a step: Triton's kernels, the same written in plain torch, or diffusers' modules. Each
rounds in its own places, so a run is continued with that which it began with."""


def plan_for_devices(
    spec: RunSpec, world: World, folder: RunDir, allow: Collection[str] = ()
) -> tuple[RunSpec, MemoryPlan]:
    """Return `spec` with the quantization of the plan, and the plan for the card of this process.

    Rounding must be the same in all processes, so quantization, and whether blocks are fused, follow from the
    smallest card. Streaming and recomputation change no bit, so each process has its own. A budget lowers the limits.
    What an earlier start of the run chose for `model.quantize: auto` stays, since other frozen weights would make it
    another run; and so does what computed its blocks, unless `path` is in `allow`.

    Raises:
        ConfigError: every plan takes more than `memory.budget_gb`.
    """
    limits = devices.device_limits(world.device)
    budget = spec.config.memory.budget_gb
    own_bytes = float(limits.limit_bytes)
    if not isinstance(budget, str):
        own_bytes = min(own_bytes, budget * 1e9)
    limit_bytes = distributed.all_reduce_min(world, own_bytes)
    earlier = _newest_checkpoint(folder)
    if spec.config.model.quantize == "auto":
        spec = _with_quantization(spec, _planned_quantization(earlier))
    is_gpu = world.device.type == "cuda"
    has_kernels = not is_gpu or region_ops.has_kernels(world.device)
    may_fuse = distributed.all_reduce_min(world, float(has_kernels)) == 1.0
    before = None if "path" in allow else earlier.get("path")
    if isinstance(before, str) and before.startswith(f"modules on {world.device.type}"):
        may_fuse = False
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plan = forecast.plan_for(spec, replace(limits, limit_bytes=limit_bytes), is_gpu, processes_here, may_fuse)
    if not plan.fits and not isinstance(budget, str):
        what = f"is {budget:g}, and the run takes {format_bytes(plan.peak.total)} (predicted)"
        todo = str(preflight.how_to_fit(spec, limit_bytes, is_gpu))
        raise ConfigError(Problem(Location(key="memory.budget_gb"), what, todo, "does-not-fit"))
    # The card and the main memory of each machine count too, so the main process decides for all.
    quantization, is_fused = distributed.of_main((plan.placement.quantization, plan.workload.is_fused))
    spec = _with_quantization(spec, quantization)
    if world.world_size > 1:
        own_limits = replace(limits, limit_bytes=own_bytes)
        plan = forecast.plan_for(spec, own_limits, is_gpu, processes_here, is_fused)
    return spec, plan


def _with_quantization(spec: RunSpec, quantization: Quantization | Literal["auto"] | None) -> RunSpec:
    config = spec.config
    model = config.model.model_copy(update={"quantize": quantization})
    return replace(spec, config=config.model_copy(update={"model": model}))


def _newest_checkpoint(folder: RunDir) -> dict[str, Any]:
    """Return what the newest readable checkpoint says of its run, or an empty dict if there is none."""
    for _, path in checkpoint.steps_in(folder.checkpoints):
        try:
            # The header alone: reading and checking the tensors is left to `checkpoint.load_newest`.
            state = parse_json(read_header(path).metadata["state"])
        except (WeightsError, KeyError, ValueError, TypeError):
            continue
        if isinstance(state, dict):
            return state
    return {}


def _planned_quantization(earlier: dict[str, Any]) -> Quantization | Literal["auto"] | None:
    """Return the quantization of an earlier checkpoint, or "auto" if it names none."""
    try:
        kind = earlier["identity"]["settings"]["model.quantize"]
    except (KeyError, TypeError):
        return "auto"
    return kind if kind is None or kind in get_args(Quantization) else "auto"


def block_path(plan: MemoryPlan, device: torch.device, attention: AttentionName) -> str:
    """Return what computes the blocks of a step on `device`: a `BlockPath`, the kind of device, and its attention."""
    path: BlockPath = "plain"
    if not plan.workload.is_fused:
        path = "modules"
    elif region_ops.has_kernels(device):
        path = "triton"
    return f"{path} on {device.type}" if attention == "sdpa" else f"{path} on {device.type} with {attention}"


def other_path(before: str, reason: str) -> Problem:
    """Return the problem of a run whose blocks were computed by `before` and cannot be any more."""
    what = f"the run began with blocks computed by {before}, and {reason}; the same steps would have other bits"
    todo = "continue on a machine like the first, go on with other rounding: --allow path, or begin again with --fresh"
    return Problem("path", what, todo, "other-path")


def plan_warnings(spec: RunSpec, plan: MemoryPlan) -> list[str]:
    """Return a warning for each way in which the plan may run out of memory."""
    warnings = []
    if not plan.fits:
        changes = preflight.how_to_fit(spec, plan.limit_bytes, plan.workload.gpu)
        warnings.append(f"{format_bytes(plan.peak.total)} are predicted, more than the card has to give: {changes}")
    streamed_bytes, main_bytes = memory.host_bytes(plan.workload, plan.placement), main_memory_bytes()
    if streamed_bytes > planner.HOST_SHARE * main_bytes:
        share = f"{streamed_bytes / 1e9:.1f} GB of {main_bytes / 1e9:.1f} GB"
        warnings.append(f"memory.offload takes {share} of main memory; it may run out")
    return warnings


def apply_recompute_plan(frozen: FrozenTransformer, lora: AdapterLayers, plan: MemoryPlan, draws_masks: bool) -> None:
    """Set up the blocks for training: fused where that is faster, in the mode that `plan` has for a batch's tokens."""
    # With dropout, the recomputed forward has to draw the same masks as the first.
    unfused = checkpointing.checkpoint_by_tokens(plan.mode_of, preserve_rng=draws_masks)
    if not plan.workload.is_fused:
        frozen.model.enable_gradient_checkpointing(unfused)
        return
    fused_block.fuse_blocks(frozen.model, lora, frozen.offloader, plan.mode_of, unfused)
