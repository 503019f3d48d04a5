"""What a micro-batch is and what its loss is: weighted velocity matching, and nothing of the loop around it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.sample_order import Sample
from zimage_train.diffusion import flow
from zimage_train.lora.layers import without_lora
from zimage_train.models.transformer import velocity
from zimage_train.rng import keyed_generator
from zimage_train.typing import Latent, LatentBatch, PerSample, PromptEmbeds, Scalar, WeightMap, WeightMaps


@dataclass(frozen=True)
class BatchExtras:
    """What some settings add to a micro-batch; None where they are off, so that nothing is computed for them."""

    mask: WeightMaps | None = None
    """(b, 1, h/8, w/8): the weight of each place, with mean 1."""
    outside: WeightMaps | None = None
    """The same for what is masked out and held to the prior, times its own weight."""
    to_prior: Tensor | None = None
    """(b,), bool: samples that are held to what the model makes of them without the LoRA."""
    preserve_embeds: list[PromptEmbeds] | None = None
    """Prompts for which the model is held to what it was."""
    empty_embeds: PromptEmbeds | None = None
    """Of the empty prompt, for contrastive guidance."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "BatchExtras":
        return BatchExtras(
            mask=_moved(self.mask, device),
            outside=_moved(self.outside, device),
            to_prior=_moved(self.to_prior, device),
            preserve_embeds=None
            if self.preserve_embeds is None
            else [one.to(device, dtype) for one in self.preserve_embeds],
            empty_embeds=None if self.empty_embeds is None else self.empty_embeds.to(device, dtype),
        )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, everything in fp32 but the embeddings: `sigma` (b,), images and noise (b, 16, h/8, w/8)."""

    x0: LatentBatch
    noise: LatentBatch
    sigma: PerSample
    weight: PerSample
    prompt_embeds: list[PromptEmbeds]
    extras: BatchExtras = BatchExtras()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The batch on `device`, embeddings in the model's `dtype`."""
        return Batch(
            x0=self.x0.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            sigma=self.sigma.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            prompt_embeds=[one.to(device, dtype, non_blocking=True) for one in self.prompt_embeds],
            extras=self.extras.to(device, dtype),
        )


def sample_sigma(config: Config, sample: Sample) -> Scalar:
    """The sigma of a sample, a fp64 scalar: a function of the seed and the sample's key."""
    u = torch.rand((), generator=keyed_generator(config.seed, "sigma", *sample.key()), dtype=torch.float64)
    steps = config.timesteps
    return flow.quantile_sigma(u, steps.type, steps.bias, VARIANTS[config.model.variant].shift, steps.min, steps.max)


def sample_noise(config: Config, sample: Sample, shape: torch.Size) -> Latent:
    """The noise of a sample in fp32, likewise; drawn on the CPU, so that every device sees the same."""
    return torch.randn(shape, generator=keyed_generator(config.seed, "noise", *sample.key()), dtype=torch.float32)


def make_batch(
    config: Config, samples: tuple[Sample, ...], latents: list[Latent], embeds: list[PromptEmbeds], extras: BatchExtras
) -> Batch:
    """Draw noise and sigma for `samples` and put them together with their cached latents and embeddings."""
    sigma = torch.stack([sample_sigma(config, sample) for sample in samples])
    entries = torch.tensor([config.data[sample.item.entry].weight for sample in samples], dtype=torch.float32)
    return Batch(
        x0=torch.stack([one.float() for one in latents]),
        noise=torch.stack([sample_noise(config, s, one.shape) for s, one in zip(samples, latents, strict=True)]),
        sigma=sigma.float(),
        weight=flow.loss_weight(sigma, config.timesteps.type) * entries,
        prompt_embeds=embeds,
        extras=extras,
    )


def mask_weights(masks: list[WeightMap | None], floors: list[float], shape: torch.Size) -> WeightMaps | None:
    """Weights (b, 1, h, w) of masks (1, h, w) in [0, 1], raised to their floor and divided by their mean.

    So a sample counts the same however little of it is trained. None: no sample has a mask.
    """
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones((1, *shape[-2:]))
    raised = [
        whole if mask is None else floor + (1.0 - floor) * mask for mask, floor in zip(masks, floors, strict=True)
    ]
    return torch.stack([_mean_one(one) for one in raised])


def outside_weights(masks: list[WeightMap | None], weights: list[float], shape: torch.Size) -> WeightMaps | None:
    """Weights of what masks leave out, with mean `weights`; None: nothing is held there."""
    if not any(weight > 0 and mask is not None for mask, weight in zip(masks, weights, strict=True)):
        return None
    nothing = torch.zeros((1, *shape[-2:]))
    parts = [
        nothing if mask is None else weight * _mean_one(1.0 - mask) for mask, weight in zip(masks, weights, strict=True)
    ]
    return torch.stack(parts)


def _mean_one(weights: WeightMap) -> WeightMap:
    """`weights` divided by their mean; zeros stay."""
    return weights / weights.mean().clamp(min=1e-6)


@dataclass(frozen=True)
class Loss:
    """`objective` is what is differentiated; `plain` is the loss without guidance, comparable between runs."""

    objective: Scalar
    plain: Scalar
    name: str = "loss"


def losses(model: ZImageTransformer2DModel, batch: Batch, config: Config) -> Iterator[Loss]:
    """Every part of the loss, one graph at a time: its backward comes before the next part is asked for."""
    yield sft_loss(model, batch, config.guidance.differential, config.guidance.contrastive)
    if batch.extras.preserve_embeds is not None:
        yield preservation_loss(model, batch, batch.extras.preserve_embeds, config.preserve.weight)


def sft_loss(
    model: ZImageTransformer2DModel, batch: Batch, differential: float | None, contrastive: float | None = None
) -> Loss:
    """Weighted MSE to the velocity, mean over the samples; guidance moves the target."""
    extras = batch.extras
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    target = flow.target_velocity(batch.x0, batch.noise)
    prior = None
    if extras.to_prior is not None or extras.outside is not None:
        prior = prior_velocity(model, x, batch.sigma, batch.prompt_embeds)
    aim = target
    if contrastive is not None and extras.empty_embeds is not None:
        with torch.no_grad():
            empty = velocity(model, x, batch.sigma, [extras.empty_embeds] * len(x))
        aim = flow.contrastive_target(empty, target, contrastive)
    if extras.to_prior is not None and prior is not None:  # after guidance: these stay where the model is
        held = extras.to_prior.view(-1, 1, 1, 1)
        target, aim = torch.where(held, prior, target), torch.where(held, prior, aim)
    is_guided = contrastive is not None or differential is not None
    prediction = velocity(model, x, batch.sigma, batch.prompt_embeds)
    plain = _weighted_mse(prediction, target, batch.weight, extras.mask)
    if differential is not None:
        aim = flow.differential_target(prediction, aim, differential)
    objective = plain if not is_guided else _weighted_mse(prediction, aim, batch.weight, extras.mask)
    if extras.outside is not None and prior is not None:
        objective = objective + _weighted_mse(prediction, prior, batch.weight, extras.outside)
    return Loss(objective, plain.detach())


def preservation_loss(model: ZImageTransformer2DModel, batch: Batch, embeds: list[PromptEmbeds], weight: float) -> Loss:
    """MSE to what the model makes of `embeds` without the LoRA, at the same noise: what it knew shall stay."""
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    prior = prior_velocity(model, x, batch.sigma, embeds)
    plain = (velocity(model, x, batch.sigma, embeds) - prior).square().mean()
    return Loss(weight * plain, plain.detach(), "preservation")


@torch.no_grad()
def prior_velocity(
    model: ZImageTransformer2DModel, x: LatentBatch, sigma: PerSample, prompt_embeds: list[PromptEmbeds]
) -> LatentBatch:
    """The velocity without the LoRA, with the training adapter."""
    with without_lora(model):
        return velocity(model, x, sigma, prompt_embeds)


def _weighted_mse(prediction: LatentBatch, target: LatentBatch, weight: PerSample, mask: WeightMaps | None) -> Scalar:
    squares = (prediction - target).square()
    per_sample = (squares if mask is None else squares * mask).mean(dim=(1, 2, 3))
    return (weight * per_sample).mean()
