"""What a run will take on a card, in memory, time and money, for people: predicted from sizes alone (torch-free)."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import Note
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.units import format_bytes
from zimage_train.planning import calibration, flops, gpus, memory, planner, preflight
from zimage_train.planning.calibration import CalibrationFactor
from zimage_train.planning.gpus import GPU_SPECS, DeviceLimits, GpuSpec
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.planning.recompute_costs import RECOMPUTE_COSTS

SIGMAS_IN_A_VALIDATION = 17
READ_BYTES_PER_SECOND = 2e9
"""Of weights that come from a file that was read before."""
EXAMPLES = ("4090", "4080", "4070", "4060")
"""24, 16, 12 and 8 GB, shown where there is no card to plan for."""


def device_for(config: Config, gpu: str | None) -> DeviceLimits | None:
    """The card that `gpu` names, or the one of this machine, with the config's budget if it sets one.

    None: neither is known, and there is no budget.

    Raises:
        ConfigError: `gpu` is not known.
    """
    budget = config.memory.budget_gb
    found = gpus.detect_gpu() if gpu is None else None
    card = gpus.get_gpu(gpu) if gpu is not None else gpus.find_gpu(found.name) if found else None
    total = found.memory_bytes if found else card.memory_gb * 1e9 if card else None
    limits = [gpus.usable_bytes(total)] if total is not None else []
    if not isinstance(budget, str):
        limits.append(budget * 1e9)
    name = f"one {card.name}" if card else found.name if found else "this budget"
    return DeviceLimits(name, min(limits), card) if limits else None


def plan_for(checked: RunSpec, device: DeviceLimits, gpu: bool | None = None, processes: int = 1) -> MemoryPlan:
    """How `checked` runs on `device`, with main memory shared by so many processes."""
    job, host = preflight.workload_of(checked, gpu), main_memory_bytes() / processes
    wanted = planner.plan_constraints(checked.config, job.shape.n_layers)
    return planner.choose_plan(job, wanted, device.limit_bytes, host, device.card)


def forecast_lines(checked: RunSpec, gpu: str | None, price: float | None) -> list[Note]:
    """Memory, time and cost; on four sizes of card where none is known."""
    device = device_for(checked.config, gpu)
    if device is not None:
        return _of_device(checked, device, price)
    if memory.parameters_of(preflight.workload_of(checked).shape) <= memory.MAX_CPU_PARAMETERS:
        return _of_device(checked, DeviceLimits("cpu", main_memory_bytes(), None), price)
    head = "memory and time, predicted (no NVIDIA GPU found here; --gpu NAME shows more of one):"
    found = [Note("examples", head)]
    for name in EXAMPLES:
        card = GPU_SPECS[name]
        plan = plan_for(checked, DeviceLimits(name, gpus.usable_bytes(card.memory_gb * 1e9), card))
        text = f"  {card.memory_gb:4.1f} GB ({name}): {_short(checked, plan, card, price)}"
        found.append(Note("example", text))
    return found


def describe_plan(plan: MemoryPlan) -> str:
    """The plan in one line, for the log."""
    predicted = format_bytes(plan.peak.total)
    return f"{_weights(plan)}; recomputed: {_recomputed(plan)}; {predicted} predicted, {plan.why}"


def fits(checked: RunSpec, gpu: str | None) -> bool:
    """Whether a run is predicted to fit the device that `lines` is about; True where there is none."""
    device = device_for(checked.config, gpu)
    return device is None or plan_for(checked, device).fits


def _short(checked: RunSpec, plan: MemoryPlan, card: GpuSpec, price: float | None) -> str:
    if not plan.fits:
        return f"does not fit ({plan.peak.total / 1e9:.1f} GB)"
    largest = max(plan.job.sizes, key=plan.job.tokens)
    mode = plan.mode_of(plan.job.tokens(largest))
    known = _known(checked, card.name)
    whole = _run_seconds(checked, plan, card)[0] * (known.time if known else 1.0)
    return (
        f"{plan.peak.total / 1e9:.1f} GB, {_weights(plan)}, recomputing {RECOMPUTE_COSTS[mode].description} at "
        f"{largest.width}x{largest.height}, {_hours_and_cost(whole, price)}"
    )


def _of_device(checked: RunSpec, device: DeviceLimits, price: float | None) -> list[Note]:
    plan = plan_for(checked, device)
    peak = plan.peak
    known = _known(checked, device.key)
    by_runs = f", x{known.memory:.2f} by runs here" if known and known.memory else ""
    found = [
        Note("memory", f"memory on {device.name} ({format_bytes(device.limit_bytes)}), predicted:"),
        Note("memory-weights", f"  frozen transformer        {format_bytes(peak.weights):>9}  {_weights(plan)}"),
        Note("memory-lora", f"  LoRA, gradient, optimizer {format_bytes(peak.lora):>9}"),
        Note("memory-activations", f"  activations               {format_bytes(peak.activations):>9}  {_where(plan)}"),
        Note("memory-context", f"  CUDA and fragmentation    {format_bytes(peak.context):>9}"),
        Note("memory-peak", f"  at the most               {format_bytes(peak.total):>9}{by_runs}"),
        Note("recomputed", f"  recomputed: {_recomputed(plan)}"),
        Note("reason", f"  why: {plan.why}"),
    ]
    if not plan.fits:
        less = preflight.how_to_fit(checked, device.limit_bytes)
        found.append(Note("does-not-fit", f"  this does not fit {format_bytes(device.limit_bytes)}: {less}"))
    return [*found, *_shares(checked, plan, device), *_time(checked, plan, device, price)]


def _where(plan: MemoryPlan) -> str:
    """When the plan's peak comes."""
    peak = plan.peak
    if peak == memory.preview_memory(plan.job, plan.form):
        return "in a preview"
    size = next(size for size in plan.job.sizes if plan.step(size) == peak)
    return f"at {size.width}x{size.height} px, {plan.job.tokens(size)} tokens"


def _weights(plan: MemoryPlan) -> str:
    kind = plan.form.kind or plan.job.dtype
    streamed = plan.form.streamed
    if not streamed:
        return kind
    host = format_bytes(memory.host_bytes(plan.job, plan.form))
    return f"{kind}, {streamed} of {plan.job.shape.n_layers} blocks streamed from {host} of main memory"


def _recomputed(plan: MemoryPlan) -> str:
    """Each mode that some batch of the job may need, with the most tokens that it is for."""
    parts: list[str] = []
    for mode, most in plan.limits.items():
        if most >= plan.job.max_tokens:
            return ", ".join([*parts, RECOMPUTE_COSTS[mode].description + (" beyond" if parts else "")])
        if most > 0:
            parts.append(f"{RECOMPUTE_COSTS[mode].description} up to {most} tokens")
    return ", ".join(parts)


def _shares(checked: RunSpec, plan: MemoryPlan, device: DeviceLimits) -> list[Note]:
    """Where the time and the memory of the run go, by resolution and to previews."""
    by_resolution: dict[int, Counter[Bucket]] = {}
    for item in checked.items:
        by_resolution.setdefault(item.resolution, Counter())[item.size] += 1
    card, known = device.card, _known(checked, device.key)
    speed, factor = card or gpus.TYPICAL_GPU, known.time if known else 1.0
    shares = plan.job.shares()
    spent = {
        resolution: math.fsum(
            shares[size] * n / plan.job.sizes[size] * plan.seconds(size, speed) for size, n in sizes.items()
        )
        for resolution, sizes in by_resolution.items()
    }
    epoch = math.fsum(spent.values())
    found = [Note("shares", "where it goes:")]
    for resolution, sizes in sorted(by_resolution.items()):
        most = max((plan.step(size) for size in sizes), key=lambda one: one.total)
        largest = max(sizes, key=plan.job.tokens)
        a_step = f", {plan.seconds(largest, card) * factor:.2f} s a step" if card else ""
        mode = plan.mode_of(plan.job.tokens(largest))
        share = f"{spent[resolution] / epoch:.0%} of the training time"
        what = f"{format_bytes(most.total)} a step, recomputing {RECOMPUTE_COSTS[mode].description}{a_step}"
        found.append(Note("share", f"  {resolution} px: {share}, {what}"))
    whole, previews = _run_seconds(checked, plan, speed)
    recipes, times = len(plan.job.previews), _previews_in_a_run(checked.config)
    drawing = format_bytes(memory.preview_memory(plan.job, plan.form).total)
    images = f"{recipes} image{'s' * (recipes != 1)}"
    text = f"  previews: {times} times {images}, {previews / whole:.0%} of the run, {drawing}"
    found.append(Note("share", text))
    if own := plan.job.generated:
        before = _own_seconds(plan, speed)
        text = f"  before training: {len(own)} images of the model's own, {before / whole:.0%} of the run"
        found.append(Note("share", text))
    return found


def _own_seconds(plan: MemoryPlan, card: GpuSpec) -> float:
    """What the model takes to draw what it is then trained on."""
    return math.fsum(flops.preview_seconds(plan.job, plan.form, one, card) for one in plan.job.generated)


def _time(checked: RunSpec, plan: MemoryPlan, device: DeviceLimits, price: float | None) -> list[Note]:
    known = _known(checked, device.key)
    if device.card is None and known is None:
        text = "time: not known for this device before a run on it; --gpu NAME predicts it for a card"
        return [Note("time-unknown", text)]
    whole = _run_seconds(checked, plan, device.card or gpus.TYPICAL_GPU)[0] * (known.time if known else 1.0)
    how = f"predicted; {known.in_words()}" if known else "predicted"
    steps = checked.config.train.steps
    text = f"time on {device.name}, for {steps} steps: {_hours_and_cost(whole, price)} ({how})"
    return [Note("time", text)]


def _known(checked: RunSpec, device: str) -> CalibrationFactor | None:
    """What runs of this model on `device` say."""
    parameters = memory.parameters_of(preflight.workload_of(checked).shape)
    return calibration.calibration_factor(calibration_file(checked.config), calibration.device_key(device, parameters))


def calibration_file(config: Config) -> Path:
    """Where measured runs are remembered."""
    return cache_dir(config) / "measured.json"


def _hours_and_cost(seconds: float, price: float | None) -> str:
    minutes = round(seconds / 60)
    time = f"{minutes // 60} h {minutes % 60:02d} min" if minutes else f"{seconds:.0f} s"
    return time if price is None else f"{time}, at {price:g} an hour {seconds / 3600 * price:.2f}"


def _run_seconds(checked: RunSpec, plan: MemoryPlan, card: GpuSpec) -> tuple[float, float]:
    """The whole run, and its previews alone."""
    config, job = checked.config, plan.job
    mean = math.fsum(share * plan.seconds(size, card) for size, share in job.shares().items())
    drawing = math.fsum(flops.preview_seconds(job, plan.form, one, card) for one in job.previews)
    if checked.weights is None or checked.weights.paths.adapter is not None:  # taken out and merged again
        drawing += 2 * memory.model_bytes(replace(job, dtype="bf16"), None) / READ_BYTES_PER_SECOND
    previews = drawing * _previews_in_a_run(config) if job.previews else 0.0
    looking = math.fsum(flops.forward_seconds(job, plan.form, item.size, 1, card) for item in checked.held_out)
    every, steps = config.validation.every, config.train.steps
    validating = looking * SIGMAS_IN_A_VALIDATION * (-(-steps // every) + 1) if every else 0.0
    training = steps * config.train.grad_accumulation * mean
    return training + previews + validating + _own_seconds(plan, card), previews


def _previews_in_a_run(config: Config) -> int:
    every, steps = config.sample.every, config.train.steps
    if every is None:
        return 0
    return -(-steps // every) + config.sample.first
