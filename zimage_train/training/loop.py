"""The training loop. Everything random in it is a function of the step, so a run can stop and resume at any step."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch

from zimage_train.errors import DivergedError, Problem, Stopped
from zimage_train.io import operating_system
from zimage_train.optim import optimizers
from zimage_train.optim.schedules import base_lr, lr_factor
from zimage_train.planning import devices
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.rng import keyed_int
from zimage_train.training.batches import Batch, load_batch
from zimage_train.training.distributed import all_reduce_gradients
from zimage_train.training.outputs import after_step, preview, save_checkpoint
from zimage_train.training.signals import BEFORE_TRAINING
from zimage_train.training.state import TrainState
from zimage_train.training.step_timer import reserved_bytes
from zimage_train.training.validation import validate

MAX_CONSECUTIVE_SKIPS = 5
"""Steps in a row whose loss or gradient is not finite, after which the run ends with an error."""


def train(state: TrainState, metrics: RecordWriter, events: RecordWriter) -> None:
    """Train from the step after `state.start_step` to the last step.

    Raises:
        Stopped: a signal came; the step was finished and saved.
        DivergedError: the loss or the gradient was not finite `MAX_CONSECUTIVE_SKIPS` times in a row.
    """
    config, world, run_step = state.config, state.world, state.run_step
    flat, last_step = state.lora.flat, config.train.steps
    num_skipped = trailing_skips(state)
    try:
        before_first_step(state, metrics, events)
    except Stopped:
        stop(state, state.start_step, metrics, events)
    state.frozen.model.train()
    began = time.monotonic()
    for step, batches in prefetch(state):
        optimizers.set_lr(state.optimizer, base_lr(config.optimizer) * lr_factor(config.schedule, step, last_step))
        lr = optimizers.current_lr(state.optimizer)
        num_samples = sum(len(samples) for samples in state.order.step_batches(step))  # of all processes
        sums = torch.zeros(len(run_step.loss_names), device=world.device)
        for index, batch in enumerate(batches):
            if index > 0 and world.world_size == 1 and state.stop.signal_number is not None:
                # Of this step only gradients exist. A rented machine may be gone before the other batches are done.
                stop(state, step - 1, metrics, events)
            # Dropout draws from torch's global generator; seeded by the step, a resumed run draws the same masks.
            torch.manual_seed(keyed_int(config.seed, "dropout", step, index, world.rank))
            # Smaller batches at the end of an epoch count by their samples.
            sums += run_step(batch, len(batch.samples) / num_samples)
        # A signal may reach one process a step before another: all of them stop after the step in which any asks.
        wants_stop = sums.new_full((1,), float(state.stop.signal_number is not None))
        reduced = all_reduce_gradients(world, flat.grads, torch.cat([sums, wants_stop]))
        norm = torch.linalg.vector_norm(flat.grads)
        # Every value that is read makes the CPU wait for the GPU, so all are read at once.
        *loss_values, stop_votes, norm_value = torch.cat([reduced, norm.reshape(1)]).tolist()
        is_finite = all(math.isfinite(value) for value in (*loss_values, norm_value))
        if is_finite:  # the same in all processes, since both loss and gradient are reduced
            if config.train.max_grad_norm is not None:
                flat.clip_grads(norm, config.train.max_grad_norm)
            state.optimizer.step()
            if state.ema is not None:
                state.ema.update(flat.whole, step)
        flat.zero_grad()
        num_skipped = 0 if is_finite else num_skipped + 1
        record = step_record(step, batches, dict(zip(run_step.loss_names, loss_values, strict=True)), lr, norm_value)
        record |= {"seconds": round(time.monotonic() - began, 4), "gb": memory_gb(world.device)}
        log_step(state, record, batches, metrics)
        # A run of fewer steps fails if it skips all of them.
        if num_skipped == min(MAX_CONSECUTIVE_SKIPS, last_step):
            raise diverged(record, num_skipped)
        try:
            after_step(state, step, events, metrics)
        except Stopped:  # while it drew or validated, which the next start does
            stop(state, step, metrics, events)
        # What came within `after_step` is seen by a process alone; others vote on it in the next step.
        wants_stop_now = stop_votes or (world.world_size == 1 and state.stop.signal_number is not None)
        if wants_stop_now and step < last_step:
            stop(state, step, metrics, events)
        began = time.monotonic()


def before_first_step(state: TrainState, metrics: RecordWriter, events: RecordWriter) -> None:
    """Validate and preview the untrained LoRA, or finish what is due after the step that the run continues from."""
    if state.start_step > 0:
        # A crash between the checkpoint and the previews leaves them missing; those that exist are not drawn again.
        after_step(state, state.start_step, events, metrics)
    elif state.world.is_main:
        validate(state, 0, events)
        if state.config.sample.every is not None and state.config.sample.first:
            preview(state, 0, events)


def prefetch(state: TrainState) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each remaining step with its micro-batches; meanwhile a thread reads those of the next step."""

    def load(step: int) -> list[Batch]:
        batches = [load_batch(state.config, state.dataset, samples) for samples in state.micro_batches(step)]
        return [batch.pin_memory() for batch in batches] if state.world.device.type == "cuda" else batches

    steps = range(state.start_step + 1, state.config.train.steps + 1)
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(load, steps[0]) if steps else None
        for step in steps:
            assert ahead is not None
            batches = ahead.result()
            ahead = reader.submit(load, step + 1) if step < steps[-1] else None
            yield step, batches


def step_record(
    step: int, batches: list[Batch], loss_values: dict[str, float], lr: float, norm: float
) -> dict[str, Any]:
    """Return the record of a step for metrics.jsonl; sigmas and samples are those of this process, in the same order.

    `loss_values` and `norm` are those of all processes together.
    """
    is_finite = all(math.isfinite(value) for value in (*loss_values.values(), norm))
    record: dict[str, Any] = {"step": step}
    for name, value in loss_values.items():
        record[name] = value if is_finite else None  # JSON has no NaN
    record["lr"] = lr
    record["grad_norm"] = norm if math.isfinite(norm) else None
    if not is_finite:
        record["not_finite"] = f"loss {sum(loss_values.values()):g}, gradient norm {norm:g}"
    record["sigma"], record["samples"] = [], []
    for batch in batches:
        record["sigma"] += batch.sigma.tolist()
        for sample in batch.samples:
            record["samples"].append(f"{sample.item.image.path.name}@{sample.item.resolution}")
    return record


def log_step(state: TrainState, record: dict[str, Any], batches: list[Batch], metrics: RecordWriter) -> None:
    """Write the record of a step to metrics.jsonl and the trackers, and show it; warn of a skipped or a slow step."""
    if not state.world.is_main:
        return
    metrics.append(record)
    state.trackers.record(record)
    step, loss = record["step"], record["loss"]
    if loss is None:
        state.console.warning(
            f"step {step} skipped: not finite ({record['not_finite']}) with {', '.join(record['samples'])} at sigma "
            f"{', '.join(f'{sigma:.3f}' for sigma in record['sigma'])}"
        )
        return
    samples = chain.from_iterable(batch.samples for batch in batches)
    resolutions = tuple(sorted(sample.item.resolution for sample in samples))
    if warning := state.slow_steps.update(resolutions, record["seconds"], *reserved_bytes(state.world.device)):
        state.console.warning(f"step {step}: {warning}")
    note = f"loss {loss:.4f}  lr {record['lr']:.2e}  {record['seconds']:.2f} s/step  {record['gb']:.1f} GB"
    state.console.progress("training", step, state.config.train.steps, note)


def stop(state: TrainState, step: int, metrics: RecordWriter, events: RecordWriter) -> None:
    """Save `step`, the last one that was trained, unless it is saved already; and raise, as a signal asked.

    Raises:
        Stopped: always.
    """
    if state.world.is_main and step > 0:  # before the first step there is nothing to save, nor to continue from
        metrics.sync()
        if step > state.last_save.step:
            save_checkpoint(state, step)
        events.append({"step": step, "event": "stopped"})
    raise state.stop.error(f"after step {step}, which is saved" if step > 0 else BEFORE_TRAINING)


def trailing_skips(state: TrainState) -> int:
    """Return how many of the last steps before this start were skipped in a row, so that a restart goes on counting."""
    count = 0
    for record in read_records(state.folder.metrics):
        if 0 < record["step"] <= state.start_step:
            count = count + 1 if record.get("loss") is None else 0
    return count


def diverged(record: dict[str, Any], num_skipped: int) -> DivergedError:
    """Return the error of a run that has skipped too many steps in a row."""
    what = (
        f"loss or gradient not finite {num_skipped} times in a row, last {record['not_finite']} with "
        f"{', '.join(record['samples'])}"
    )
    todo = "lower optimizer.lr or look at these images; the last checkpoint is good"
    return DivergedError(Problem(f"step {record['step']}", what, todo, "diverged"))


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process so far, GB: of the GPU, or without a GPU, of the machine."""
    gpu_gb = devices.peak_gpu_gb(device)
    return round(operating_system.peak_memory_bytes() / 1e9, 3) if gpu_gb is None else gpu_gb
