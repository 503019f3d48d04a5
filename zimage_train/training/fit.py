"""How a run fits the devices that it meets: one plan for all its processes and for all its starts."""

import json
import os
from dataclasses import replace
from typing import Literal, get_args

from diffusers import ZImageTransformer2DModel

from zimage_train.config.schema import Config
from zimage_train.config.types import Quantization
from zimage_train.errors import ConfigError, Location, Problem, WeightsError
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.units import format_bytes
from zimage_train.models import checkpointing
from zimage_train.planning import devices, forecast, memory, planner, preflight
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.training import checkpoint, distributed
from zimage_train.training.distributed import World
from zimage_train.training.run_dir import RunDir


def plan_for_devices(checked: RunSpec, world: World, folder: RunDir) -> MemoryPlan:
    """For the smallest card of all processes, or the budget.

    What an earlier start of the run chose for `model.quantize: auto` stays: other weights would make it another run.

    Raises:
        ConfigError: the budget that is set takes less than any plan.
    """
    here = devices.device_limits(world.device)
    budget = checked.config.memory.budget_gb
    limit = distributed.all_reduce_min(world, here.limit_bytes)
    if not isinstance(budget, str):
        limit = min(limit, budget * 1e9)
    if checked.config.model.quantize == "auto":
        checked = replace(checked, config=with_quantization(checked.config, _planned_kind(folder)))
    is_gpu = world.device.type == "cuda"
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plan = forecast.plan_for(checked, replace(here, limit_bytes=limit), is_gpu, neighbours)
    if not plan.fits and not isinstance(budget, str):
        what = f"is {budget:g}, and the run takes {format_bytes(plan.peak.total)} (predicted)"
        todo = str(preflight.how_to_fit(checked, limit, is_gpu))
        raise ConfigError(Problem(Location(key="memory.budget_gb"), what, todo, "does-not-fit"))
    return plan


def _planned_kind(folder: RunDir) -> Quantization | Literal["auto"] | None:
    """How the run's frozen weights are quantised, by its newest checkpoint that can be read; auto: there is none."""
    for _, path in checkpoint.steps_in(folder.checkpoints):
        try:
            state = json.loads(read_header(path).metadata["state"])
            kind = state["identity"]["settings"]["model.quantize"]
        except (WeightsError, KeyError, ValueError, TypeError):
            continue
        if kind is None or kind in get_args(Quantization):
            return kind
    return "auto"


def plan_warnings(checked: RunSpec, plan: MemoryPlan) -> list[str]:
    """What to say aloud of a plan that may fail."""
    found = []
    if not plan.fits:
        less = preflight.how_to_fit(checked, plan.limit_bytes, plan.job.gpu)
        found.append(f"{format_bytes(plan.peak.total)} are predicted, more than the card has to give: {less}")
    host, main = memory.host_bytes(plan.job, plan.form), main_memory_bytes()
    if host > planner.HOST_SHARE * main:
        found.append(f"memory.offload takes {host / 1e9:.1f} GB of {main / 1e9:.1f} GB of main memory; it may run out")
    return found


def with_quantization(config: Config, kind: Quantization | Literal["auto"] | None) -> Config:
    """`config` with `model.quantize` decided."""
    return config.model_copy(update={"model": config.model.model_copy(update={"quantize": kind})})


def apply_recompute_plan(model: ZImageTransformer2DModel, plan: MemoryPlan, dropout: float) -> None:
    """Let each block recompute what `plan` says for the tokens of its batch."""
    if plan.mode_of(NO_LIMIT) == "none":
        model.disable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(checkpointing.checkpoint_by_tokens(plan.mode_of, preserve_rng=dropout > 0))
