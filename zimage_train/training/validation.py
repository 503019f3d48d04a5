"""Validation: the loss on held-out images, with the same noise every time, so that steps can be compared."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.diffusion import densities, flow
from zimage_train.models.transformer import velocity
from zimage_train.report import metrics
from zimage_train.report.metrics import RecordWriter
from zimage_train.rng import keyed_generator
from zimage_train.training.state import TrainState
from zimage_train.typing import LatentBatch, PromptEmbeds

DECILES = [index / 10 for index in range(1, 10)]


@dataclass(frozen=True)
class ValidationSigmas:
    """The noise levels at which the loss is measured."""

    trained: list[float]
    """The nine deciles of the sigmas that training draws at the resolution of the validation, each sigma once."""
    turbo: list[float]
    """The eight sigmas of Turbo's sampler."""


def validation_sigmas(config: Config) -> ValidationSigmas:
    """Return the noise levels at which the loss of `config` is measured."""
    turbo = VARIANTS["turbo"]
    density = densities.density_of(config, config.validation.resolution**2)
    trained = density.quantile(torch.tensor(DECILES, dtype=torch.float64)).tolist()
    # turbo_grid and fixed have few sigmas, so that several deciles may be the same.
    return ValidationSigmas(list(dict.fromkeys(trained)), flow.sampling_sigmas(turbo.steps, turbo.shift)[:-1])


def validate(state: TrainState, step: int, events: RecordWriter) -> None:
    """Measure the loss after `step` and write it to events.jsonl, unless it has been measured already.

    If memory runs out, warn and go on: training itself needs no validation.

    Raises:
        Stopped: a signal came.
    """
    if not state.held_out or any(event["step"] == step for event in validation_history(state)):
        return
    sigmas = validation_sigmas(state.config)
    try:
        with state.clock.stage("validation"), state.run_step.between_steps():
            values = measure(state, [*sigmas.trained, *sigmas.turbo], step)
    except torch.OutOfMemoryError:
        state.console.warning(
            f"validation at step {step} ran out of memory; lower validation.resolution; training goes on"
        )
        return
    by_sigma = list(zip([*sigmas.trained, *sigmas.turbo], values, strict=True))
    at_trained, at_turbo = values[: len(sigmas.trained)], values[len(sigmas.trained) :]
    record: dict[str, Any] = {
        "step": step,
        "event": "validation",
        "of": validation_subject(state),
        "loss": sum(at_trained) / len(at_trained),
        "loss_turbo": sum(at_turbo) / len(at_turbo),
        "by_sigma": [[round(sigma, 4), value] for sigma, value in by_sigma],
    }
    events.append(record)
    state.trackers.validation(step, {name: record[name] for name in ("loss", "loss_turbo")})
    state.console.info(
        f"step {step}: validation loss {record['loss']:.4f}, at Turbo's sigmas {record['loss_turbo']:.4f}"
    )


@torch.no_grad()
def measure(state: TrainState, sigmas: list[float], step: int) -> list[float]:
    """Return the mean squared error of the velocity at each sigma, over all held-out images, without loss weights."""
    model, device = state.frozen.model, state.world.device
    was_training = model.training
    model.eval()  # lora.dropout is for training
    try:
        sums = torch.zeros(len(sigmas), dtype=torch.float64, device=device)
        for number, item in enumerate(state.held_out):
            x0 = state.dataset.image_latents(item).float().unsqueeze(0).to(device)
            noise = _noise(state.config, item, x0.shape[1:]).unsqueeze(0).to(device)
            embeds = state.dataset.embeds(item.image.prompts[0]).to(device, model.dtype)
            sums += errors_by_sigma(model, x0, noise, embeds, sigmas)
            state.report_progress(f"validating step {step}", number + 1, len(state.held_out))
        return (sums / len(state.held_out)).tolist()
    finally:
        model.train(was_training)


def errors_by_sigma(
    model: ZImageTransformer2DModel, x0: LatentBatch, noise: LatentBatch, embeds: PromptEmbeds, sigmas: list[float]
) -> Tensor:
    """Return the mean squared error of the velocity at each sigma, fp64 (n,), for x0 and noise (1, c, h, w)."""
    errors = torch.zeros(len(sigmas), dtype=torch.float64, device=x0.device)
    for index, sigma in enumerate(sigmas):
        level = torch.tensor([sigma], dtype=torch.float32, device=x0.device)
        predicted = velocity(model, flow.interpolate(x0, noise, level), level, [embeds])
        errors[index] = (predicted - flow.target_velocity(x0, noise)).square().mean()
    return errors


def _noise(config: Config, item: TrainItem, shape: torch.Size) -> torch.Tensor:
    """Return the noise of an image. It is the same at every step, so that losses differ by the LoRA alone."""
    return torch.randn(shape, generator=keyed_generator(config.seed, "validation", item.image.digest, *item.size))


def validation_history(state: TrainState) -> list[dict[str, Any]]:
    """Return the events of all validations of this run that measured the same images."""
    subject = validation_subject(state)
    events = metrics.read_records(state.folder.events)
    return [event for event in events if event.get("event") == "validation" and event["of"] == subject]


def validation_subject(state: TrainState) -> str:
    """Return a digest of the held-out images, their sizes and prompts."""
    parts = [(item.image.digest, *item.size, item.image.prompts[0]) for item in state.held_out]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def log_best_step(state: TrainState) -> None:
    """Log the step with the lowest validation loss, and its LoRA if that was kept."""
    lowest = min(validation_history(state), key=lambda event: event["loss"], default=None)
    if lowest is None:
        return
    step = lowest["step"]
    kept = state.folder.lora(None if step == state.config.train.steps else step)
    state.console.info(f"lowest validation loss: {lowest['loss']:.4f} at step {step}" + f": {kept}" * kept.exists())
