"""The training loss: weighted MSE of the velocity, with optional guidance, masks, prior and preservation."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train.config.schema import Config
from zimage_train.diffusion import flow
from zimage_train.lora.layers import without_lora
from zimage_train.models.transformer import velocity
from zimage_train.training.batch import Batch
from zimage_train.typing import LatentBatch, PerSample, PromptEmbeds, Scalar, WeightMaps


@dataclass(frozen=True)
class Loss:
    """One part of the loss: `objective` is differentiated, `plain` is logged under `name`."""

    objective: Scalar
    plain: Scalar
    """The same without guidance and detached, so that runs with and without guidance can be compared."""
    name: str = "loss"


def losses(model: ZImageTransformer2DModel, batch: Batch, config: Config) -> Iterator[Loss]:
    """Yield each part of the loss; call its backward before asking for the next, so that one graph lives at a time."""
    yield sft_loss(model, batch, config.guidance.differential, config.guidance.contrastive)
    if batch.extras.preserve_embeds is not None:
        yield preservation_loss(model, batch, batch.extras.preserve_embeds, config.preserve.weight)


@dataclass(frozen=True)
class Target:
    """The velocities (b, 16, h/8, w/8) that a prediction is compared with."""

    plain: LatentBatch
    """The velocity from noise to image, or the prior's for samples that are held to it."""
    guided: LatentBatch
    """The same moved by contrastive guidance; the same tensor where that is off."""
    prior: LatentBatch | None
    """The velocity without the LoRA, or None if no sample needs it."""


def sft_loss(
    model: ZImageTransformer2DModel, batch: Batch, differential: float | None, contrastive: float | None = None
) -> Loss:
    """Return the weighted MSE between the predicted and the target velocity, averaged over the samples."""
    extras = batch.extras
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    target = build_target(model, batch, x, contrastive)  # before the prediction, so that its passes keep no graph
    prediction = velocity(model, x, batch.sigma, batch.prompt_embeds)
    plain = _weighted_mse(prediction, target.plain, batch.weight, extras.mask)
    objective = plain
    if differential is not None or contrastive is not None:
        guided = target.guided
        if differential is not None:
            guided = flow.differential_target(prediction, guided, differential)
        objective = _weighted_mse(prediction, guided, batch.weight, extras.mask)
    if extras.outside is not None and target.prior is not None:
        objective = objective + _weighted_mse(prediction, target.prior, batch.weight, extras.outside)
    return Loss(objective, plain.detach())


def build_target(
    model: ZImageTransformer2DModel, batch: Batch, x: LatentBatch, contrastive: float | None = None
) -> Target:
    """Return the target of `batch`, whose noisy latents are `x`; no gradient flows through it."""
    extras = batch.extras
    prior = None
    if extras.to_prior is not None or extras.outside is not None:
        prior = prior_velocity(model, x, batch.sigma, batch.prompt_embeds)
    plain = guided = flow.target_velocity(batch.x0, batch.noise)
    if contrastive is not None and extras.empty_embeds is not None:
        with torch.no_grad():
            empty = velocity(model, x, batch.sigma, [extras.empty_embeds] * len(x))
        guided = flow.contrastive_target(empty, plain, contrastive)
    if extras.to_prior is not None and prior is not None:
        # After contrastive guidance: these samples hold the model where it was, which no guidance may move.
        to_prior = extras.to_prior.view(-1, 1, 1, 1)
        plain, guided = torch.where(to_prior, prior, plain), torch.where(to_prior, prior, guided)
    return Target(plain, guided, prior)


def preservation_loss(model: ZImageTransformer2DModel, batch: Batch, embeds: list[PromptEmbeds], weight: float) -> Loss:
    """Return the MSE to the model's own prediction without the LoRA, for the prompts `embeds` at the batch's noise."""
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    prior = prior_velocity(model, x, batch.sigma, embeds)
    plain = (velocity(model, x, batch.sigma, embeds) - prior).square().mean()
    return Loss(weight * plain, plain.detach(), "preservation")


@torch.no_grad()
def prior_velocity(
    model: ZImageTransformer2DModel, x: LatentBatch, sigma: PerSample, prompt_embeds: list[PromptEmbeds]
) -> LatentBatch:
    """Return the velocity without the LoRA, with the training adapter still merged."""
    with without_lora(model):
        return velocity(model, x, sigma, prompt_embeds)


def _weighted_mse(prediction: LatentBatch, target: LatentBatch, weight: PerSample, mask: WeightMaps | None) -> Scalar:
    squares = (prediction - target).square()
    if mask is not None:
        squares = squares * mask
    # Mean over each sample before the weights: a sample counts the same at every resolution.
    return (weight * squares.mean(dim=(1, 2, 3))).mean()
