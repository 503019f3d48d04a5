"""Validation: the loss on images that are held out, with the same noise every time, so that steps can be compared."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.diffusion import flow
from zimage_train.models.transformer import velocity
from zimage_train.report import metrics
from zimage_train.report.metrics import RecordWriter
from zimage_train.rng import keyed_generator
from zimage_train.training.state import TrainState

QUANTILES = [index / 10 for index in range(1, 10)]


@dataclass(frozen=True)
class ValidationSigmas:
    """Where the loss is measured."""

    trained: list[float]
    """The nine deciles of what is trained on."""
    turbo: list[float]
    """The eight of Turbo's sampler."""


def validation_sigmas(config: Config) -> ValidationSigmas:
    """The noise levels at which the loss of `config` is measured."""
    u, steps, turbo = torch.tensor(QUANTILES, dtype=torch.float64), config.timesteps, VARIANTS["turbo"]
    shift = VARIANTS[config.model.variant].shift
    trained = flow.quantile_sigma(u, steps.type, steps.bias, shift, steps.min, steps.max)
    return ValidationSigmas(trained.tolist(), flow.sampling_sigmas(turbo.steps, turbo.shift)[:-1])


def validate(run: TrainState, step: int, events: RecordWriter) -> None:
    """Measure the loss of `step`, write it to events.jsonl and say how it compares, unless that was done already."""
    if not run.held_out or any(one["step"] == step for one in validation_history(run)):
        return
    at = validation_sigmas(run.config)
    try:
        values = measure(run, [*at.trained, *at.turbo], step)
    except torch.OutOfMemoryError:
        run.console.warning(
            f"validation at step {step} ran out of memory; lower validation.resolution; training goes on"
        )
        return
    by_sigma = list(zip([*at.trained, *at.turbo], values, strict=True))
    nine = len(at.trained)
    record: dict[str, Any] = {
        "step": step,
        "event": "validation",
        "of": validation_subject(run),
        "loss": sum(values[:nine]) / nine,
        "loss_turbo": sum(values[nine:]) / len(at.turbo),
        "by_sigma": [[round(sigma, 4), value] for sigma, value in by_sigma],
    }
    events.append(record)
    run.trackers.validation(step, {name: record[name] for name in ("loss", "loss_turbo")})
    run.console.info(f"step {step}: validation loss {record['loss']:.4f}, at Turbo's sigmas {record['loss_turbo']:.4f}")


@torch.no_grad()
def measure(run: TrainState, at: list[float], step: int) -> list[float]:
    """The mean square error of the velocity at each sigma, over all held-out images; without any loss weight."""
    model, device = run.frozen.model, run.world.device
    was_training = model.training
    model.eval()  # lora.dropout is for training
    try:
        sums = torch.zeros(len(at), dtype=torch.float64, device=device)
        for number, item in enumerate(run.held_out):
            x0 = run.dataset.image_latents(item).float().unsqueeze(0).to(device)
            noise = _noise(run.config, item, x0.shape[1:]).unsqueeze(0).to(device)
            embeds = run.dataset.embeds(item.image.prompts[0]).to(device, model.dtype)
            for index, sigma in enumerate(at):
                level = torch.tensor([sigma], dtype=torch.float32, device=device)
                found = velocity(model, flow.interpolate(x0, noise, level), level, [embeds])
                sums[index] += (found - flow.target_velocity(x0, noise)).square().mean()
            run.console.progress(f"validating step {step}", number + 1, len(run.held_out))
        return (sums / len(run.held_out)).tolist()
    finally:
        model.train(was_training)


def _noise(config: Config, item: TrainItem, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=keyed_generator(config.seed, "validation", item.image.digest, *item.size))


def validation_history(run: TrainState) -> list[dict[str, Any]]:
    """Every validation of the run so far that measured the same."""
    of = validation_subject(run)
    return [
        one for one in metrics.read_records(run.folder.events) if one.get("event") == "validation" and one["of"] == of
    ]


def validation_subject(run: TrainState) -> str:
    """What is measured, by content: images, sizes, prompts."""
    parts = [(item.image.digest, *item.size, item.image.prompts[0]) for item in run.held_out]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def log_best_step(run: TrainState) -> None:
    """Name the step with the lowest loss, and its LoRA if that was kept."""
    lowest = min(validation_history(run), key=lambda one: one["loss"], default=None)
    if lowest is None:
        return
    step = lowest["step"]
    kept = run.folder.lora(None if step == run.config.train.steps else step)
    run.console.info(f"lowest validation loss: {lowest['loss']:.4f} at step {step}" + f": {kept}" * kept.exists())
