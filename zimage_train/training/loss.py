"""The loss of a micro-batch: the weighted loss of the velocity, and the preservation loss, which is always an MSE."""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train.config.loss import GuidanceSettings, LossSettings
from zimage_train.config.schema import Config
from zimage_train.diffusion import criteria, flow
from zimage_train.lora.layers import lora_weight, without_lora
from zimage_train.models.transformer import Prompt, velocity
from zimage_train.training.batches import Batch
from zimage_train.typing import LatentBatch, PerSample, Scalar, WeightMaps

NO_GUIDANCE, PLAIN_LOSS = GuidanceSettings(), LossSettings()


@dataclass(frozen=True)
class Loss:
    """A part of the loss: `objective` is differentiated, `plain` is logged under `name`."""

    objective: Scalar
    plain: Scalar
    """The weighted MSE without guidance and detached, so that runs with any loss and guidance can be compared."""
    name: str = "loss"


def losses(model: ZImageTransformer2DModel, batch: Batch, config: Config) -> Generator[Loss]:
    """Yield each part of the loss; those of the same name add up.

    Call the backward of each before asking for the next: then one graph lives at a time, and the weight of the LoRA is
    that of the part.
    """
    if config.method.has_prompts:
        yield from slider_losses(model, batch, config)
        return
    if config.method.has_pairs:
        yield from pair_losses(model, batch, config)
        return
    yield sft_loss(model, batch, config.guidance, config.loss)
    if batch.extras.preserve_prompts is not None:
        yield preservation_loss(model, batch, batch.extras.preserve_prompts, config.preserve.weight)


def slider_losses(model: ZImageTransformer2DModel, batch: Batch, config: Config) -> Generator[Loss]:
    """Yield the loss of a slider at the weights w = +1 and -1 of the LoRA, and at each the anchor's, half of each.

    With v the velocity without the LoRA, of noisy latents x and for a prompt, the target is

        v(x, prompt) + w g (v(x, positive) - v(x, negative)).

    As x - sigma v is the image that a velocity leads to, this moves the image of the prompt towards the positive one
    and away from the negative one. All of it is the model's own: no image tells it anything but where x is.

    Reference: Gandikota et al. 2023 (Concept Sliders), https://arxiv.org/abs/2311.12092, where a LoRA learns
    log p(x | prompt) + g (log p(positive | x) - log p(negative | x)), and the same for a velocity.
    """
    extras, slider = batch.extras, config.slider
    assert extras.slider_prompts is not None
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    weight = _sample_weights(batch, config.loss)
    base, positive, negative, *anchors = (
        prior_velocity(model, x, batch.sigma, prompts) for prompts in (batch.prompts, *extras.slider_prompts)
    )
    shift = flow.slider_shift(positive, negative, slider.guidance)
    for sign in (1.0, -1.0):
        with lora_weight(model, sign):
            prediction = velocity(model, x, batch.sigma, batch.prompts)
            yield _half(prediction, base + sign * shift, weight, config.loss, batch.weight)
            if anchors:
                prediction = velocity(model, x, batch.sigma, extras.slider_prompts[2])
                plain = 0.5 * (prediction - anchors[0]).square().mean()
                yield Loss(slider.anchor_weight * plain, plain.detach(), "preservation")


def pair_losses(model: ZImageTransformer2DModel, batch: Batch, config: Config) -> Generator[Loss]:
    """Yield half of the loss on the images at the weight +1 of the LoRA, and on their partners at -1.

    Both have the same noise, sigma and prompt, so common content pulls the LoRA in both directions and cancels to
    first order; their difference remains.
    """
    assert batch.extras.negative_x0 is not None
    for sign, x0 in ((1.0, batch.x0), (-1.0, batch.extras.negative_x0)):
        with lora_weight(model, sign):
            loss = sft_loss(model, replace(batch, x0=x0), loss=config.loss)
            yield Loss(0.5 * loss.objective, 0.5 * loss.plain)


def _half(
    prediction: LatentBatch, target: LatentBatch, weight: PerSample, loss: LossSettings, plain_weight: PerSample
) -> Loss:
    """Return the part of one of the two weights of the LoRA, so that both together are the mean."""
    objective = 0.5 * _weighted_loss(prediction, target, weight, None, loss)
    plain = objective.detach()
    if loss != PLAIN_LOSS:
        plain = 0.5 * _weighted_loss(prediction.detach(), target, plain_weight, None)
    return Loss(objective, plain)


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
    model: ZImageTransformer2DModel,
    batch: Batch,
    guidance: GuidanceSettings = NO_GUIDANCE,
    loss: LossSettings = PLAIN_LOSS,
) -> Loss:
    """Return the weighted loss between the predicted and the target velocity, averaged over the samples."""
    extras = batch.extras
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    target = build_target(model, batch, x, guidance)  # before the prediction, so that its passes keep no graph
    prediction = velocity(model, x, batch.sigma, batch.prompts)
    guided = target.guided
    if guidance.differential is not None:
        guided = flow.differential_target(prediction, guided, guidance.differential)
    weight = _sample_weights(batch, loss)
    objective = _weighted_loss(prediction, guided, weight, extras.mask, loss)
    plain = objective.detach()
    if loss != PLAIN_LOSS or guidance != NO_GUIDANCE:
        # These change the value of the objective, so the loss without them is logged.
        with torch.no_grad():
            plain = _weighted_loss(prediction, target.plain, batch.weight, extras.mask)
    if extras.outside is not None and target.prior is not None:
        # Added to the objective alone: the masked-out part is neither guided nor counted in the logged loss.
        objective = objective + _weighted_loss(prediction, target.prior, weight, extras.outside, loss)
    return Loss(objective, plain)


def build_target(
    model: ZImageTransformer2DModel, batch: Batch, x: LatentBatch, guidance: GuidanceSettings = NO_GUIDANCE
) -> Target:
    """Return the target of `batch`, whose noisy latents are `x`; no gradient flows through it."""
    extras = batch.extras
    prior = None
    if extras.to_prior is not None or extras.outside is not None:
        prior = prior_velocity(model, x, batch.sigma, batch.prompts)
    plain = guided = flow.target_velocity(batch.x0, batch.noise)
    if guidance.contrastive is not None and extras.empty_prompt is not None:
        with torch.no_grad():
            empty = velocity(model, x, batch.sigma, [extras.empty_prompt] * len(x))
        guided = _contrastive_target(empty, plain, batch.sigma, guidance, guidance.contrastive)
    if extras.to_prior is not None and prior is not None:
        # After contrastive guidance, which would move the target of these samples away from the prior.
        to_prior = extras.to_prior.view(-1, 1, 1, 1)
        plain, guided = torch.where(to_prior, prior, plain), torch.where(to_prior, prior, guided)
    return Target(plain, guided, prior)


def _contrastive_target(
    empty: LatentBatch, target: LatentBatch, sigma: PerSample, guidance: GuidanceSettings, scale: float
) -> LatentBatch:
    """Return `target` pushed away from the prediction `empty` for the empty prompt."""
    if guidance.cfg_zero:
        empty = criteria.along_target(empty, target)
    if guidance.contrastive_schedule == "constant":
        return flow.contrastive_target(empty, target, scale)
    scales = criteria.contrastive_scale(sigma, scale)
    return empty + scales * (target - empty)


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


def _sample_weights(batch: Batch, loss: LossSettings) -> PerSample:
    if loss.min_snr is None:
        return batch.weight
    return batch.weight * criteria.min_snr_weight(batch.sigma, loss.min_snr, loss.used_min_snr_floor)


def _weighted_loss(
    prediction: LatentBatch,
    target: LatentBatch,
    weight: PerSample,
    mask: WeightMaps | None,
    loss: LossSettings = PLAIN_LOSS,
) -> Scalar:
    error = criteria.weight_details(prediction - target, loss.detail)
    values = criteria.loss_of_error(error, loss.type, loss.used_delta)
    if mask is not None:
        values = values * mask
    # Mean over each sample before the weights: a sample counts the same at every resolution.
    return (weight * values.mean(dim=(1, 2, 3))).mean()
