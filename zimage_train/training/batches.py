"""A micro-batch: the cached tensors of its samples, and the noise and sigma drawn for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.sample_order import Sample
from zimage_train.dataset.tensor_cache import CachedDataset
from zimage_train.diffusion import densities, flow
from zimage_train.diffusion.loss_weights import loss_weight
from zimage_train.models.transformer import Prompt, pad_prompt
from zimage_train.rng import keyed_generator, keyed_int
from zimage_train.typing import Latent, LatentBatch, PerSample, Scalar, WeightMap, WeightMaps


@dataclass(frozen=True)
class BatchExtras:
    """Optional parts of a batch; None where their setting is off, so that nothing is computed for them."""

    mask: WeightMaps | None = None
    """(b, 1, h/8, w/8): the loss weight of each position, with mean 1 for each sample."""
    outside: WeightMaps | None = None
    """(b, 1, h/8, w/8): the weight of the MSE to the prior in the masked-out positions."""
    to_prior: Tensor | None = None
    """(b,), bool: samples whose target is the prediction of the model without the LoRA."""
    preserve_prompts: list[Prompt] | None = None
    """Prompts of the preservation loss."""
    empty_prompt: Prompt | None = None
    """For contrastive guidance."""
    negative_x0: LatentBatch | None = None
    """The latents of the other images of pairs."""
    slider_prompts: list[list[Prompt]] | None = None
    """The positive and the negative prompts of the samples, and those of the anchor if there is one."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `sigma` and `weight` (b,), latents and noise (b, 16, h/8, w/8), all fp32 but the embeddings."""

    x0: LatentBatch
    noise: LatentBatch
    sigma: PerSample
    weight: PerSample
    prompts: list[Prompt]
    extras: BatchExtras = BatchExtras()
    samples: tuple[Sample, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from which the GPU copies while the CPU goes on."""
        return map_tensors(self, Tensor.pin_memory)


Value = TypeVar("Value")


def map_tensors(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """Return `value` with `change` applied to every tensor in the fields and lists of its dataclasses."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, list):
        found = [map_tensors(item, change) for item in value]
    elif is_dataclass(value):
        changed = {field.name: map_tensors(getattr(value, field.name), change) for field in fields(value)}
        found = replace(found, **changed)
    return found


def named_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return every tensor in the fields and lists of the dataclasses of `value`, by where it is."""
    found: dict[str, Tensor] = {}
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found |= named_tensors(item, f"{name}.{index}")
    elif is_dataclass(value):
        for field in fields(value):
            found |= named_tensors(getattr(value, field.name), f"{name}.{field.name}")
    return found


def load_batch(config: Config, dataset: CachedDataset, samples: tuple[Sample, ...]) -> Batch:
    """Return the micro-batch of `samples` on the CPU: cached tensors, and the noise and sigma drawn for them."""
    latents = [dataset.latents(sample.item) for sample in samples]
    prompts: list[Prompt] = [pad_prompt(dataset.embeds(sample.prompt)) for sample in samples]
    # A micro-batch holds samples of equal size, so the shape of the first is that of all.
    extras = _load_extras(config, dataset, samples, latents[0].shape)
    make = make_imitation_batch if config.method.imitates_teacher else make_batch
    return make(config, samples, latents, prompts, extras)


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
        preserve_prompts=[pad_prompt(dataset.embeds(prompt)) for prompt in preserve_prompts] or None,
        empty_prompt=pad_prompt(dataset.embeds("")) if config.guidance.contrastive is not None else None,
        negative_x0=_negative_latents(dataset, samples) if config.method.has_pairs else None,
        slider_prompts=_slider_prompts(config, dataset, samples) if config.method.has_prompts else None,
    )


def _negative_latents(dataset: CachedDataset, samples: tuple[Sample, ...]) -> LatentBatch:
    negatives = [sample.item.negative for sample in samples]
    return torch.stack([dataset.latents(item).float() for item in negatives if item is not None])


def _slider_prompts(config: Config, dataset: CachedDataset, samples: tuple[Sample, ...]) -> list[list[Prompt]]:
    by_sample: list[list[Prompt]] = []
    for sample in samples:
        by_sample.append([pad_prompt(dataset.embeds(prompt)) for prompt in config.slider_prompts(sample.prompt)])
    return [list(prompts) for prompts in zip(*by_sample, strict=True)]


def sample_sigma(config: Config, sample: Sample) -> Scalar:
    """Return the sigma of a sample as a fp64 scalar: a function of the seed and the sample's key."""
    # A uniform number for each sample, through the quantile function of the distribution: the same key gives the
    # same place in every distribution, and rejection at `min` and `max` is not needed.
    u = torch.rand((), generator=keyed_generator(config.seed, "sigma", *sample.key()), dtype=torch.float64)
    if sample.part is not None:
        u = densities.stratified(u, *sample.part, sample.epoch)
    width, height = sample.item.size
    return densities.density_of(config, width * height).quantile(u)


def sample_noise(config: Config, sample: Sample, shape: torch.Size) -> Latent:
    """Return the fp32 noise of a sample: a function of the seed and the sample's key.

    It is drawn on the CPU, because CUDA's generator gives other numbers than the CPU's for the same seed.
    """
    noise = torch.randn(shape, generator=keyed_generator(config.seed, "noise", *sample.key()), dtype=torch.float32)
    offset = config.timesteps.offset_noise
    if offset:
        generator = keyed_generator(config.seed, "offset", *sample.key())
        noise += offset * torch.randn((shape[0], 1, 1), generator=generator, dtype=torch.float32)
    return noise


def make_batch(
    config: Config,
    samples: tuple[Sample, ...],
    latents: list[Latent],
    prompts: list[Prompt],
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
        weight=loss_weight(sigma, config.timesteps) * _entry_weights(config, samples),
        prompts=prompts,
        extras=extras,
        samples=samples,
    )


def make_imitation_batch(
    config: Config,
    samples: tuple[Sample, ...],
    trajectories: Sequence[Tensor],
    prompts: list[Prompt],
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
        prompts=prompts,
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
