"""Prediction of memory, time and cost of a run on a card, as lines for people (torch-free)."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import Note
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.units import format_bytes
from zimage_train.planning import calibration, flops, gpus, memory, planner, preflight, run_times
from zimage_train.planning.calibration import CalibrationFactor
from zimage_train.planning.gpus import GPU_SPECS, DeviceLimits, GpuSpec
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.planning.recompute_costs import describe_mode
from zimage_train.planning.run_times import RunTimes, Stage

LARGE_SHARE = 0.1
"""Share of a run's time from which anything beside the steps is named, with a setting that changes it."""
EXAMPLES = ("4090", "4080", "4070", "4060")
"""Cards of 24, 16, 12 and 8 GB, shown where no card is known."""


def device_for(config: Config, gpu: str | None) -> DeviceLimits | None:
    """Return the limits of the card `gpu`, or else of this machine's, within the budget of `config` if set.

    Return None if no card is found and no budget is set.

    Raises:
        ConfigError: `gpu` is not in the list of cards.
    """
    name, total_bytes, card = "this budget", None, None
    if gpu is not None:
        card = gpus.get_gpu(gpu)
        name, total_bytes = f"one {card.name}", card.memory_gb * 1e9
    else:
        detected = gpus.detect_gpu()
        if detected is not None:
            card = gpus.find_gpu(detected.name)
            name = f"one {card.name}" if card else detected.name
            total_bytes = detected.memory_bytes
    limits: list[float] = []
    if total_bytes is not None:
        limits.append(gpus.usable_bytes(total_bytes))
    budget_gb = config.memory.budget_gb
    if not isinstance(budget_gb, str):
        limits.append(budget_gb * 1e9)
    return DeviceLimits(name, min(limits), card) if limits else None


def plan_for(
    spec: RunSpec, device: DeviceLimits, gpu: bool | None = None, processes: int = 1, may_fuse: bool = True
) -> MemoryPlan:
    """Return the plan of the run on `device`, with main memory shared by `processes` of this machine.

    `may_fuse` says whether blocks can be fused there at all.
    """
    workload = preflight.workload_of(spec, gpu)
    workload = replace(workload, is_fused=workload.is_fused and may_fuse)
    constraints = planner.plan_constraints(spec.config, workload.shape.n_layers)
    host_bytes = main_memory_bytes() / processes
    return planner.choose_plan(workload, constraints, device.limit_bytes, host_bytes, device.card)


def forecast_lines(spec: RunSpec, gpu: str | None, price: float | None) -> list[Note]:
    """Return lines on memory, time and cost; `price` is that of an hour.

    They are for the card `gpu`, or else for the card or the budget of `device_for`. Without either, a small model is
    planned for the CPU, and a published model for four example cards.
    """
    device = device_for(spec.config, gpu)
    if device is not None:
        return _forecast_on_device(spec, device, price)
    if memory.parameters_of(preflight.workload_of(spec).shape) <= memory.MAX_CPU_PARAMETERS:
        return _forecast_on_device(spec, DeviceLimits("cpu", main_memory_bytes(), None), price)
    head = "memory and time, predicted (no NVIDIA GPU found here; --gpu NAME shows more):"
    lines = [Note("examples", head)]
    for name in EXAMPLES:
        card = GPU_SPECS[name]
        plan = plan_for(spec, DeviceLimits(name, gpus.usable_bytes(card.memory_gb * 1e9), card))
        text = f"  {card.memory_gb:4.1f} GB ({name}): {_one_line_forecast(spec, plan, card, price)}"
        lines.append(Note("example", text))
    return lines


def describe_plan(plan: MemoryPlan) -> str:
    """Return the plan as a line, for the log."""
    predicted = format_bytes(plan.peak.total)
    return f"{_describe_weights(plan)}; recomputed: {_describe_recomputation(plan)}; {predicted} predicted, {plan.why}"


def fits(spec: RunSpec, gpu: str | None) -> bool:
    """Return whether the run is predicted to fit the device of `forecast_lines`; True where none is known."""
    device = device_for(spec.config, gpu)
    return device is None or plan_for(spec, device).fits


def _one_line_forecast(spec: RunSpec, plan: MemoryPlan, card: GpuSpec, price: float | None) -> str:
    if not plan.fits:
        return f"does not fit ({plan.peak.total / 1e9:.1f} GB)"
    largest = max(plan.workload.sizes, key=plan.workload.tokens)
    recomputed = describe_mode(plan.mode_of(plan.workload.tokens(largest)))
    seconds = run_times.predict_times(spec, plan, card, _time_factor(_calibration(spec, card.name))).total
    return (
        f"{plan.peak.total / 1e9:.1f} GB, {_describe_weights(plan)}, recomputing {recomputed} at "
        f"{largest.width}x{largest.height}, {hours_and_cost(seconds, price)}"
    )


def _forecast_on_device(spec: RunSpec, device: DeviceLimits, price: float | None) -> list[Note]:
    plan = plan_for(spec, device)
    peak = plan.peak
    # The factor for memory is shown and not applied: if measurements changed the plan, a resumed run could get another
    # plan than it began with.
    factor = _calibration(spec, device.key)
    measured = f", x{factor.memory:.2f} by runs here" if factor and factor.memory else ""
    weights, at_peak = _describe_weights(plan), _describe_peak(plan)
    lines = [
        Note("memory", f"memory on {device.name} ({format_bytes(device.limit_bytes)}), predicted:"),
        Note("memory-weights", f"  frozen transformer        {format_bytes(peak.weights):>9}  {weights}"),
        Note("memory-lora", f"  {spec.config.lora.label}, gradient, optimizer {format_bytes(peak.lora):>9}"),
        Note("memory-activations", f"  activations               {format_bytes(peak.activations):>9}  {at_peak}"),
        Note("memory-context", f"  CUDA and fragmentation    {format_bytes(peak.context):>9}"),
        Note("memory-peak", f"  at the most               {format_bytes(peak.total):>9}{measured}"),
        Note("recomputed", f"  recomputed: {_describe_recomputation(plan)}"),
        Note("reason", f"  why: {plan.why}"),
    ]
    if not plan.fits:
        suggestion = preflight.how_to_fit(spec, device.limit_bytes)
        lines.append(Note("does-not-fit", f"  this does not fit {format_bytes(device.limit_bytes)}: {suggestion}"))
    return [*lines, *_share_lines(spec, plan, device), *_time_lines(spec, plan, device, price)]


def _describe_peak(plan: MemoryPlan) -> str:
    """Return the moment at which the memory of the run is at its peak, for people."""
    peak = plan.peak
    if peak == memory.preview_memory(plan.workload, plan.placement):
        return "in a preview"
    size = next(size for size in plan.workload.sizes if plan.step_memory(size) == peak)
    return f"at {size.width}x{size.height} px, {plan.workload.tokens(size)} tokens"


def _describe_weights(plan: MemoryPlan) -> str:
    precision = plan.placement.quantization or plan.workload.dtype
    streamed = plan.placement.streamed
    if not streamed:
        return precision
    host = format_bytes(memory.host_bytes(plan.workload, plan.placement))
    return f"{precision}, {streamed} of {plan.workload.shape.n_layers} blocks streamed from {host} of main memory"


def _describe_recomputation(plan: MemoryPlan) -> str:
    """Return what the batches of the run recompute, each with the largest number of tokens to which it applies."""
    parts: list[str] = []
    for mode, max_tokens in plan.limits.items():
        description = describe_mode(mode)
        if max_tokens >= plan.workload.max_tokens:
            parts.append(f"{description} beyond" if parts else description)
            break
        if max_tokens > 0:
            parts.append(f"{description} up to {max_tokens} tokens")
    return ", ".join(parts)


def _share_lines(spec: RunSpec, plan: MemoryPlan, device: DeviceLimits) -> list[Note]:
    """Return how time and memory of the run are divided between resolutions, previews and generated images."""
    workload = plan.workload
    # Shares of the time depend little on the card, so they are given even if it is unknown.
    card = device.card or gpus.TYPICAL_GPU
    factor = _time_factor(_calibration(spec, device.key))
    by_resolution: dict[int, Counter[Bucket]] = {}
    for item in spec.items:
        by_resolution.setdefault(item.resolution, Counter())[item.size] += 1

    batch_shares = workload.shares()
    seconds: dict[int, float] = {}
    for resolution, sizes in by_resolution.items():
        # Two resolutions may train an image at the same size, so each gets its part of the batches of that size.
        terms = []
        for size, count in sizes.items():
            terms.append(batch_shares[size] * count / workload.sizes[size] * plan.step_seconds(size, card))
        seconds[resolution] = math.fsum(terms)
    total = math.fsum(seconds.values())

    lines = [Note("shares", "where it goes:")]
    for resolution, sizes in sorted(by_resolution.items()):
        most = max((plan.step_memory(size) for size in sizes), key=lambda estimate: estimate.total)
        largest = max(sizes, key=workload.tokens)
        recomputed = describe_mode(plan.mode_of(workload.tokens(largest)))
        per_step = f", {plan.step_seconds(largest, card) * factor:.2f} s a step" if device.card else ""
        share = f"{seconds[resolution] / total:.0%} of the training time"
        text = f"{share}, {format_bytes(most.total)} a step, recomputing {recomputed}{per_step}"
        lines.append(Note("share", f"  {resolution} px: {text}"))

    requests = workload.previews
    if requests:
        count = f"{len(requests)} image{'s' * (len(requests) != 1)}"
        preview_memory = format_bytes(memory.preview_memory(workload, plan.placement).total)
        text = f"{run_times.times_of_previews(spec.config)} times {count}, {preview_memory}"
        lines.append(Note("share", f"  previews: {text}"))
    if workload.generated:
        lines.append(Note("share", f"  before training: {len(workload.generated)} images of the model's own"))
    return lines


def _time_lines(spec: RunSpec, plan: MemoryPlan, device: DeviceLimits, price: float | None) -> list[Note]:
    factor = _calibration(spec, device.key)
    if device.card is None and factor is None:
        text = "time: not known for this device before a run on it; --gpu NAME predicts it for a card"
        return [Note("time-unknown", text)]
    # Measurements on an unlisted device are relative to the typical card, too; see `dry_run.compare_with_forecast`.
    times = run_times.predict_times(spec, plan, device.card or gpus.TYPICAL_GPU, _time_factor(factor))
    source = "predicted"
    if factor is not None:
        source += f"; {factor.in_words(is_card_known=device.card is not None)}"
    steps = spec.config.train.steps
    text = f"time on {device.name}, for {steps} steps: {hours_and_cost(times.total, price)} ({source})"
    lines = [Note("time", text), *_stage_lines(spec, times)]
    if factor is None and device.card is not None:
        least, most = flops.TIME_INTERVAL
        measured = "" if device.card.name in flops.MEASURED_CARDS else f"; no run on a {device.card.name} was measured"
        text = f"  it may take {least:g} to {most:g} times as long, as runs on an H100 did{measured}"
        lines.append(Note("time-interval", text))
    if spec.config.train.reproducible and device.card is not None:
        largest = max(plan.workload.sizes, key=plan.workload.tokens)
        cost_ms = flops.reproducible_seconds(plan.workload, largest, device.card) * 1000
        share = cost_ms / 1000 / plan.step_seconds(largest, device.card)
        where = f"{largest.width}x{largest.height}"
        text = f"  of that, train.reproducible takes some {cost_ms:.0f} ms of a step at {where} ({share:.0%})"
        lines.append(Note("time-reproducible", f"{text}, judged by an H100"))
    return lines


def predicted_times(spec: RunSpec, plan: MemoryPlan) -> Mapping[Stage, float] | None:
    """Return the seconds of each stage of a run on this machine's card, or None if its speed is not known."""
    detected = gpus.detect_gpu()
    card = gpus.find_gpu(detected.name) if detected is not None else None
    if card is None:
        return None
    return run_times.predict_times(spec, plan, card, _time_factor(_calibration(spec, card.name))).seconds


def _stage_lines(spec: RunSpec, times: RunTimes) -> list[Note]:
    """Return what the time goes to, and for whatever takes much of it beside the steps, how to change that."""
    shares = run_times.describe_times(times.seconds)
    lines = [Note("time-shares", f"  of that: {shares}; another start takes {times.warm_start:.0f} s")]
    config = spec.config
    intervals: list[tuple[Stage, str, int | None]] = [
        ("previews", "sample.every", config.sample.every),
        ("validation", "validation.every", config.validation.every),
        ("saves", "save.every", config.save.every),
    ]
    for stage, key, every in intervals:
        if times.seconds[stage] > LARGE_SHARE * times.total and every is not None and every < config.train.steps:
            text = f"  {stage} cost {times.seconds[stage] / 60:.0f} min; {key}: {2 * every} halves that"
            lines.append(Note("large-share", text))
    return lines


def _calibration(spec: RunSpec, device: str) -> CalibrationFactor | None:
    """Return the factors by which runs of this model on `device` differed from their predictions, if there were any."""
    parameters = memory.parameters_of(preflight.workload_of(spec).shape)
    return calibration.calibration_factor(calibration_file(spec.config), calibration.device_key(device, parameters))


def _time_factor(factor: CalibrationFactor | None) -> float:
    return factor.time if factor else 1.0


def calibration_file(config: Config) -> Path:
    """Return the file in which measured runs are recorded."""
    return cache_dir(config) / "measured.json"


def run_seconds(spec: RunSpec, device: DeviceLimits) -> float | None:
    """Return the predicted seconds of the run on `device`, or None if it does not fit or its speed is not known."""
    plan = plan_for(spec, device)
    if device.card is None or not plan.fits:
        return None
    return run_times.predict_times(spec, plan, device.card, _time_factor(_calibration(spec, device.key))).total


def hours_and_cost(seconds: float, price: float | None) -> str:
    """Return a duration, and its cost at a price an hour, in words."""
    minutes = round(seconds / 60)
    time = f"{minutes // 60} h {minutes % 60:02d} min" if minutes else f"{seconds:.0f} s"
    return time if price is None else f"{time}, at {price:g} an hour {seconds / 3600 * price:.2f}"
