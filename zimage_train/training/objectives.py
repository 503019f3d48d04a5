"""What a micro-batch is and what its loss is: weighted velocity matching, and nothing of the loop around it."""

from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train import flow
from zimage_train.config.schema import Config
from zimage_train.data.plan import Sample
from zimage_train.model.transformer import velocity
from zimage_train.model.variants import VARIANTS
from zimage_train.seeding import generator
from zimage_train.tensors import Embeds, Image, Images, PerSample, Scalar


@dataclass(frozen=True)
class Batch:
    """One micro-batch, everything in fp32 but the embeddings: `sigma` (b,), pictures and noise (b, 16, h/8, w/8)."""

    x0: Images
    noise: Images
    sigma: PerSample
    weight: PerSample
    prompt_embeds: list[Embeds]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The batch on `device`, embeddings in the model's `dtype`."""
        return Batch(
            x0=self.x0.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            sigma=self.sigma.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            prompt_embeds=[one.to(device, dtype, non_blocking=True) for one in self.prompt_embeds],
        )


def draw_sigma(config: Config, sample: Sample) -> Scalar:
    """The sigma of a sample, a fp64 scalar: a function of the seed and the sample's key."""
    u = torch.rand((), generator=generator(config.seed, "sigma", *sample.key()), dtype=torch.float64)
    steps = config.timesteps
    return flow.draw_sigma(u, steps.type, steps.bias, VARIANTS[config.model.variant].shift, steps.min, steps.max)


def draw_noise(config: Config, sample: Sample, shape: torch.Size) -> Image:
    """The noise of a sample in fp32, likewise; drawn on the CPU, so that every device sees the same."""
    return torch.randn(shape, generator=generator(config.seed, "noise", *sample.key()), dtype=torch.float32)


def make_batch(config: Config, samples: tuple[Sample, ...], latents: list[Image], embeds: list[Embeds]) -> Batch:
    """Draw noise and sigma for `samples` and put them together with their cached latents and embeddings."""
    sigma = torch.stack([draw_sigma(config, sample) for sample in samples])
    return Batch(
        x0=torch.stack([one.float() for one in latents]),
        noise=torch.stack([draw_noise(config, s, one.shape) for s, one in zip(samples, latents, strict=True)]),
        sigma=sigma.float(),
        weight=flow.loss_weight(sigma, config.timesteps.type),
        prompt_embeds=embeds,
    )


@dataclass(frozen=True)
class Loss:
    """`objective` is what is differentiated; `plain` is the loss without guidance, comparable between runs."""

    objective: Scalar
    plain: Scalar


def sft_loss(model: ZImageTransformer2DModel, batch: Batch, differential: float | None) -> Loss:
    """Weighted MSE to the velocity, mean over the samples; with differential guidance the target is moved."""
    x = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    target = flow.velocity(batch.x0, batch.noise)
    prediction = velocity(model, x, batch.sigma, batch.prompt_embeds)
    plain = _weighted_mse(prediction, target, batch.weight)
    if differential is None:
        return Loss(plain, plain.detach())
    moved = flow.differential_target(prediction, target, differential)
    return Loss(_weighted_mse(prediction, moved, batch.weight), plain.detach())


def _weighted_mse(prediction: Images, target: Images, weight: PerSample) -> Scalar:
    per_sample = (prediction - target).square().mean(dim=(1, 2, 3))
    return (weight * per_sample).mean()
