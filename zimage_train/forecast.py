"""What a run will take on a card, in memory, time and money, for people: predicted from sizes alone (torch-free)."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from zimage_train import cards, flops, measured, memory, planner, preflight
from zimage_train.cards import CARDS, Card, Device
from zimage_train.config.reading import cache_folder
from zimage_train.config.schema import Config
from zimage_train.data.buckets import Bucket
from zimage_train.planner import Plan
from zimage_train.preflight import Checked

SIGMAS_IN_A_VALIDATION = 17
READ_BYTES_PER_SECOND = 2e9
"""Of weights that come from a file that was read before."""
EXAMPLES = ("4090", "4080", "4070", "4060")
"""24, 16, 12 and 8 GB, shown where there is no card to plan for."""
MODES_IN_WORDS = {
    "none": "nothing",
    "elementwise": "norms, gates and activations",
    "w1w3": "norms, gates, activations and wide products",
    "attention": "all but attention",
    "full": "everything",
}


def device_for(config: Config, gpu: str | None) -> Device | None:
    """The card that `gpu` names, or the one of this machine, with the config's budget if it sets one.

    None: neither is known, and there is no budget.

    Raises:
        ConfigError: `gpu` is not known.
    """
    budget = config.memory.budget_gb
    found = cards.here() if gpu is None else None
    card = cards.named(gpu) if gpu is not None else cards.find(found.name) if found else None
    limit = budget * 1e9 if not isinstance(budget, str) else cards.usable_bytes(found.memory_bytes) if found else None
    if limit is None:
        limit = cards.usable_bytes(card.memory_gb * 1e9) if card else None
    name = f"a {card.name}" if card else found.name if found else "this budget"
    return None if limit is None else Device(name, limit, card)


def plan_for(checked: Checked, device: Device, gpu: bool | None = None, processes: int = 1) -> Plan:
    """How `checked` runs on `device`, with main memory shared by so many processes."""
    job, host = preflight.job_of(checked, gpu), preflight.system_memory_bytes() / processes
    wanted = planner.wanted(checked.config, job.shape.n_layers)
    return planner.choose(job, wanted, device.limit_bytes, host, device.card)


def lines(checked: Checked, gpu: str | None, price: float | None) -> list[str]:
    """Memory, time and cost; on four sizes of card where none is known."""
    device = device_for(checked.config, gpu)
    if device is not None:
        return _of_device(checked, device, price)
    if memory.parameters_of(preflight.job_of(checked).shape) <= memory.LARGEST_ON_CPU:
        return _of_device(checked, Device("cpu", preflight.system_memory_bytes(), None), price)
    found = ["memory and time, predicted (no NVIDIA GPU found here; --gpu NAME shows more of one):"]
    for name in EXAMPLES:
        card = CARDS[name]
        plan = plan_for(checked, Device(name, cards.usable_bytes(card.memory_gb * 1e9), card))
        found.append(f"  {card.memory_gb:4.1f} GB ({name}): {_short(checked, plan, card)}")
    return found


def in_words(plan: Plan) -> str:
    """The plan in one line, for the log."""
    return f"{_weights(plan)}; recomputed: {_recomputed(plan)}; {plan.peak.total / 1e9:.2f} GB predicted, {plan.why}"


def _short(checked: Checked, plan: Plan, card: Card) -> str:
    if not plan.fits:
        return f"does not fit ({plan.peak.total / 1e9:.1f} GB)"
    largest = max(plan.job.sizes, key=plan.job.tokens)
    mode = plan.mode_of(plan.job.tokens(largest))
    return (
        f"{plan.peak.total / 1e9:.1f} GB, {_weights(plan)}, recomputing {MODES_IN_WORDS[mode]} at "
        f"{largest.width}x{largest.height}, {_hours(_run_seconds(checked, plan, card)[0])}"
    )


def _of_device(checked: Checked, device: Device, price: float | None) -> list[str]:
    plan = plan_for(checked, device)
    peak = plan.peak
    is_preview = peak == memory.preview(plan.job, plan.form)
    where = "in a preview" if is_preview else f"at {plan.job.most_tokens} tokens"
    found = [
        f"memory on {device.name} ({device.limit_bytes / 1e9:.1f} GB), predicted:",
        f"  frozen transformer        {peak.weights / 1e9:6.2f} GB  {_weights(plan)}",
        f"  LoRA, gradient, optimizer {peak.lora / 1e9:6.2f} GB",
        f"  activations               {peak.activations / 1e9:6.2f} GB  {where}",
        f"  CUDA and fragmentation    {peak.context / 1e9:6.2f} GB",
        f"  at the most               {peak.total / 1e9:6.2f} GB",
        f"  recomputed: {_recomputed(plan)}",
        f"  why: {plan.why}",
    ]
    if not plan.fits:
        less = preflight.less_memory(checked, device.limit_bytes)
        found.append(f"  this does not fit {device.limit_bytes / 1e9:.1f} GB: {less}")
    return [*found, *_shares(checked, plan, device.card), *_time(checked, plan, device, price)]


def _weights(plan: Plan) -> str:
    kind = plan.form.kind or plan.job.dtype
    streamed = plan.form.streamed
    if not streamed:
        return kind
    host = memory.host_bytes(plan.job, plan.form) / 1e9
    return f"{kind}, {streamed} of {plan.job.shape.n_layers} blocks streamed from {host:.1f} GB of main memory"


def _recomputed(plan: Plan) -> str:
    """Each mode that some batch of the job may need, with the most tokens that it is for."""
    parts: list[str] = []
    for mode, most in plan.limits.items():
        if most >= plan.job.most_tokens:
            return ", ".join([*parts, MODES_IN_WORDS[mode] + (" beyond" if parts else "")])
        if most > 0:
            parts.append(f"{MODES_IN_WORDS[mode]} up to {most} tokens")
    return ", ".join(parts)


def _shares(checked: Checked, plan: Plan, card: Card | None) -> list[str]:
    """Where the time and the memory of the run go, by resolution and to previews."""
    by_resolution: dict[int, Counter[Bucket]] = {}
    for item in checked.items:
        by_resolution.setdefault(item.resolution, Counter())[item.size] += 1
    speed = card or cards.TYPICAL
    spent = {
        resolution: math.fsum(n / plan.job.batch(size) * plan.seconds(size, speed) for size, n in sizes.items())
        for resolution, sizes in by_resolution.items()
    }
    epoch = math.fsum(spent.values())
    found = ["where it goes:"]
    for resolution, sizes in sorted(by_resolution.items()):
        most = max((plan.step(size) for size in sizes), key=lambda one: one.total)
        largest = max(sizes, key=plan.job.tokens)
        a_step = f", {plan.seconds(largest, card):.2f} s a step" if card else ""
        mode = plan.mode_of(plan.job.tokens(largest))
        share = f"{spent[resolution] / epoch:.0%} of the training time"
        what = f"{most.total / 1e9:.2f} GB a step, recomputing {MODES_IN_WORDS[mode]}{a_step}"
        found.append(f"  {resolution} px: {share}, {what}")
    whole, previews = _run_seconds(checked, plan, speed)
    recipes, times = len(plan.job.previews), _previews_in_a_run(checked.config)
    drawing = memory.preview(plan.job, plan.form).total / 1e9
    found.append(f"  previews: {times} times {recipes} pictures, {previews / whole:.0%} of the run, {drawing:.2f} GB")
    return found


def _time(checked: Checked, plan: Plan, device: Device, price: float | None) -> list[str]:
    known = measured.correction(memo(checked.config), device.key)
    if device.card is None and known is None:
        return ["time: not known for this device before a run on it; --gpu NAME predicts it for a card"]
    whole = _run_seconds(checked, plan, device.card or cards.TYPICAL)[0] * (known.time if known else 1.0)
    how = f"predicted; {known.in_words()}" if known else "predicted"
    cost = f", at {price:g} an hour {whole / 3600 * price:.2f}" if price is not None else ""
    return [f"time on {device.name}: {_hours(whole)} for {checked.config.train.steps} steps ({how}){cost}"]


def memo(config: Config) -> Path:
    """Where measured runs are remembered."""
    return cache_folder(config) / "measured.json"


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _run_seconds(checked: Checked, plan: Plan, card: Card) -> tuple[float, float]:
    """The whole run, and its previews alone."""
    config, job = checked.config, plan.job
    batches = {size: number / job.batch(size) for size, number in job.sizes.items()}
    mean = math.fsum(number * plan.seconds(size, card) for size, number in batches.items()) / sum(batches.values())
    drawing = math.fsum(flops.preview_seconds(job, plan.form, one, card) for one in job.previews)
    if checked.weights is None or checked.weights.sources.adapter is not None:  # taken out and merged again
        drawing += 2 * memory.model_bytes(replace(job, dtype="bf16"), None) / READ_BYTES_PER_SECOND
    previews = drawing * _previews_in_a_run(config) if job.previews else 0.0
    looking = math.fsum(flops.forward_seconds(job, plan.form, item.size, 1, card) for item in checked.held_out)
    every, steps = config.validation.every, config.train.steps
    validating = looking * SIGMAS_IN_A_VALIDATION * (-(-steps // every) + 1) if every else 0.0
    return steps * config.train.accumulate * mean + previews + validating, previews


def _previews_in_a_run(config: Config) -> int:
    every, steps = config.sample.every, config.train.steps
    if every is None:
        return 0
    return -(-steps // every) + config.sample.first
