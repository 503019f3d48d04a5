"""The plan of a run before it starts: memory by part and card, time, and settings with which it would fit."""

from dataclasses import dataclass, field

from zimage_train.config.schema import Config
from zimage_train.errors import Problem, ZImageTrainError
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.progress import Progress
from zimage_train.models.locate import cached_only
from zimage_train.planning import forecast, gpus, memory, preflight
from zimage_train.planning.config_warnings import ConfigWarning
from zimage_train.planning.gpus import GPU_SPECS, DeviceLimits
from zimage_train.planning.preflight import RunSpec
from zimage_train.planning.suggestions import SettingChange

PARTS = ("weights", "lora", "activations", "context")
"""The parts of a `MemoryEstimate`, in the order of the bar."""
RESOLUTIONS = (768, 512)
MEMORY_CODES = ("memory", "example")
"""Beginnings of the codes of forecast lines that the bar shows."""


@dataclass(frozen=True)
class CardPlan:
    """The predicted memory of a run on a card."""

    card: str
    limit_bytes: float
    parts: dict[str, int]
    """Part -> bytes, of `PARTS`."""
    fits: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class ShorterRun:
    """A lower resolution, and the time and cost of the run at it on the same card."""

    change: SettingChange
    time: str


@dataclass(frozen=True)
class RunPlan:
    """The plan and the problems of a run before it starts."""

    cards: list[CardPlan] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """On time, cost and shares."""
    changes: list[SettingChange] = field(default_factory=list)
    """Settings by which a run that does not fit is predicted to fit."""
    notes: list[str] = field(default_factory=list)
    warnings: list[ConfigWarning] = field(default_factory=list)
    shorter: list[ShorterRun] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """The problems for which the run is refused."""


def plan_run(config: Config, gpu: str | None, price: float | None, progress: Progress) -> RunPlan:
    """Check `config` with its images and files, and plan it for the card `gpu`, or else for this machine's.

    Without either it is planned for the cards of `forecast.EXAMPLES`. Nothing is downloaded.
    """
    try:
        spec = preflight.check_run(config, cached_only, progress)
        cards, changes = _cards(spec, gpu)
        shorter = _shorter_runs(config, gpu, price, progress)
        lines = [note for note in forecast.forecast_lines(spec, gpu, price) if not note.code.startswith(MEMORY_CODES)]
    except ZImageTrainError as error:
        return RunPlan(problems=list(error.problems))
    notes = [str(note) for note in spec.notes]
    return RunPlan(cards, [line.text.rstrip() for line in lines], changes, notes, list(spec.warnings), shorter)


def _shorter_runs(config: Config, gpu: str | None, price: float | None, progress: Progress) -> list[ShorterRun]:
    """Return the run at each lower resolution; none where the speed of the card is not known."""
    device = forecast.device_for(config, gpu)
    highest = max(max(entry.resolution) for entry in config.data)
    found: list[ShorterRun] = []
    if device is None or device.card is None:
        return found
    for resolution in RESOLUTIONS:
        if resolution >= highest:
            continue
        entries = [entry.model_copy(update={"resolution": [resolution]}) for entry in config.data]
        spec = preflight.check_run(config.model_copy(update={"data": entries}), cached_only, progress)
        seconds = forecast.run_seconds(spec, device)
        if seconds is not None:
            change = SettingChange("data.*.resolution", resolution)
            found.append(ShorterRun(change, forecast.hours_and_cost(seconds, price)))
    return found


def _cards(spec: RunSpec, gpu: str | None) -> tuple[list[CardPlan], list[SettingChange]]:
    device = forecast.device_for(spec.config, gpu)
    if device is None and memory.parameters_of(preflight.workload_of(spec).shape) <= memory.MAX_CPU_PARAMETERS:
        device = DeviceLimits("cpu", main_memory_bytes(), None)
    if device is not None:
        plan = _plan_on(spec, device)
        suggestion = None if plan.fits else preflight.how_to_fit(spec, device.limit_bytes)
        return [plan], suggestion.changes if suggestion else []
    plans: list[CardPlan] = []
    for name in forecast.EXAMPLES:
        card = GPU_SPECS[name]
        plans.append(_plan_on(spec, DeviceLimits(name, gpus.usable_bytes(card.memory_gb * 1e9), card)))
    return plans, []


def _plan_on(spec: RunSpec, device: DeviceLimits) -> CardPlan:
    plan = forecast.plan_for(spec, device)
    parts = {name: getattr(plan.peak, name) for name in PARTS}
    return CardPlan(device.name, device.limit_bytes, parts, plan.fits)
