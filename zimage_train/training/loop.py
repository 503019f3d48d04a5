"""The loop. Everything random in it is a function of the step, so it can be left and entered anywhere."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from zimage_train.dataset.sample_order import MicroBatch
from zimage_train.errors import DivergedError, Problem
from zimage_train.io import operating_system
from zimage_train.optim import optimizers
from zimage_train.optim.schedules import base_lr, lr_factor
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.rng import keyed_int
from zimage_train.training.distributed import all_reduce_gradients
from zimage_train.training.loss import Batch, losses
from zimage_train.training.outputs import after_step, preview, save_checkpoint
from zimage_train.training.state import TrainState
from zimage_train.training.step_timer import reserved_bytes
from zimage_train.training.validation import validate

MAX_CONSECUTIVE_SKIPS = 5

LoadedBatch = tuple[MicroBatch, Batch]


def train(run: TrainState, metrics: RecordWriter, events: RecordWriter) -> None:
    """Train from `run.start` to the last step.

    Raises:
        Stopped: a signal came; the step was finished and saved.
        DivergedError: the loss or the gradient was not finite five times in a row.
    """
    config, model, world = run.config, run.frozen.model, run.world
    parameters = run.lora.parameters()
    rate, last = base_lr(config.optimizer), config.train.steps
    shown = ("loss",) if config.preserve.kind is None else ("loss", "preservation")
    skipped = trailing_skips(run)
    if run.start_step == 0 and world.is_main:
        validate(run, 0, events)
    if run.start_step == 0 and config.sample.every is not None and config.sample.first and world.is_main:
        preview(run, 0, events)
    if run.start_step > 0:
        after_step(run, run.start_step, events, metrics)  # what a crash right after the checkpoint left undone
    model.train()
    began = time.monotonic()
    for step, loaded in prefetch(run):
        optimizers.set_lr(run.optimizer, rate * lr_factor(config.schedule, step, last))
        lr = optimizers.current_lr(run.optimizer)
        num_samples = sum(len(samples) for samples in run.order.step_batches(step))
        sums = {name: torch.zeros((), device=world.device) for name in shown}
        for index, (samples, batch) in enumerate(loaded):
            torch.manual_seed(keyed_int(config.seed, "dropout", step, index, world.rank))
            share = len(samples) / num_samples
            for loss in losses(model, batch.to(world.device, model.dtype), config):
                (loss.objective * share).backward()
                sums[loss.name] += loss.plain * share
        wants_stop = float(run.stop.signal_number is not None)
        numbers = all_reduce_gradients(
            world, parameters, torch.stack([*sums.values(), sums["loss"].new_tensor(wants_stop)])
        )
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        *values, stop_votes, norm_value = torch.cat([numbers, norm.reshape(1)]).tolist()  # the one synchronisation
        is_finite = all(abs(value) < float("inf") for value in (*values, norm_value))
        if is_finite:
            if config.train.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, config.train.max_grad_norm, norm)
            run.optimizer.step()
            if run.ema is not None:
                run.ema.update(run.lora.state(), step)
        run.optimizer.zero_grad(set_to_none=True)
        skipped = 0 if is_finite else skipped + 1
        outcome: dict[str, Any] = {
            **{name: value if is_finite else None for name, value in zip(shown, values, strict=True)},
            "lr": lr,
            "grad_norm": norm_value if norm_value < float("inf") else None,
        }
        if not is_finite:
            outcome["not_finite"] = f"loss {sum(values):g}, gradient norm {norm_value:g}"
        record = step_record(run, step, loaded, outcome, time.monotonic() - began)
        log_step(run, record, resolutions(loaded), metrics)
        if skipped == min(MAX_CONSECUTIVE_SKIPS, last):
            raise diverged(record, skipped)
        after_step(run, step, events, metrics)
        if stop_votes and step < last:
            stop(run, step, metrics, events)
        began = time.monotonic()


def prefetch(run: TrainState) -> Iterator[tuple[int, list[LoadedBatch]]]:
    """Every step that is left with its micro-batches, the next one read and drawn while this one trains."""

    def load(step: int) -> list[LoadedBatch]:
        return [(samples, run.load(samples)) for samples in run.micro_batches(step)]

    steps = range(run.start_step + 1, run.config.train.steps + 1)
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(load, steps[0]) if steps else None
        for step in steps:
            assert ahead is not None
            loaded = ahead.result()
            ahead = reader.submit(load, step + 1) if step < steps[-1] else None
            yield step, loaded


def step_record(
    run: TrainState, step: int, loaded: list[LoadedBatch], outcome: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The record of a step in metrics.jsonl; sigma and samples are those of this process, in the same order."""
    samples = [sample for micro_batch, _ in loaded for sample in micro_batch]
    return {
        "step": step,
        **outcome,
        "sigma": [sigma for _, batch in loaded for sigma in batch.sigma.tolist()],
        "samples": [f"{sample.item.image.path.name}@{sample.item.resolution}" for sample in samples],
        "seconds": round(seconds, 4),
        "gb": memory_gb(run.world.device),
    }


def log_step(run: TrainState, record: dict[str, Any], kind: tuple[int, ...], metrics: RecordWriter) -> None:
    """Write the record of a step of this `kind`, and show it."""
    if not run.world.is_main:
        return
    metrics.append(record)
    run.trackers.record(record)
    step, loss = record["step"], record["loss"]
    if loss is None:
        run.console.warning(
            f"step {step} skipped: not finite ({record['not_finite']}) with {', '.join(record['samples'])} at sigma "
            f"{', '.join(f'{sigma:.3f}' for sigma in record['sigma'])}"
        )
        return
    if warning := run.slow_steps.update(kind, record["seconds"], *reserved_bytes(run.world.device)):
        run.console.warning(f"step {step}: {warning}")
    note = f"loss {loss:.4f}  lr {record['lr']:.2e}  {record['seconds']:.2f} s/step  {record['gb']:.1f} GB"
    run.console.progress("training", step, run.config.train.steps, note)


def resolutions(loaded: list[LoadedBatch]) -> tuple[int, ...]:
    """What steps of one kind have alike, and what their time depends on."""
    return tuple(sorted(sample.item.resolution for micro_batch, _ in loaded for sample in micro_batch))


def stop(run: TrainState, step: int, metrics: RecordWriter, events: RecordWriter) -> None:
    """Save `step` and leave, as a signal asked.

    Raises:
        Stopped: always.
    """
    if run.world.is_main:
        metrics.sync()
        save_checkpoint(run, step)
        events.append({"step": step, "event": "stopped"})
    raise run.stop.error(f"after step {step}, which is saved")


def trailing_skips(run: TrainState) -> int:
    """How many steps before this start were skipped in a row: a new start is no new chance."""
    losses = [record.get("loss") for record in read_records(run.folder.metrics) if 0 < record["step"] <= run.start_step]
    return next((count for count, loss in enumerate(reversed(losses)) if loss is not None), len(losses))


def diverged(record: dict[str, Any], skipped: int) -> DivergedError:
    """What to say when nothing finite has come for too long."""
    what = (
        f"loss or gradient not finite {skipped} times in a row, last {record['not_finite']} with "
        f"{', '.join(record['samples'])}"
    )
    todo = "lower optimizer.lr or look at these images; the last checkpoint is good"
    return DivergedError(Problem(f"step {record['step']}", what, todo))


def memory_gb(device: torch.device) -> float:
    """The most memory this process has taken so far, in GB: of the GPU, or of the machine."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return round(operating_system.peak_memory_bytes() / 1e9, 3)
