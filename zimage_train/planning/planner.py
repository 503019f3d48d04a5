"""How a run fits a card: precision, recomputation and streaming, chosen by what is predicted to take least time.

A plan comes from totals, never from what happens to be free, so that the same run plans the same every time. What a
batch recomputes is decided by its number of tokens when it comes; the planner says which numbers fit how.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.values import MODES, Kind, Mode
from zimage_train.dataset.buckets import Bucket
from zimage_train.io.units import in_words
from zimage_train.planning import flops, memory
from zimage_train.planning.gpus import TYPICAL, Card
from zimage_train.planning.memory import Estimate, Form, Job

MANY = 2**31
"""Tokens; more than any batch has."""
WORTH = 1.25
"""A more precise form is taken when it costs at most this much of the fastest one's time."""
PRECISION: tuple[Kind | None, ...] = (None, "int8", "fp8", "nf4")
"""Best first. int8 with a scale for 64 weights has a quarter of the error of fp8 at the same size."""
AUTOMATIC: tuple[Kind | None, ...] = (None, "int8", "nf4")
HOST_SHARE = 0.5
"""Of main memory, what streamed blocks may take."""


@dataclass(frozen=True)
class Plan:
    """What was decided, for a job and a limit."""

    job: Job
    form: Form
    limits: dict[Mode, int]
    """The most tokens of a batch for which each mode is taken, lightest first."""
    limit_bytes: float
    fits: bool
    why: str

    def mode_of(self, tokens: int) -> Mode:
        """What a batch of `tokens` recomputes: the least that fits."""
        last: Mode = "full"
        for mode, most in self.limits.items():
            if tokens <= most:
                return mode
            last = mode
        return last

    def step(self, size: Bucket) -> Estimate:
        """The memory of the largest batch of `size`."""
        tokens = self.job.tokens(size)
        return memory.step(self.job, self.form, self.mode_of(tokens), tokens)

    def seconds(self, size: Bucket, card: Card) -> float:
        """The time of a step on the largest batch of `size`."""
        return flops.step_seconds(self.job, self.form, self.mode_of(self.job.tokens(size)), size, card)

    @property
    def peak(self) -> Estimate:
        """The most that anything in the run takes on the device."""
        return max([*map(self.step, self.job.sizes), memory.preview(self.job, self.form)], key=lambda one: one.total)

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {
            **asdict(self.form),
            "recomputes": {mode: "all" if most == MANY else most for mode, most in self.limits.items()},
            "predicted_gb": round(self.peak.total / 1e9, 3),
            "why": self.why,
        }


@dataclass(frozen=True)
class Wanted:
    """What the config leaves to the planner: more than one kind, None for mode or number of streamed blocks."""

    kinds: tuple[Kind | None, ...]
    mode: Mode | None
    streamed: int | None


def wanted(config: Config, layers: int) -> Wanted:
    """The settings of `config`, for a transformer of so many layers."""
    quantize, offload = config.model.quantize, config.memory.offload
    return Wanted(
        kinds=AUTOMATIC if quantize == "auto" else (quantize,),
        mode=config.memory.mode,
        streamed=None if isinstance(offload, str) else math.ceil(offload * layers - 1e-9),
    )


def choose(job: Job, wanted: Wanted, limit_bytes: float, host_bytes: float, card: Card | None) -> Plan:
    """The plan by which `job` fits `limit_bytes` on the device and takes least time; the smallest one if none does.

    Full precision is taken whenever it fits without streaming. Otherwise the fastest form decides, and the most precise
    one that costs at most a quarter more time is taken.
    """
    plans = [_plan(job, form, wanted.mode, limit_bytes) for form in _forms(job, wanted, host_bytes)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak.total)
    resident = next((plan for plan in fitting if plan.form == Form()), None)
    if resident is not None:
        return resident
    times = {plan.form: _mean_seconds(plan, card or TYPICAL) for plan in fitting}
    fastest = min(times.values())
    good = [plan for plan in fitting if times[plan.form] <= fastest * WORTH]
    best = min(good, key=lambda plan: (PRECISION.index(plan.form.kind), times[plan.form], plan.form.streamed))
    if len(wanted.kinds) == 1 or wanted.streamed is not None:
        return best
    dense = min((times[form] for form in times if form.kind is None), default=None)
    if best.form.kind is None:
        return replace(best, why=f"{best.why}; streaming in full precision costs little")
    lost = "does not fit" if dense is None else f"would take {dense / times[best.form]:.1f} times as long"
    return replace(best, why=f"{best.why}; full precision {lost}")


def lighter(job: Job, wanted: Wanted, limit_bytes: float, host_bytes: float) -> str:
    """What to set so that a run is predicted to fit: what changes least comes first."""
    is_free = wanted.mode is None and wanted.streamed is None
    relaxed = "" if is_free else "memory.checkpointing: auto, memory.offload: auto"
    least = math.inf
    for quantised, kinds in (("", wanted.kinds), ("model.quantize: auto", AUTOMATIC)):
        for changes, lighter_job in [("", job), *memory.lighter(job)]:
            plan = choose(lighter_job, Wanted(kinds, None, None), limit_bytes, host_bytes, None)
            total = plan.peak.total
            if plan.fits:
                settings = ", ".join(filter(None, (relaxed, quantised, changes)))
                set_ = settings or f"memory.budget_gb: {limit_bytes / 1e9:.3g}"
                return f"set {set_} (predicted: {in_words(total)})"
            least = min(least, total)
    return f"a run takes {in_words(least)} at the least (predicted), so more memory is needed"


def _forms(job: Job, wanted: Wanted, host_bytes: float) -> list[Form]:
    """Every form that the config allows and that main memory has room for."""
    may_stream = wanted.streamed is None and wanted.mode != "none"
    numbers = range(job.shape.n_layers + 1) if may_stream else [wanted.streamed or 0]
    forms = [Form(kind, streamed) for kind in wanted.kinds for streamed in numbers]
    small = [form for form in forms if memory.host_bytes(job, form) <= HOST_SHARE * host_bytes or form.streamed == 0]
    return small or forms


def _plan(job: Job, form: Form, mode: Mode | None, limit_bytes: float) -> Plan:
    allowed: tuple[Mode, ...] = (mode,) if mode is not None else MODES[1:] if form.streamed else MODES
    limits: dict[Mode, int] = {one: memory.most_tokens(job, form, one, limit_bytes) for one in allowed}
    most = job.most_tokens
    fits = limits[allowed[-1]] >= most and memory.preview(job, form).total <= limit_bytes
    why = "set in the config" if mode is not None else f"by what fits {in_words(limit_bytes)}"
    last = allowed[-1]
    limits[last] = MANY
    return Plan(job, form, limits, limit_bytes, fits, why)


def _mean_seconds(plan: Plan, card: Card) -> float:
    return math.fsum(share * plan.seconds(size, card) for size, share in plan.job.shares().items())
