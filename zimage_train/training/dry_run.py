"""Before step 1: the largest batch, a preview and a save, so that what cannot work fails now and not after hours.

Nothing of it stays: no gradient, no file, no random state.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.types import RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import Sample, TrainItem
from zimage_train.diffusion.render import render_images
from zimage_train.errors import DiskError
from zimage_train.io import atomic, tensorfile
from zimage_train.lora import lora_file, verify
from zimage_train.models.arch import image_tokens, padded_tokens
from zimage_train.optim import optimizers
from zimage_train.planning import calibration, forecast, gpus, memory
from zimage_train.planning.gpus import GpuSpec
from zimage_train.planning.planner import MemoryPlan
from zimage_train.training import run_dir
from zimage_train.training.batch import Batch, load_batch
from zimage_train.training.fit import apply_recompute_plan
from zimage_train.training.loss import losses
from zimage_train.training.state import TrainState


def dry_run(run: TrainState) -> TrainState:
    """Do what costs most of each kind once, and write what it took to run.json; return the run with the plan that held.

    A run that has no step left is returned as it is.

    Raises:
        OutOfMemoryError: the card has less than the smallest plan takes.
        ZImageTrainError: a checkpoint or a LoRA cannot be written and read back.
    """
    if run.start_step >= run.config.train.steps:
        return run
    device = run.world.device
    run.console.info(
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
        run.console.info(f"rehearsal: {taken:.2f} GB at the most, predicted {plan.peak.allocated / 1e9:.2f} GB")
    run_dir.add_facts(run.folder, {"rehearsal": facts} if run.world.is_main else {})
    return replace(run, memory_plan=plan)


@contextlib.contextmanager
def _room_for_the_optimizer(run: TrainState) -> Iterator[None]:
    """Hold what the optimizer will take from its first step on, unless it has it already."""
    state_bytes = run.memory_plan.job.trained * OPTIMIZERS[run.config.optimizer.name].state_bytes
    needed = 0 if run.optimizer.state else int(state_bytes)
    held = torch.empty(needed, dtype=torch.uint8, device=run.world.device)
    yield
    del held


def gigabytes(device: torch.device) -> float | None:
    """The most that this process has taken of the GPU; None without one, where a process's size says little."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None


def _largest_batches(run: TrainState) -> tuple[MemoryPlan, float]:
    """The largest batch of every mode, and the seconds that they take; where memory runs out, more is recomputed.

    The plan that comes back has held for all of them.
    """
    plan, seconds = run.memory_plan, 0.0
    held: set[tuple[RecomputeMode, int]] = set()
    while (mode_and_samples := _untried(run, plan, held)) is not None:
        mode, samples = mode_and_samples
        outcome = _attempt(run, load_batch(run.config, run.dataset, samples))
        if not isinstance(outcome, torch.OutOfMemoryError):
            held.add((mode, _tokens(run, samples)))
            seconds = max(seconds, outcome)
            continue
        lighter = _recomputing_more(plan, _tokens(run, samples))
        if lighter is None:
            raise outcome
        plan = lighter
        torch.cuda.empty_cache()
        apply_recompute_plan(run.frozen.model, plan, run.config.lora.dropout)
        run.console.warning("a batch did not fit as planned: more is recomputed in this run")
    return plan, seconds


def _untried(
    run: TrainState, plan: MemoryPlan, held: set[tuple[RecomputeMode, int]]
) -> tuple[RecomputeMode, tuple[Sample, ...]] | None:
    """Of the largest batches, one for each mode of `plan`, the one predicted to take most that was not yet tried."""
    largest: dict[RecomputeMode, tuple[Sample, ...]] = {}
    for samples in sorted(_full_batches(run), key=lambda one: _tokens(run, one)):
        largest[plan.mode_of(_tokens(run, samples))] = samples
    left: dict[RecomputeMode, tuple[Sample, ...]] = {
        mode: samples for mode, samples in largest.items() if (mode, _tokens(run, samples)) not in held
    }

    def predicted(one: tuple[RecomputeMode, tuple[Sample, ...]]) -> int:
        return memory.step_memory(plan.job, plan.form, one[0], _tokens(run, one[1])).total

    return max(left.items(), key=predicted, default=None)


def _attempt(run: TrainState, batch: Batch) -> float | torch.OutOfMemoryError:
    """Seconds of a step, or that memory ran out; what the step held is free again when this returns."""
    try:
        return _step(run, batch)
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)
    finally:
        run.optimizer.zero_grad(set_to_none=True)


def _full_batches(run: TrainState) -> list[tuple[Sample, ...]]:
    """Of each size as many samples as a micro-batch holds, with the longest captions."""
    alike: dict[tuple[Bucket, int, bool], list[TrainItem]] = {}
    for item in run.order.items:
        of_class = bool(run.config.data[item.entry].regularization)
        alike.setdefault((item.size, run.order.batch_size_of(item), of_class), []).append(item)
    by_length = {key: sorted(items, key=lambda item: len(item.image.longest_prompt)) for key, items in alike.items()}
    return [tuple(map(run.order.longest_sample, items[-most:])) for (_, most, _), items in by_length.items()]


def _tokens(run: TrainState, samples: tuple[Sample, ...]) -> int:
    """Of the joined sequence, as the blocks see it."""
    size = samples[0].item.size
    prompts = {text for one in samples for text in (one.prompt, one.preserve_prompt) if text is not None}
    captions = max(padded_tokens(run.dataset.embeds(prompt).shape[0]) for prompt in prompts)
    return len(samples) * (image_tokens(size.width, size.height) + captions)


def _recomputing_more(plan: MemoryPlan, tokens: int) -> MemoryPlan | None:
    """`plan` with the next mode for batches of `tokens` and more; None: there is none."""
    current = plan.mode_of(tokens)
    modes = list(plan.limits)
    if current == modes[-1]:
        return None
    given_up = modes[: modes.index(current) + 1]
    lower = {mode: min(most, tokens - 1) if mode in given_up else most for mode, most in plan.limits.items()}
    return replace(plan, limits=lower)


def _step(run: TrainState, batch: Batch) -> float:
    began = time.monotonic()
    model = run.frozen.model.train()
    there = batch.to(run.world.device, model.dtype)
    for loss in losses(model, there, run.config):
        loss.objective.backward()
    if run.world.device.type == "cuda":
        torch.cuda.synchronize(run.world.device)
    return time.monotonic() - began


def _preview(run: TrainState) -> None:
    """One step of the largest preview, and its decoding, unless images are drawn before step 1 anyway."""
    if not _draws(run):
        return
    recipes = [recipe for view in run.preview_sets for recipe in view.requests]
    largest = max(recipes, key=lambda one: one.width * one.height * (2 if one.guidance > 0 else 1))
    with run.with_preview_loras(run.lora.factors()):
        render_images(run.frozen, run.extras, [replace(largest, steps=1)], run.preview_embeds, lambda done, total: None)


def _draws(run: TrainState) -> bool:
    return any(view.requests for view in run.preview_sets) and not (run.start_step == 0 and run.config.sample.first)


def _save(run: TrainState) -> None:
    """A checkpoint and a LoRA, written and read back."""
    path, trained, dtype = run.folder.rehearsal, run.lora.factors(), run.config.save.dtype
    try:
        tensorfile.save_with_digest(path, run.lora.state() | optimizers.optimizer_state(run.optimizer)[0], {})
        tensorfile.load_with_digest(path)
        lora_file.export_lora(path, trained, dtype, run.export_metadata)
        verify.verify_export(path, trained, dtype, run.frozen.shape.linears)
    finally:
        atomic.remove(path)


def compare_with_forecast(run: TrainState, records: list[dict[str, Any]]) -> None:
    """Say how the run compares with its prediction, and remember it for the next ones; `records` are its steps."""
    device = run.world.device
    card = gpus.find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    name = card.name if card else torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    steps = [(one["seconds"], _predicted_seconds(run, one["step"], card or gpus.TYPICAL_GPU)) for one in records]
    predicted_gb = run.memory_plan.peak.allocated / 1e9
    name = calibration.device_key(name, memory.parameters_of(run.frozen.shape))
    found = calibration.measure(name, steps, gigabytes(device), predicted_gb)
    if found is None:
        return
    of_memory = f", memory x{found.memory_ratio:.2f}" if found.memory_ratio is not None else ""
    if card is not None:
        run.console.info(f"measured {found.seconds:.2f} s a step: x{found.time_ratio:.2f} of the prediction{of_memory}")
    try:
        calibration.record_measurement(forecast.calibration_file(run.config), found)
    except DiskError as error:  # a memo: the run is worth more
        run.console.warning(str(error))


def _predicted_seconds(run: TrainState, step: int, card: GpuSpec) -> float:
    """Of the micro-batches of this process."""
    own = run.micro_batches(step)
    sizes = ((samples[0].item.size, len(samples)) for samples in own)
    return sum(run.memory_plan.seconds(size, card) * number / run.memory_plan.job.batch(size) for size, number in sizes)
