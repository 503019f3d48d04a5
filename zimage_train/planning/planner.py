"""Choice of quantization, streaming and recomputation, so that a run fits its device in the least predicted time.

A plan follows from the total memory of device and host, never from what happens to be free. Otherwise a run that is
continued beside another program could get another plan, and with `model.quantize: auto` other frozen weights.

Quantization and streaming hold for the whole run. Recomputation is decided for each batch, by its number of tokens: a
plan has the largest number of tokens for each mode, so that small images recompute less than large images.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.types import RECOMPUTE_MODES, Quantization, RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.io.units import format_bytes
from zimage_train.planning import flops, memory
from zimage_train.planning.gpus import TYPICAL_GPU, GpuSpec
from zimage_train.planning.memory import MemoryEstimate, WeightPlacement
from zimage_train.planning.workload import Workload

NO_LIMIT = 2**31
"""Number of tokens that no batch reaches."""
MAX_SLOWDOWN = 1.25
"""A more precise placement is preferred as long as it takes at most this multiple of the fastest placement's time.

Rounding errors stay in the LoRA, while a quarter of the time is spent once; and predicted times are not exact enough to
give up precision for a smaller gain.
"""
QUANTIZATIONS_BY_ERROR: tuple[Quantization | None, ...] = (None, "int8", "fp8", "fp8_fast", "nf4")
"""The most precise first. int8 with a scale for 64 weights has a quarter of the error of fp8 at the same size."""
AUTO_QUANTIZATIONS: tuple[Quantization | None, ...] = (None, "int8", "nf4")
"""What `model.quantize: auto` chooses from; fp8 is never better than int8."""
HOST_SHARE = 0.5
"""Share of main memory that weights may take. It is pinned, so the system cannot move it to swap."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a workload runs within a memory limit."""

    workload: Workload
    placement: WeightPlacement
    limits: dict[RecomputeMode, int]
    """Largest number of tokens of a batch for each mode, the mode that recomputes least first; see `mode_of`."""
    limit_bytes: float
    fits: bool
    why: str
    """Reason for the choice, as text for the log."""
    host_limit_bytes: float = 0.0
    """Main memory that the run may fill with weights."""

    def mode_of(self, tokens: int) -> RecomputeMode:
        """Return the mode that recomputes least among those that fit a batch of `tokens`."""
        last: RecomputeMode = "full"
        for mode, max_tokens in self.limits.items():
            if tokens <= max_tokens:
                return mode
            last = mode
        return last

    def step_memory(self, size: Bucket) -> MemoryEstimate:
        """Return the memory of a step on the largest batch of `size`."""
        tokens = self.workload.tokens(size)
        return memory.step_memory(self.workload, self.placement, self.mode_of(tokens), tokens)

    @property
    def room_bytes(self) -> int:
        """Return the memory that a GPU sets aside for the activations of any step; 0 where blocks are not fused.

        Steps of all sizes use it in turn. What they allocate would otherwise be spread over the device's memory, and
        leave gaps.
        """
        if not (self.workload.gpu and self.workload.is_fused):
            return 0
        tokens = max(map(self.workload.tokens, self.workload.sizes), key=self._room_of)
        return self._room_of(tokens)

    def _room_of(self, tokens: int) -> int:
        step = memory.step_memory(self.workload, self.placement, self.mode_of(tokens), tokens)
        return step.activations + memory.gap_bytes(self.workload, tokens)

    @property
    def spare_host_bytes(self) -> float:
        """Return the main memory that streamed blocks leave for weights that wait for previews."""
        return max(self.host_limit_bytes - memory.host_bytes(self.workload, self.placement), 0.0)

    @property
    def keeps_original_weights(self) -> bool:
        """Return whether the original weights stay in main memory between previews, so that no file is read again."""
        return memory.model_bytes(self.workload, self.placement.quantization) <= self.spare_host_bytes

    @property
    def previews_fit_beside(self) -> bool:
        """Return whether previews and validations fit beside the room of steps."""
        preview = memory.preview_memory(self.workload, self.placement)
        return preview.total + self.room_bytes <= self.limit_bytes

    def step_seconds(self, size: Bucket, card: GpuSpec) -> float:
        """Return the seconds of a step on the largest batch of `size`."""
        mode = self.mode_of(self.workload.tokens(size))
        return flops.step_seconds(self.workload, self.placement, mode, size, card)

    @property
    def peak(self) -> MemoryEstimate:
        """Return the memory of whatever takes most on the device: a step, a preview or a validation."""
        estimates = [self.step_memory(size) for size in self.workload.sizes]
        estimates.append(memory.preview_memory(self.workload, self.placement))
        return max(estimates, key=lambda estimate: estimate.total)

    def facts(self) -> dict[str, Any]:
        """Return the entries of the plan in run.json."""
        recomputes: dict[str, int | str] = {}
        for mode, max_tokens in self.limits.items():
            recomputes[mode] = "all" if max_tokens == NO_LIMIT else max_tokens
        return {
            "kind": self.placement.quantization,
            "streamed": self.placement.streamed,
            "recomputes": recomputes,
            "predicted_gb": round(self.peak.total / 1e9, 3),
            "why": self.why,
        }


@dataclass(frozen=True)
class PlanConstraints:
    """The choices that a config leaves to the planner."""

    quantizations: tuple[Quantization | None, ...]
    mode: RecomputeMode | None
    """None: the planner chooses."""
    streamed: int | None
    """Number of streamed blocks; None: the planner chooses."""


def plan_constraints(config: Config, layers: int) -> PlanConstraints:
    """Return the constraints that `config` sets, for a transformer of `layers` blocks."""
    quantize, offload = config.model.quantize, config.memory.offload
    streamed = None
    if not isinstance(offload, str):
        # Rounded up, so that no more stays on the device than asked for. Less 1e-9, because 7/30 of 30 blocks may come
        # out slightly above 7, which would become 8.
        streamed = math.ceil(offload * layers - 1e-9)
    return PlanConstraints(
        quantizations=AUTO_QUANTIZATIONS if quantize == "auto" else (quantize,),
        mode=config.memory.mode,
        streamed=streamed,
    )


def choose_plan(
    workload: Workload, constraints: PlanConstraints, limit_bytes: float, host_bytes: float, card: GpuSpec | None
) -> MemoryPlan:
    """Return the best plan by which `workload` fits `limit_bytes`, or the plan that takes least memory if none fits.

    `host_bytes` is the main memory for this process. Without a `card`, times are compared on a typical card.

    Full precision is taken wherever it fits without streaming. Otherwise the most precise placement is taken whose time
    is at most `MAX_SLOWDOWN` times that of the fastest.
    """
    placements = _allowed_placements(workload, constraints, host_bytes)
    plans = []
    for placement in placements:
        plan = _make_plan(workload, placement, constraints.mode, limit_bytes)
        plans.append(replace(plan, host_limit_bytes=HOST_SHARE * host_bytes))
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak.total)
    for plan in fitting:
        # Quantization costs precision, and streaming may cost time that the prediction does not see. So neither is
        # chosen where nothing requires it, even if recomputing less would be predicted to be faster.
        if plan.placement == WeightPlacement():
            return plan

    seconds = {plan.placement: _mean_seconds(plan, card or TYPICAL_GPU) for plan in fitting}
    slowest_allowed = min(seconds.values()) * MAX_SLOWDOWN
    fast_enough = [plan for plan in fitting if seconds[plan.placement] <= slowest_allowed]

    def preference(plan: MemoryPlan) -> tuple[int, float, int]:
        placement = plan.placement
        return QUANTIZATIONS_BY_ERROR.index(placement.quantization), seconds[placement], placement.streamed

    best = min(fast_enough, key=preference)
    if len(constraints.quantizations) == 1 or constraints.streamed is not None:
        return best
    return replace(best, why=f"{best.why}; {_reason_for_precision(best, seconds)}")


def _reason_for_precision(best: MemoryPlan, seconds: dict[WeightPlacement, float]) -> str:
    """Return the reason for the quantization of `best`, or for none; `seconds` holds the time of each fitting plan."""
    if best.placement.quantization is None:
        return "streaming in full precision costs little"
    full_precision = [seconds[placement] for placement in seconds if placement.quantization is None]
    if not full_precision:
        return "full precision does not fit"
    slowdown = min(full_precision) / seconds[best.placement]
    return f"full precision would take {slowdown:.1f} times as long"


def _allowed_placements(workload: Workload, constraints: PlanConstraints, host_bytes: float) -> list[WeightPlacement]:
    """Return every placement that the constraints allow and that fits main memory, or all if none fits it."""
    # Mode `none` excludes streaming: autograd would keep references to weights in a slot, which holds another block by
    # the time of the backward.
    may_stream = constraints.streamed is None and constraints.mode != "none"
    counts = range(workload.shape.n_layers + 1) if may_stream else [constraints.streamed or 0]
    placements: list[WeightPlacement] = []
    within_host: list[WeightPlacement] = []
    for quantization in constraints.quantizations:
        for streamed in counts:
            placement = WeightPlacement(quantization, streamed)
            placements.append(placement)
            if streamed == 0 or memory.host_bytes(workload, placement) <= HOST_SHARE * host_bytes:
                within_host.append(placement)
    # A number of blocks that the config sets is kept even if main memory is small; the run then warns.
    return within_host or placements


def _make_plan(
    workload: Workload, placement: WeightPlacement, mode: RecomputeMode | None, limit_bytes: float
) -> MemoryPlan:
    if mode is not None:
        modes: tuple[RecomputeMode, ...] = (mode,)
    elif placement.streamed:
        modes = RECOMPUTE_MODES[1:]  # all but `none`; see `_allowed_placements`
    else:
        modes = RECOMPUTE_MODES
    limits: dict[RecomputeMode, int] = {}
    for allowed in modes:
        limits[allowed] = memory.max_tokens_within(workload, placement, allowed, limit_bytes)
    last = modes[-1]
    fits_steps = workload.max_tokens <= limits[last]
    fits_previews = memory.preview_memory(workload, placement).total <= limit_bytes
    # The last mode takes every batch that is left, so that each batch has a mode even where the plan does not fit: the
    # prediction may be too high, and a batch that really does not fit is found by the dry run.
    limits[last] = NO_LIMIT
    why = "set in the config" if mode is not None else f"by what fits {format_bytes(limit_bytes)}"
    return MemoryPlan(workload, placement, limits, limit_bytes, fits_steps and fits_previews, why)


def _mean_seconds(plan: MemoryPlan, card: GpuSpec) -> float:
    """Return the seconds of a step, averaged over the batches of an epoch."""
    return math.fsum(share * plan.step_seconds(size, card) for size, share in plan.workload.shares().items())
