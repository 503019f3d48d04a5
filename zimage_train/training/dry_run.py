"""Before step 1: the largest batch, a preview and a save, so that what cannot work fails now and not after hours.

Nothing of it stays: no gradient, no file, no random state.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from zimage_train.config.values import Mode
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import Item, MicroBatch
from zimage_train.diffusion.render import render
from zimage_train.errors import DiskError
from zimage_train.io import atomic as files
from zimage_train.io import tensorfile
from zimage_train.lora import lora_file as lora_files
from zimage_train.lora import verify as loaders
from zimage_train.optim import optimizers as optim
from zimage_train.planning import calibration as measured
from zimage_train.planning import forecast, memory
from zimage_train.planning import gpus as cards
from zimage_train.planning.gpus import Card
from zimage_train.planning.memory import OPTIMIZER_BYTES, padded
from zimage_train.planning.planner import Plan
from zimage_train.training.fit import recompute_as_planned
from zimage_train.training.loss import Batch, losses
from zimage_train.training.state import Run


def rehearse(run: Run) -> tuple[Run, Mapping[str, Any]]:
    """Do what costs most of each kind once; returns the run, with the plan that held, and what it took, for run.json.

    Raises:
        OutOfMemoryError: the card has less than the smallest plan takes.
        ZImageTrainError: a checkpoint or a LoRA cannot be written and read back.
    """
    device = run.world.device
    run.console.say(
        f"rehearsing {'the largest batches, a preview' if _draws(run) else 'the largest batches'} and a save"
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what encoding and loading took is over
    with _room_for_the_optimizer(run):
        plan, seconds = _largest_batches(run)
        facts: dict[str, Any] = {"seconds": round(seconds, 3), "gb": gigabytes(device)}
        if run.world.is_main:
            _preview(run)
    if run.world.is_main:
        _save(run)
        facts["gb_with_preview"] = gigabytes(device)
    if (taken := gigabytes(device)) is not None:
        run.console.say(f"rehearsal: {taken:.2f} GB at the most, predicted {plan.peak.allocated / 1e9:.2f} GB")
    return replace(run, memory=plan), facts


@contextlib.contextmanager
def _room_for_the_optimizer(run: Run) -> Iterator[None]:
    """Hold what the optimizer will take from its first step on, unless it has it already."""
    needed = 0 if run.optimizer.state else int(run.memory.job.trained * OPTIMIZER_BYTES[run.config.optimizer.name])
    held = torch.empty(needed, dtype=torch.uint8, device=run.world.device)
    yield
    del held


def gigabytes(device: torch.device) -> float | None:
    """The most that this process has taken of the GPU; None without one, where a process's size says little."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None


def _largest_batches(run: Run) -> tuple[Plan, float]:
    """The largest batch of every mode, and the seconds that they take; where memory runs out, more is recomputed.

    The plan that comes back has held for all of them.
    """
    plan, seconds = run.memory, 0.0
    held: set[tuple[Mode, int]] = set()
    while (mode_and_samples := _untried(run, plan, held)) is not None:
        mode, samples = mode_and_samples
        outcome = _attempt(run, run.load(samples))
        if not isinstance(outcome, torch.OutOfMemoryError):
            held.add((mode, _tokens(run, samples)))
            seconds = max(seconds, outcome)
            continue
        lighter = _recomputing_more(plan, _tokens(run, samples))
        if lighter is None:
            raise outcome
        plan = lighter
        torch.cuda.empty_cache()
        recompute_as_planned(run.frozen.model, plan, run.config.lora.dropout)
        run.console.warn("a batch did not fit as planned: more is recomputed in this run")
    return plan, seconds


def _untried(run: Run, plan: Plan, held: set[tuple[Mode, int]]) -> tuple[Mode, MicroBatch] | None:
    """Of the largest batches, one for each mode of `plan`, the one predicted to take most that was not yet tried."""
    largest: dict[Mode, MicroBatch] = {}
    for samples in sorted(_full_batches(run), key=lambda one: _tokens(run, one)):
        largest[plan.mode_of(_tokens(run, samples))] = samples
    left: dict[Mode, MicroBatch] = {
        mode: samples for mode, samples in largest.items() if (mode, _tokens(run, samples)) not in held
    }

    def predicted(one: tuple[Mode, MicroBatch]) -> int:
        return memory.step(plan.job, plan.form, one[0], _tokens(run, one[1])).total

    return max(left.items(), key=predicted, default=None)


def _attempt(run: Run, batch: Batch) -> float | torch.OutOfMemoryError:
    """Seconds of a step, or that memory ran out; what the step held is free again when this returns."""
    try:
        return _step(run, batch)
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)
    finally:
        run.optimizer.zero_grad(set_to_none=True)


def _full_batches(run: Run) -> list[MicroBatch]:
    """Of each size as many samples as a micro-batch holds, with the longest captions."""
    alike: dict[tuple[Bucket, int, bool], list[Item]] = {}
    for item in run.plan.items:
        of_class = bool(run.config.data[item.entry].regularisation)
        alike.setdefault((item.size, run.plan.most_of(item), of_class), []).append(item)
    by_length = {key: sorted(items, key=lambda item: len(item.picture.longest)) for key, items in alike.items()}
    return [tuple(map(run.plan.whole, items[-most:])) for (_, most, _), items in by_length.items()]


def _tokens(run: Run, samples: MicroBatch) -> int:
    """Of the joined sequence, as the blocks see it."""
    size = samples[0].item.size
    prompts = {text for one in samples for text in (one.prompt, one.held) if text is not None}
    captions = max(padded(run.inputs.embeds(prompt).shape[0]) for prompt in prompts)
    return len(samples) * (padded(size.width * size.height // 256) + captions)


def _recomputing_more(plan: Plan, tokens: int) -> Plan | None:
    """`plan` with the next mode for batches of `tokens` and more; None: there is none."""
    current = plan.mode_of(tokens)
    modes = list(plan.limits)
    if current == modes[-1]:
        return None
    given_up = modes[: modes.index(current) + 1]
    lower = {mode: min(most, tokens - 1) if mode in given_up else most for mode, most in plan.limits.items()}
    return replace(plan, limits=lower)


def _step(run: Run, batch: Batch) -> float:
    began = time.monotonic()
    model = run.frozen.model.train()
    there = batch.to(run.world.device, model.dtype)
    for loss in losses(model, there, run.config):
        loss.objective.backward()
    if run.world.device.type == "cuda":
        torch.cuda.synchronize(run.world.device)
    return time.monotonic() - began


def _preview(run: Run) -> None:
    """One step of the largest preview, and its decoding, unless pictures are drawn before step 1 anyway."""
    if not _draws(run):
        return
    recipes = [recipe for view in run.views for recipe in view.recipes]
    largest = max(recipes, key=lambda one: one.width * one.height * (2 if one.guidance > 0 else 1))
    with run.previewed(run.attached.factors()):
        render(run.frozen, run.extras, [replace(largest, steps=1)], run.preview_embeds, lambda done, total: None)


def _draws(run: Run) -> bool:
    return any(view.recipes for view in run.views) and not (run.start == 0 and run.config.sample.first)


def _save(run: Run) -> None:
    """A checkpoint and a LoRA, written and read back."""
    path, trained, dtype = run.folder.rehearsal, run.attached.factors(), run.config.save.dtype
    try:
        tensorfile.save_sealed(path, run.attached.state() | optim.state(run.optimizer)[0], {})
        tensorfile.load_sealed(path)
        lora_files.export(path, trained, dtype, run.export_metadata)
        loaders.verify(path, trained, dtype, run.frozen.shape.linears)
    finally:
        files.remove(path)


def compare(run: Run, records: list[dict[str, Any]]) -> None:
    """Say how the run compares with its prediction, and remember it for the next ones; `records` are its steps."""
    device = run.world.device
    card = cards.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    name = card.name if card else torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    steps = [(one["seconds"], _predicted_seconds(run, one["step"], card or cards.TYPICAL)) for one in records]
    predicted_gb = run.memory.peak.allocated / 1e9
    name = measured.key(name, memory.parameters_of(run.frozen.shape))
    found = measured.measure(name, steps, gigabytes(device), predicted_gb)
    if found is None:
        return
    of_memory = f", memory x{found.memory_ratio:.2f}" if found.memory_ratio is not None else ""
    if card is not None:
        run.console.say(f"measured {found.seconds:.2f} s a step: x{found.time_ratio:.2f} of the prediction{of_memory}")
    try:
        measured.remember(forecast.memo(run.config), found)
    except DiskError as error:  # a memo: the run is worth more
        run.console.warn(str(error))


def _predicted_seconds(run: Run, step: int, card: Card) -> float:
    """Of the micro-batches of this process."""
    own = run.micro_batches(step)
    sizes = ((samples[0].item.size, len(samples)) for samples in own)
    return sum(run.memory.seconds(size, card) * number / run.memory.job.batch(size) for size, number in sizes)
