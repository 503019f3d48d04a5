"""How a run fits a card: precision, recomputation and streaming, chosen by what is predicted to take least time.

A plan comes from totals, never from what happens to be free, so that the same run plans the same every time. What a
batch recomputes is decided by its number of tokens when it comes; the planner says which numbers fit how.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.types import RECOMPUTE_MODES, Quantization, RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.io.units import format_bytes
from zimage_train.planning import flops, memory
from zimage_train.planning.gpus import TYPICAL_GPU, GpuSpec
from zimage_train.planning.memory import MemoryEstimate, SettingChange, WeightPlacement, Workload

NO_LIMIT = 2**31
"""Tokens; more than any batch has."""
MAX_SLOWDOWN = 1.25
"""A more precise form is taken when it costs at most this much of the fastest one's time."""
QUANTIZATIONS_BY_ERROR: tuple[Quantization | None, ...] = (None, "int8", "fp8", "nf4")
"""Best first. int8 with a scale for 64 weights has a quarter of the error of fp8 at the same size."""
AUTO_QUANTIZATIONS: tuple[Quantization | None, ...] = (None, "int8", "nf4")
HOST_SHARE = 0.5
"""Of main memory, what streamed blocks may take."""


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided, for a job and a limit."""

    job: Workload
    form: WeightPlacement
    limits: dict[RecomputeMode, int]
    """The most tokens of a batch for which each mode is taken, lightest first."""
    limit_bytes: float
    fits: bool
    why: str

    def mode_of(self, tokens: int) -> RecomputeMode:
        """What a batch of `tokens` recomputes: the least that fits."""
        last: RecomputeMode = "full"
        for mode, most in self.limits.items():
            if tokens <= most:
                return mode
            last = mode
        return last

    def step(self, size: Bucket) -> MemoryEstimate:
        """The memory of the largest batch of `size`."""
        tokens = self.job.tokens(size)
        return memory.step_memory(self.job, self.form, self.mode_of(tokens), tokens)

    def seconds(self, size: Bucket, card: GpuSpec) -> float:
        """The time of a step on the largest batch of `size`."""
        return flops.step_seconds(self.job, self.form, self.mode_of(self.job.tokens(size)), size, card)

    @property
    def peak(self) -> MemoryEstimate:
        """The most that anything in the run takes on the device."""
        return max(
            [*map(self.step, self.job.sizes), memory.preview_memory(self.job, self.form)], key=lambda one: one.total
        )

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {
            **asdict(self.form),
            "recomputes": {mode: "all" if most == NO_LIMIT else most for mode, most in self.limits.items()},
            "predicted_gb": round(self.peak.total / 1e9, 3),
            "why": self.why,
        }


@dataclass(frozen=True)
class PlanConstraints:
    """What the config leaves to the planner: more than one kind, None for mode or number of streamed blocks."""

    kinds: tuple[Quantization | None, ...]
    mode: RecomputeMode | None
    streamed: int | None


def plan_constraints(config: Config, layers: int) -> PlanConstraints:
    """The settings of `config`, for a transformer of so many layers."""
    quantize, offload = config.model.quantize, config.memory.offload
    return PlanConstraints(
        kinds=AUTO_QUANTIZATIONS if quantize == "auto" else (quantize,),
        mode=config.memory.mode,
        streamed=None if isinstance(offload, str) else math.ceil(offload * layers - 1e-9),
    )


def choose_plan(
    job: Workload, wanted: PlanConstraints, limit_bytes: float, host_bytes: float, card: GpuSpec | None
) -> MemoryPlan:
    """The plan by which `job` fits `limit_bytes` on the device and takes least time; the smallest one if none does.

    Full precision is taken whenever it fits without streaming. Otherwise the fastest form decides, and the most precise
    one that costs at most a quarter more time is taken.
    """
    plans = [_plan(job, form, wanted.mode, limit_bytes) for form in _forms(job, wanted, host_bytes)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak.total)
    resident = next((plan for plan in fitting if plan.form == WeightPlacement()), None)
    if resident is not None:
        return resident
    times = {plan.form: _mean_seconds(plan, card or TYPICAL_GPU) for plan in fitting}
    fastest = min(times.values())
    good = [plan for plan in fitting if times[plan.form] <= fastest * MAX_SLOWDOWN]
    best = min(
        good, key=lambda plan: (QUANTIZATIONS_BY_ERROR.index(plan.form.kind), times[plan.form], plan.form.streamed)
    )
    if len(wanted.kinds) == 1 or wanted.streamed is not None:
        return best
    dense = min((times[form] for form in times if form.kind is None), default=None)
    if best.form.kind is None:
        return replace(best, why=f"{best.why}; streaming in full precision costs little")
    lost = "does not fit" if dense is None else f"would take {dense / times[best.form]:.1f} times as long"
    return replace(best, why=f"{best.why}; full precision {lost}")


@dataclass(frozen=True)
class Suggestion:
    """What to set so that a run is predicted to fit, and the bytes that it then takes; no changes: nothing helps."""

    changes: list[SettingChange]
    predicted_bytes: float

    def __str__(self) -> str:
        predicted = format_bytes(self.predicted_bytes)
        if not self.changes:
            return f"a run takes {predicted} at the least (predicted), so more memory is needed"
        return f"set {', '.join(map(str, self.changes))} (predicted: {predicted})"


def suggest_settings(job: Workload, wanted: PlanConstraints, limit_bytes: float, host_bytes: float) -> Suggestion:
    """What to set so that a run is predicted to fit: what changes least comes first."""
    is_free = wanted.mode is None and wanted.streamed is None
    auto = (SettingChange("memory.checkpointing", "auto"), SettingChange("memory.offload", "auto"))
    relaxed = [] if is_free else list(auto)
    least = math.inf
    for quantized, kinds in (([], wanted.kinds), ([SettingChange("model.quantize", "auto")], AUTO_QUANTIZATIONS)):
        for lighter, lighter_job in [([], job), *memory.lighter_workloads(job)]:
            plan = choose_plan(lighter_job, PlanConstraints(kinds, None, None), limit_bytes, host_bytes, None)
            total = plan.peak.total
            if plan.fits:
                changes = [*relaxed, *quantized, *lighter]
                return Suggestion(changes or [SettingChange("memory.budget_gb", limit_bytes / 1e9)], total)
            least = min(least, total)
    return Suggestion([], least)


def _forms(job: Workload, wanted: PlanConstraints, host_bytes: float) -> list[WeightPlacement]:
    """Every form that the config allows and that main memory has room for."""
    may_stream = wanted.streamed is None and wanted.mode != "none"
    numbers = range(job.shape.n_layers + 1) if may_stream else [wanted.streamed or 0]
    forms = [WeightPlacement(kind, streamed) for kind in wanted.kinds for streamed in numbers]
    small = [form for form in forms if memory.host_bytes(job, form) <= HOST_SHARE * host_bytes or form.streamed == 0]
    return small or forms


def _plan(job: Workload, form: WeightPlacement, mode: RecomputeMode | None, limit_bytes: float) -> MemoryPlan:
    allowed: tuple[RecomputeMode, ...] = (
        (mode,) if mode is not None else RECOMPUTE_MODES[1:] if form.streamed else RECOMPUTE_MODES
    )
    limits: dict[RecomputeMode, int] = {one: memory.max_tokens_within(job, form, one, limit_bytes) for one in allowed}
    most = job.max_tokens
    fits = limits[allowed[-1]] >= most and memory.preview_memory(job, form).total <= limit_bytes
    why = "set in the config" if mode is not None else f"by what fits {format_bytes(limit_bytes)}"
    last = allowed[-1]
    limits[last] = NO_LIMIT
    return MemoryPlan(job, form, limits, limit_bytes, fits, why)


def _mean_seconds(plan: MemoryPlan, card: GpuSpec) -> float:
    return math.fsum(share * plan.seconds(size, card) for size, share in plan.job.shares().items())
