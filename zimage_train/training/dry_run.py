"""The dry run before the first step, so that failures come now and not in hours; and its counterpart after the last.

The dry run tries the largest batches, a preview and a save. It trains nothing and leaves no file, but adds what it
measured to run.json. Dropout advances torch's generator, which the loop seeds anew for each micro-batch.

After the last step, `compare_with_forecast` compares the time and memory of the run with their predictions.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.types import RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import Sample, TrainItem
from zimage_train.diffusion.render import render_images
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import DiskError
from zimage_train.io import atomic, tensorfile
from zimage_train.lora import lora_file, verify
from zimage_train.models.arch import image_tokens, padded_tokens
from zimage_train.optim import optimizers
from zimage_train.planning import calibration, devices, forecast, gpus, memory
from zimage_train.planning.gpus import GpuSpec
from zimage_train.planning.planner import MemoryPlan
from zimage_train.training import run_dir
from zimage_train.training.batches import Batch, load_batch
from zimage_train.training.kernel_checks import check_blocks, check_replay
from zimage_train.training.state import TrainState


def dry_run(state: TrainState) -> TrainState:
    """Try the most expensive work of each kind once, and return the state with the memory plan under which it fitted.

    Time and peak memory are added to run.json. Without a step left, nothing is tried.

    Raises:
        torch.OutOfMemoryError: a batch does not fit even with the mode that recomputes most.
        ZImageTrainError: a checkpoint or a LoRA cannot be written and read back.
    """
    if state.start_step >= state.config.train.steps:
        return state
    device = state.world.device
    tried = "the largest batches, a preview" if _has_previews_to_try(state) else "the largest batches"
    state.console.info(f"rehearsing {tried} and a save")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the peak of encoding and loading is not that of training
    with _reserved_for_optimizer(state):
        smallest = min(_full_batches(state), key=lambda batch: _sequence_tokens(state, batch))
        state = replace(state, memory_plan=check_blocks(state, smallest[0]))
        plan, seconds = _try_largest_batches(state)
        facts: dict[str, Any] = {"seconds": round(seconds, 3), "gb": devices.peak_gpu_gb(device)}
        if state.world.is_main:
            _try_preview(state)
    if state.world.is_main:
        _try_save(state)
        facts["gb_with_preview"] = devices.peak_gpu_gb(device)
        run_dir.add_facts(state.folder, {"rehearsal": facts})
    peak_gb = devices.peak_gpu_gb(device)
    if peak_gb is not None:
        state.console.info(f"rehearsal: {peak_gb:.2f} GB at the most, predicted {plan.peak.allocated / 1e9:.2f} GB")
    return replace(state, memory_plan=plan)


@contextlib.contextmanager
def _reserved_for_optimizer(state: TrainState) -> Iterator[None]:
    """Within the block, occupy the memory that the optimizer needs in a step and does not hold yet."""
    spec = OPTIMIZERS[state.config.optimizer.name]
    missing_bytes = spec.update_bytes if state.optimizer.state else spec.state_bytes + spec.update_bytes
    missing_bytes = int(state.memory_plan.workload.trained * missing_bytes)
    placeholder = torch.empty(missing_bytes, dtype=torch.uint8, device=state.world.device)
    yield
    del placeholder


def _try_largest_batches(state: TrainState) -> tuple[MemoryPlan, float]:
    """Try the largest batch of every recompute mode, and recompute more wherever memory runs out.

    Return the plan under which all of them fitted, and the longest time of a batch, in seconds.
    """
    plan, longest = state.memory_plan, 0.0
    passed: set[tuple[RecomputeMode, int]] = set()
    while (candidate := _next_candidate(state, plan, passed)) is not None:
        mode, samples = candidate
        tokens = _sequence_tokens(state, samples)
        batch = load_batch(state.config, state.dataset, samples)
        outcome = _attempt(state, batch)
        if not isinstance(outcome, torch.OutOfMemoryError):
            passed.add((mode, tokens))
            longest = max(longest, outcome)
            check_replay(state, batch)
            continue
        lighter = _plan_recomputing_more(plan, tokens)
        if lighter is None:
            raise outcome
        plan = lighter
        # The failed attempt leaves the allocator's cache fragmented, and the next allocates blocks of other sizes.
        torch.cuda.empty_cache()
        state.run_step.use_plan(plan)
        state.console.warning("a batch did not fit as planned: more is recomputed in this run")
    return plan, longest


def _next_candidate(
    state: TrainState, plan: MemoryPlan, passed: set[tuple[RecomputeMode, int]]
) -> tuple[RecomputeMode, tuple[Sample, ...]] | None:
    """Return the next mode to try and its largest batch, or None if every mode of `plan` has `passed`.

    A small batch that keeps all its activations may take more memory than a large batch that recomputes them, so the
    largest batch alone would prove nothing about the others. The batch that is predicted to take most comes first.
    """
    largest: dict[RecomputeMode, tuple[Sample, ...]] = {}
    for samples in sorted(_full_batches(state), key=lambda batch: _sequence_tokens(state, batch)):
        largest[plan.mode_of(_sequence_tokens(state, samples))] = samples
    untried: list[tuple[int, RecomputeMode, tuple[Sample, ...]]] = []
    for mode, samples in largest.items():
        tokens = _sequence_tokens(state, samples)
        if (mode, tokens) not in passed:
            untried.append((memory.step_memory(plan.workload, plan.placement, mode, tokens).total, mode, samples))
    if not untried:
        return None
    _, mode, samples = max(untried, key=lambda candidate: candidate[0])
    return mode, samples


def _attempt(state: TrainState, batch: Batch) -> float | torch.OutOfMemoryError:
    """Return the seconds of a step, or the error if memory ran out."""
    try:
        return _step(state, batch)
    except torch.OutOfMemoryError as error:
        # The traceback refers to the frames of the step, which hold its activations; without it they are freed.
        return error.with_traceback(None)
    finally:
        state.lora.flat.zero_grad()


def _full_batches(state: TrainState) -> list[tuple[Sample, ...]]:
    """Return a full micro-batch of each size, batch size and kind of entry, of the items with the longest captions."""
    groups: dict[tuple[Bucket, int, bool], list[TrainItem]] = {}
    for item in state.order.items:
        is_regularization = bool(state.config.data[item.entry].regularization)
        groups.setdefault((item.size, state.order.batch_size_of(item), is_regularization), []).append(item)
    batches = []
    for (_, batch_size, _), items in groups.items():
        by_length = sorted(items, key=lambda item: len(item.image.longest_prompt))
        batches.append(tuple(map(state.order.longest_sample, by_length[-batch_size:])))
    return batches


def _sequence_tokens(state: TrainState, samples: tuple[Sample, ...]) -> int:
    """Return the tokens of images and captions of a batch, with each caption padded to the longest."""
    size = samples[0].item.size
    prompts = {sample.prompt for sample in samples}
    prompts.update(sample.preserve_prompt for sample in samples if sample.preserve_prompt is not None)
    for sample in samples:
        prompts.update(state.config.slider_prompts(sample.prompt))
    caption = max(padded_tokens(state.dataset.embeds(prompt).shape[0]) for prompt in prompts)
    return len(samples) * (image_tokens(size.width, size.height) + caption)


def _plan_recomputing_more(plan: MemoryPlan, tokens: int) -> MemoryPlan | None:
    """Return `plan` with the next mode, which recomputes more, from `tokens` on; None if `plan` has no further mode."""
    modes = list(plan.limits)
    current = plan.mode_of(tokens)
    if current == modes[-1]:
        return None
    limits = dict(plan.limits)
    for mode in modes[: modes.index(current) + 1]:
        limits[mode] = min(limits[mode], tokens - 1)
    return replace(plan, limits=limits)


def _step(state: TrainState, batch: Batch) -> float:
    """Run forward and backward; return the seconds that they took."""
    began = time.monotonic()
    state.frozen.model.train()
    state.run_step(batch, 1.0)
    if state.world.device.type == "cuda":
        torch.cuda.synchronize(state.world.device)
    return time.monotonic() - began


def _try_preview(state: TrainState) -> None:
    """Sample a step of the largest preview and decode it, unless previews are drawn before step 1 anyway."""
    if not _has_previews_to_try(state):
        return
    requests = chain.from_iterable(previews.requests for previews in state.preview_sets)
    largest = max(requests, key=_preview_size)
    with state.run_step.between_steps(), state.with_preview_loras(state.lora.deltas()):
        render_images(
            state.frozen, state.vae_path, [replace(largest, steps=1)], state.preview_embeds, lambda done, total: None
        )


def _preview_size(request: SamplingRequest) -> int:
    """Return the pixels of a forward pass; with guidance it holds the image twice."""
    passes = 2 if request.guidance > 0 else 1
    return request.width * request.height * passes


def _has_previews_to_try(state: TrainState) -> bool:
    is_drawn_anyway = state.start_step == 0 and state.config.sample.first
    return any(previews.requests for previews in state.preview_sets) and not is_drawn_anyway


def _try_save(state: TrainState) -> None:
    """Write a checkpoint and a LoRA, and read them back."""
    path, trained, dtype = state.folder.rehearsal, state.lora.deltas(), state.config.save.dtype
    try:
        tensors = state.lora.state() | state.lora.fixed_state()
        tensorfile.save_with_digest(path, tensors | optimizers.optimizer_state(state.optimizer, state.lora.flat)[0], {})
        tensorfile.load_with_digest(path)
        lora_file.export_lora(path, trained, dtype, state.export_metadata)
        verify.verify_export(path, trained, dtype, state.frozen.shape)
    finally:
        atomic.remove(path)


def compare_with_forecast(state: TrainState, records: list[dict[str, Any]]) -> None:
    """Log the ratio of measured to predicted time and memory, and record it to calibrate later forecasts.

    `records` are those of the steps of this start. Nothing is recorded for a short run, see `calibration.MIN_STEPS`.
    """
    device = state.world.device
    device_name, gpu = "cpu", None
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
        gpu = gpus.find_gpu(device_name)
    if gpu is not None:
        device_name = gpu.name
    times = []
    for record in records:
        times.append((record["seconds"], _predicted_seconds(state, record["step"], gpu or gpus.TYPICAL_GPU)))
    key = calibration.device_key(device_name, memory.parameters_of(state.frozen.shape))
    predicted_gb = state.memory_plan.peak.allocated / 1e9
    measured = calibration.measure(key, times, devices.peak_gpu_gb(device), predicted_gb)
    if measured is None:
        return
    if gpu is not None:
        ratios = f"x{measured.time_ratio:.2f} of the prediction"
        if measured.memory_ratio is not None:
            ratios += f", memory x{measured.memory_ratio:.2f}"
        state.console.info(f"measured {measured.seconds:.2f} s a step: {ratios}")
    try:
        calibration.record_measurement(forecast.calibration_file(state.config), measured)
    except DiskError as error:  # it only helps later forecasts, so the run has not failed
        state.console.warning(str(error))


def _predicted_seconds(state: TrainState, step: int, gpu: GpuSpec) -> float:
    """Return the predicted seconds of the micro-batches of this process in `step`."""
    plan, seconds = state.memory_plan, 0.0
    for samples in state.micro_batches(step):
        size = samples[0].item.size
        seconds += plan.step_seconds(size, gpu) * len(samples) / plan.workload.batch(size)
    return seconds
