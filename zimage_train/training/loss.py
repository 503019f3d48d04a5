"""A micro-batch and its loss: cached tensors, the noise and sigma drawn for them, and the weighted velocity MSE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.sample_order import Sample
from zimage_train.dataset.tensor_cache import CachedDataset
from zimage_train.diffusion import flow
from zimage_train.lora.layers import without_lora
from zimage_train.models.transformer import velocity
from zimage_train.rng import keyed_generator, keyed_int
from zimage_train.typing import Latent, LatentBatch, PerSample, PromptEmbeds, Scalar, WeightMap, WeightMaps


@dataclass(frozen=True)
class BatchExtras:
    """Optional parts of a batch; None where their setting is off, so that nothing is computed for them."""

    mask: WeightMaps | None = None
    """(b, 1, h/8, w/8): the loss weight of each position, with mean 1 for each sample."""
    outside: WeightMaps | None = None
    """(b, 1, h/8, w/8): the weight of the MSE to the prior in the masked-out positions."""
    to_prior: Tensor | None = None
    """(b,), bool: samples whose target is the prediction of the model without the LoRA."""
    preserve_embeds: list[PromptEmbeds] | None = None
    """Prompts of the preservation loss."""
    empty_embeds: PromptEmbeds | None = None
    """Embeddings of the empty prompt, for contrastive guidance."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "BatchExtras":
        """Return the extras on `device`, with embeddings in `dtype`."""
        preserve_embeds = self.preserve_embeds
        if preserve_embeds is not None:
            preserve_embeds = [embeds.to(device, dtype) for embeds in preserve_embeds]
        return BatchExtras(
            mask=_moved(self.mask, device),
            outside=_moved(self.outside, device),
            to_prior=_moved(self.to_prior, device),
            preserve_embeds=preserve_embeds,
            empty_embeds=None if self.empty_embeds is None else self.empty_embeds.to(device, dtype),
        )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `sigma` and `weight` (b,), latents and noise (b, 16, h/8, w/8), all fp32 but the embeddings."""

    x0: LatentBatch
    noise: LatentBatch
    sigma: PerSample
    weight: PerSample
    prompt_embeds: list[PromptEmbeds]
    extras: BatchExtras = field(default_factory=BatchExtras)
    samples: tuple[Sample, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Return the batch on `device`, with embeddings in the model's `dtype`."""
        # Latents and noise stay in fp32: their difference is the target, and bf16 would round it at every step.
        return Batch(
            x0=self.x0.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            sigma=self.sigma.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            prompt_embeds=[embeds.to(device, dtype, non_blocking=True) for embeds in self.prompt_embeds],
            extras=self.extras.to(device, dtype),
            samples=self.samples,
        )


def load_batch(config: Config, dataset: CachedDataset, samples: tuple[Sample, ...]) -> Batch:
    """Return the micro-batch of `samples` on the CPU: cached tensors, and the noise and sigma drawn for them."""
    latents = [dataset.latents(sample.item) for sample in samples]
    embeds = [dataset.embeds(sample.prompt) for sample in samples]
    # A micro-batch holds samples of equal size, so the shape of the first is that of all.
    extras = _load_extras(config, dataset, samples, latents[0].shape)
    make = make_imitation_batch if config.method.imitates_teacher else make_batch
    return make(config, samples, latents, embeds, extras)


def _load_extras(config: Config, dataset: CachedDataset, samples: tuple[Sample, ...], shape: torch.Size) -> BatchExtras:
    entries = [config.data[sample.item.entry] for sample in samples]
    masks = [dataset.mask(sample.item) for sample in samples]
    to_prior = [entry.regularization == "prior" for entry in entries]
    # All samples of a run have a preservation prompt, or none has.
    preserve_prompts = [sample.preserve_prompt for sample in samples if sample.preserve_prompt is not None]
    return BatchExtras(
        mask=mask_weights(masks, [entry.mask_floor for entry in entries], shape),
        outside=outside_weights(masks, [entry.mask_prior for entry in entries], shape),
        to_prior=torch.tensor(to_prior) if any(to_prior) else None,
        preserve_embeds=[dataset.embeds(prompt) for prompt in preserve_prompts] or None,
        empty_embeds=dataset.embeds("") if config.guidance.contrastive is not None else None,
    )


def sample_sigma(config: Config, sample: Sample) -> Scalar:
    """Return the sigma of a sample as a fp64 scalar: a function of the seed and the sample's key."""
    # A uniform number for each sample, through the quantile function of the distribution: the same key gives the
    # same place in every distribution, and rejection at `min` and `max` is not needed.
    u = torch.rand((), generator=keyed_generator(config.seed, "sigma", *sample.key()), dtype=torch.float64)
    steps = config.timesteps
    return flow.quantile_sigma(u, steps.type, steps.bias, VARIANTS[config.model.variant].shift, steps.min, steps.max)


def sample_noise(config: Config, sample: Sample, shape: torch.Size) -> Latent:
    """Return the fp32 noise of a sample: a function of the seed and the sample's key.

    It is drawn on the CPU, because CUDA's generator gives other numbers than the CPU's for the same seed.
    """
    return torch.randn(shape, generator=keyed_generator(config.seed, "noise", *sample.key()), dtype=torch.float32)


def make_batch(
    config: Config,
    samples: tuple[Sample, ...],
    latents: list[Latent],
    embeds: list[PromptEmbeds],
    extras: BatchExtras,
) -> Batch:
    """Return a batch of flow matching: `latents` with noise and a sigma drawn for each sample."""
    # The loss weight is computed from the fp64 sigma; only the stored sigma is rounded to fp32.
    sigma = torch.stack([sample_sigma(config, sample) for sample in samples])
    return Batch(
        x0=torch.stack([image.float() for image in latents]),
        noise=torch.stack(
            [sample_noise(config, sample, image.shape) for sample, image in zip(samples, latents, strict=True)]
        ),
        sigma=sigma.float(),
        weight=flow.loss_weight(sigma, config.timesteps.type) * _entry_weights(config, samples),
        prompt_embeds=embeds,
        extras=extras,
        samples=samples,
    )


def make_imitation_batch(
    config: Config,
    samples: tuple[Sample, ...],
    trajectories: Sequence[Tensor],
    embeds: list[PromptEmbeds],
    extras: BatchExtras,
) -> Batch:
    """Return a batch with a step of the student per sample, and the teacher's mean velocity over it as the target.

    `trajectories` holds for each sample the teacher's states (9, 16, h/8, w/8) at the student's sigmas. `x0` and
    `noise` are no real image and noise: they are solved for, so that their interpolation at sigma is the teacher's
    state and their velocity the mean velocity. The loss then treats the batch as any other.
    """
    variant = VARIANTS[config.model.variant]
    sigmas = flow.sampling_sigmas(variant.steps, variant.shift)
    images, noises, drawn = [], [], []
    for sample, states in zip(samples, trajectories, strict=True):
        step = keyed_int(config.seed, "interval", *sample.key()) % (len(sigmas) - 1)
        # fp64, since the difference of states that are close to each other cancels digits.
        state, next_state = states[step].double(), states[step + 1].double()
        velocity = (next_state - state) / (sigmas[step + 1] - sigmas[step])
        image, noise = flow.pair_from_velocity(state, velocity, sigmas[step])
        images.append(image.float())
        noises.append(noise.float())
        drawn.append(sigmas[step])
    return Batch(
        x0=torch.stack(images),
        noise=torch.stack(noises),
        sigma=torch.tensor(drawn),
        weight=_entry_weights(config, samples),
        prompt_embeds=embeds,
        extras=extras,
        samples=samples,
    )


def _entry_weights(config: Config, samples: tuple[Sample, ...]) -> PerSample:
    """Return `data.N.weight` for each sample, fp32 (b,)."""
    return torch.tensor([config.data[sample.item.entry].weight for sample in samples], dtype=torch.float32)


def mask_weights(masks: list[WeightMap | None], floors: list[float], shape: torch.Size) -> WeightMaps | None:
    """Return loss weights (b, 1, h, w) of masks (1, h, w) in [0, 1], or None if no sample has a mask.

    Each map is raised to its floor and divided by its mean, so that a sample counts the same however small the part of
    it that is trained. A sample without a mask has weight 1 everywhere.
    """
    if all(mask is None for mask in masks):
        return None
    weights = []
    for mask, floor in zip(masks, floors, strict=True):
        if mask is None:
            weights.append(torch.ones((1, *shape[-2:])))
        else:
            weights.append(_divided_by_mean(floor + (1.0 - floor) * mask))
    return torch.stack(weights)


def outside_weights(masks: list[WeightMap | None], weights: list[float], shape: torch.Size) -> WeightMaps | None:
    """Return weights (b, 1, h, w) of the masked-out positions, or None if all are 0.

    `masks` are (1, h, w) in [0, 1]. The map of a sample has its entry of `weights` as its mean, or is 0 without a mask.
    """
    if not any(weight > 0 and mask is not None for mask, weight in zip(masks, weights, strict=True)):
        return None
    maps = []
    for mask, weight in zip(masks, weights, strict=True):
        if mask is None:
            maps.append(torch.zeros((1, *shape[-2:])))
        else:
            maps.append(weight * _divided_by_mean(1.0 - mask))
    return torch.stack(maps)


def _divided_by_mean(weights: WeightMap) -> WeightMap:
    return weights / weights.mean().clamp(min=1e-6)  # a map of zeros stays zero


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
    if batch.extras.preserve_embeds is not None:
        yield preservation_loss(model, batch, batch.extras.preserve_embeds, config.preserve.weight)


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
    prediction = velocity(model, x, batch.sigma, batch.prompt_embeds)
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
        prior = prior_velocity(model, x, batch.sigma, batch.prompt_embeds)
    plain = guided = flow.target_velocity(batch.x0, batch.noise)
    if contrastive is not None and extras.empty_embeds is not None:
        with torch.no_grad():
            empty = velocity(model, x, batch.sigma, [extras.empty_embeds] * len(x))
        guided = flow.contrastive_target(empty, plain, contrastive)
    if extras.to_prior is not None and prior is not None:
        # After contrastive guidance, which would move the target of these samples away from the prior.
        to_prior = extras.to_prior.view(-1, 1, 1, 1)
        plain, guided = torch.where(to_prior, prior, plain), torch.where(to_prior, prior, guided)
    return Target(plain, guided, prior)


def preservation_loss(model: ZImageTransformer2DModel, batch: Batch, embeds: list[PromptEmbeds], weight: float) -> Loss:
    """Return the MSE to the model's own prediction without the LoRA, for the prompts `embeds` at the batch's noise."""
    # At the batch's own noise and sigma: preservation then acts where the concept is trained.
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
