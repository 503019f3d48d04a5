"""The equations of flow matching: one function each, no dataset, no model, no config.

`sigma` is the noise level: 0 is the image, 1 is pure noise. `velocity = noise - x0`. All of it is fp32 or fp64;
half precision would round sigma by up to 0.002.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zimage_train.diffusion.weighting import WEIGHTED_KNOTS
from zimage_train.typing import AnyShape, LatentBatch, PerSample


def interpolate(x0: LatentBatch, noise: LatentBatch, sigma: PerSample) -> LatentBatch:
    """x_sigma = (1 - sigma) x0 + sigma noise; x0 and noise (b, c, h, w), sigma (b,). Lipman et al. 2022, eq. 22."""
    s = sigma.to(x0.dtype).view(-1, 1, 1, 1)
    return (1.0 - s) * x0 + s * noise


def target_velocity(x0: AnyShape, noise: AnyShape) -> AnyShape:
    """d x_sigma / d sigma = noise - x0: what the model is asked for."""
    return noise - x0


def shift(sigma: AnyShape, factor: float) -> AnyShape:
    """sigma' = factor sigma / (1 + (factor - 1) sigma): more time at high noise. Esser et al. 2024, eq. 23."""
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


def unshift(sigma: float, factor: float) -> float:
    """The inverse of `shift`."""
    return sigma / (factor - (factor - 1.0) * sigma)


def sampling_sigmas(steps: int, factor: float) -> list[float]:
    """The sigmas of a sampler: 1, (n-1)/n, ..., 1/n, shifted, then 0. For 8 steps and 3 this is Turbo's grid."""
    raw = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64)
    return [*shift(raw, factor).tolist(), 0.0]


def sampling_sigmas_through(steps: int, factor: float, through: Sequence[float]) -> list[float]:
    """The sigmas of a sampler of so many steps with those of `through` inserted, each once, from noise to 0."""
    own = [sigma for sigma in sampling_sigmas(steps, factor) if all(abs(sigma - one) > 1e-9 for one in through)]
    return sorted([*own, *through], reverse=True)


def pair_from_velocity(x: AnyShape, velocity: AnyShape, sigma: float) -> tuple[AnyShape, AnyShape]:
    """The image and the noise whose mixture at `sigma` is `x` and whose velocity is `velocity`.

    (1 - sigma) x0 + sigma noise = x and noise - x0 = v give x0 = x - sigma v and noise = x + (1 - sigma) v.
    """
    return x - sigma * velocity, x + (1.0 - sigma) * velocity


def euler(latents: AnyShape, velocity: AnyShape, sigma: float, next_sigma: float) -> AnyShape:
    """x' = x + (sigma' - sigma) velocity, in fp32."""
    step = torch.tensor(next_sigma, dtype=torch.float32) - torch.tensor(sigma, dtype=torch.float32)
    return latents + step.to(latents.device) * velocity


def apply_guidance(positive: AnyShape, negative: AnyShape, guidance: float) -> AnyShape:
    """pos + g (pos - neg): diffusers' convention for Z-Image; the usual CFG scale is g + 1."""
    return positive + guidance * (positive - negative)


def bias_quantile(u: AnyShape, bias: str) -> AnyShape:
    """Bend uniform `u` towards 0 (noise) or 1 (image): u^3 or 1 - u^3, as AI Toolkit's content and style."""
    return BIASES[bias](u)


BIASES = {
    "balanced": lambda u: u,
    "high_noise": lambda u: u**3,
    "low_noise": lambda u: 1.0 - u**3,
}


def _sigmoid_quantile(p: Tensor) -> Tensor:
    return torch.sigmoid(torch.special.ndtri(p))


def _sigmoid_cdf(sigma: float) -> float:
    value = torch.tensor(sigma, dtype=torch.float64)
    return float(torch.special.ndtr(torch.logit(value)))


QUANTILES = {
    "linear": lambda p, factor: p,
    "weighted": lambda p, factor: p,
    "sigmoid": lambda p, factor: _sigmoid_quantile(p),
    "uniform_shift": shift,
}
"""Quantile function of each density of sigma, as f(p, shift factor)."""

CDFS = {
    "linear": lambda sigma, factor: sigma,
    "weighted": lambda sigma, factor: sigma,
    "sigmoid": lambda sigma, factor: _sigmoid_cdf(sigma),
    "uniform_shift": unshift,
}


def quantile_sigma(u: AnyShape, type: str, bias: str, factor: float, low: float, high: float) -> AnyShape:
    """Sigma of a uniform draw `u` in [0, 1): the density `type`, bent by `bias`, cut to [low, high].

    The bias acts on the position from the noisy end, before the density's quantile function, as in AI Toolkit; the
    cut is a truncation of the density. fp64 in, fp64 out.
    """
    from_noise = bias_quantile(u.double(), bias)
    bottom, top = CDFS[type](low, factor), CDFS[type](high, factor)
    p = bottom + (top - bottom) * (1.0 - from_noise)
    return QUANTILES[type](p, factor).clamp(low, high)


def loss_weight(sigma: AnyShape, type: str) -> AnyShape:
    """Factor multiplied into the loss at `sigma`: AI Toolkit's table for `weighted`, else 1. fp32.

    The table is piecewise linear in i = 1000 (1 - sigma) between 126 knots; below i = 0 and beyond 999 it is flat.
    """
    if type != "weighted":
        return torch.ones_like(sigma, dtype=torch.float32)
    knots = torch.tensor(WEIGHTED_KNOTS, dtype=torch.float64, device=sigma.device)
    index = (1000.0 * (1.0 - sigma.double())).clamp(knots[0, 0], knots[-1, 0])
    right = torch.searchsorted(knots[:, 0].contiguous(), index).clamp(1, len(knots) - 1)
    (x0, y0), (x1, y1) = knots[right - 1].unbind(-1), knots[right].unbind(-1)
    return (y0 + (y1 - y0) * (index - x0) / (x1 - x0)).float()


def differential_target(prediction: AnyShape, target: AnyShape, scale: float) -> AnyShape:
    """target' = pred + scale (target - pred), detached: an MSE to it has `scale` times the gradient."""
    fixed = prediction.detach()
    return fixed + scale * (target - fixed)


def contrastive_target(unconditional: AnyShape, target: AnyShape, scale: float) -> AnyShape:
    """target' = u + scale (target - u): away from what the model makes of the empty prompt; 1 changes nothing."""
    return unconditional + scale * (target - unconditional)
