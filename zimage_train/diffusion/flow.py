"""The equations of flow matching, a function each, independent of dataset, model and config.

`sigma` is the noise level: 0 is the image, 1 is pure noise, and `velocity = noise - x0`. The model's own time is
t = 1 - sigma; only `models.transformer.velocity` knows it. Everything here is fp32 or fp64, since bf16 would round
sigma by up to 0.002.
"""

from collections.abc import Sequence

import torch

from zimage_train.typing import AnyShape, LatentBatch, PerSample


def interpolate(x0: LatentBatch, noise: LatentBatch, sigma: PerSample) -> LatentBatch:
    """Return x_sigma = (1 - sigma) x0 + sigma noise for x0 and noise (b, c, h, w) and sigma (b,).

    Lipman et al. 2022, eq. 22.
    """
    s = sigma.to(x0.dtype).view(-1, 1, 1, 1)
    return (1.0 - s) * x0 + s * noise


def target_velocity(x0: AnyShape, noise: AnyShape) -> AnyShape:
    """Return d x_sigma / d sigma = noise - x0, the target of the model's prediction."""
    return noise - x0


def shift(sigma: AnyShape, factor: float) -> AnyShape:
    """Return sigma' = factor sigma / (1 + (factor - 1) sigma), which spends more steps at high noise.

    Esser et al. 2024, eq. 23.
    """
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


def unshift(sigma: float, factor: float) -> float:
    """Return the sigma that `shift` maps to `sigma`."""
    return sigma / (factor - (factor - 1.0) * sigma)


def sampling_sigmas(steps: int, factor: float) -> list[float]:
    """Return the grid of a sampler: 1, (n-1)/n, ..., 1/n, shifted, then 0. With 8 steps and factor 3 it is Turbo's."""
    raw = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64)
    return [*shift(raw, factor).tolist(), 0.0]


def sampling_sigmas_through(steps: int, factor: float, through: Sequence[float]) -> list[float]:
    """Return the grid of a sampler with the sigmas of `through` inserted, each once, from noise to 0."""
    sigmas = list(through)
    for sigma in sampling_sigmas(steps, factor):
        if all(abs(sigma - given) > 1e-9 for given in through):
            sigmas.append(sigma)
    return sorted(sigmas, reverse=True)


def pair_from_velocity(x: AnyShape, velocity: AnyShape, sigma: float) -> tuple[AnyShape, AnyShape]:
    """Return the image and the noise whose mixture at `sigma` is `x` and whose velocity is `velocity`.

    (1 - sigma) x0 + sigma noise = x and noise - x0 = v give x0 = x - sigma v and noise = x + (1 - sigma) v.
    """
    return x - sigma * velocity, x + (1.0 - sigma) * velocity


def euler(latents: AnyShape, velocity: AnyShape, sigma: float, next_sigma: float) -> AnyShape:
    """Return x' = x + (sigma' - sigma) velocity: an Euler step in fp32."""
    # The difference of two fp32 numbers, as in diffusers' scheduler; in fp64 it could differ in the last bit.
    step = torch.tensor(next_sigma, dtype=torch.float32) - torch.tensor(sigma, dtype=torch.float32)
    return latents + step.to(latents.device) * velocity


def apply_guidance(positive: AnyShape, negative: AnyShape, guidance: float) -> AnyShape:
    """Return pos + g (pos - neg): diffusers' convention for Z-Image, in which the usual CFG scale is g + 1."""
    return positive + guidance * (positive - negative)


def differential_target(prediction: AnyShape, target: AnyShape, scale: float) -> AnyShape:
    """Return target' = pred + scale (target - pred); an MSE to it has `scale` times the gradient.

    The prediction is detached within the target, or the gradient would vanish through it in part.
    """
    fixed = prediction.detach()
    return fixed + scale * (target - fixed)


def slider_shift(positive: AnyShape, negative: AnyShape, guidance: float) -> AnyShape:
    """Return g (positive - negative): by how much the velocity of a slider moves at the weight +1, and at -1 back."""
    return guidance * (positive - negative)


def contrastive_target(unconditional: AnyShape, target: AnyShape, scale: float) -> AnyShape:
    """Return target' = u + scale (target - u), pushed away from the prediction `u` for the empty prompt.

    With scale 1 it is the target itself.
    """
    return unconditional + scale * (target - unconditional)
