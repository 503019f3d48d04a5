"""The loss of a micro-batch: the weighted MSE of the velocity, and the preservation loss."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train.config.schema import Config
from zimage_train.diffusion import flow
from zimage_train.lora.layers import without_lora
from zimage_train.models.transformer import Prompt, velocity
from zimage_train.training.batches import Batch
from zimage_train.typing import LatentBatch, PerSample, Scalar, WeightMaps


@dataclass(frozen=True)
class Loss:
    """A part of the loss: `objective` is differentiated, `plain` is logged under `name`."""

    objective: Scalar
    plain: Scalar
    """The same without guidance and detached, so that runs with and without guidance can be compared."""
    name: str = "loss"


def losses(model: ZImageTransformer2DModel, batch: Batch, config: Config) -> Iterator[Loss]:
    """Yield each part of the loss; call its backward before asking for the next, so that one graph lives at a time."""
    yield sft_loss(model, batch, config.guidance.differential, config.guidance.contrastive)
    if batch.extras.preserve_prompts is not None:
        yield preservation_loss(model, batch, batch.extras.preserve_prompts, config.preserve.weight)


@dataclass(frozen=True)
class Target:
    """The velocities (b, 16, h/8, w/8) that a prediction is compared with."""

    plain: LatentBatch
    """noise - x0, or the prior for samples of `BatchExtras.to_prior`."""
    guided: LatentBatch
    """`plain` moved by contrastive guidance; the same tensor if that is off."""
    prior: LatentBatch | None
    """The velocity that the model predicts without the LoRA, or None if no sample needs it."""


def sft_loss(
    model: ZImageTransformer2DModel, batch: Batch, differential: float | None, contrastive: float | None = None
) -> Loss:
    """Return the weighted MSE between the predicted and the target velocity, averaged over the samples."""
    extras = batch.extras
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    target = build_target(model, batch, x, contrastive)  # before the prediction, so that its passes keep no graph
    prediction = velocity(model, x, batch.sigma, batch.prompts)
    # Guidance changes the value of the objective, so the loss without it is logged.
    plain = _weighted_mse(prediction, target.plain, batch.weight, extras.mask)
    objective = plain
    if differential is not None or contrastive is not None:
        guided = target.guided
        if differential is not None:
            guided = flow.differential_target(prediction, guided, differential)
        objective = _weighted_mse(prediction, guided, batch.weight, extras.mask)
    if extras.outside is not None and target.prior is not None:
        # Added to the objective alone: the masked-out part is neither guided nor counted in the logged loss.
        objective = objective + _weighted_mse(prediction, target.prior, batch.weight, extras.outside)
    return Loss(objective, plain.detach())


def build_target(
    model: ZImageTransformer2DModel, batch: Batch, x: LatentBatch, contrastive: float | None = None
) -> Target:
    """Return the target of `batch`, whose noisy latents are `x`; no gradient flows through it."""
    extras = batch.extras
    prior = None
    if extras.to_prior is not None or extras.outside is not None:
        prior = prior_velocity(model, x, batch.sigma, batch.prompts)
    plain = guided = flow.target_velocity(batch.x0, batch.noise)
    if contrastive is not None and extras.empty_prompt is not None:
        with torch.no_grad():
            empty = velocity(model, x, batch.sigma, [extras.empty_prompt] * len(x))
        guided = flow.contrastive_target(empty, plain, contrastive)
    if extras.to_prior is not None and prior is not None:
        # After contrastive guidance, which would move the target of these samples away from the prior.
        to_prior = extras.to_prior.view(-1, 1, 1, 1)
        plain, guided = torch.where(to_prior, prior, plain), torch.where(to_prior, prior, guided)
    return Target(plain, guided, prior)


def preservation_loss(model: ZImageTransformer2DModel, batch: Batch, prompts: list[Prompt], weight: float) -> Loss:
    """Return the MSE to the model's own prediction without the LoRA, for other `prompts` at the batch's noise."""
    # At the batch's own noise and sigma: preservation then acts where the concept is trained.
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    prior = prior_velocity(model, x, batch.sigma, prompts)
    plain = (velocity(model, x, batch.sigma, prompts) - prior).square().mean()
    return Loss(weight * plain, plain.detach(), "preservation")


@torch.no_grad()
def prior_velocity(
    model: ZImageTransformer2DModel, x: LatentBatch, sigma: PerSample, prompts: list[Prompt]
) -> LatentBatch:
    """Return the velocity without the LoRA, with the training adapter still merged."""
    with without_lora(model):
        return velocity(model, x, sigma, prompts)


def _weighted_mse(prediction: LatentBatch, target: LatentBatch, weight: PerSample, mask: WeightMaps | None) -> Scalar:
    squares = (prediction - target).square()
    if mask is not None:
        squares = squares * mask
    # Mean over each sample before the weights: a sample counts the same at every resolution.
    return (weight * squares.mean(dim=(1, 2, 3))).mean()
