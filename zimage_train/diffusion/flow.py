"""The equations of flow matching, a function each, independent of dataset, model and config.

`sigma` is the noise level: 0 is the image, 1 is pure noise, and `velocity = noise - x0`. The model's own time is
t = 1 - sigma; only `models.transformer.velocity` knows it. Everything here is fp32 or fp64, since bf16 would round
sigma by up to 0.002.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def bias_quantile(u: AnyShape, bias: str) -> AnyShape:
    """Bend uniform `u` towards 0 (noise) with u^3, or 1 (image) with 1 - u^3, as AI Toolkit's content and style do."""
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
"""Cumulative distribution function of each density, as f(sigma, shift factor)."""


def quantile_sigma(u: AnyShape, type: str, bias: str, factor: float, low: float, high: float) -> AnyShape:
    """Map a uniform draw `u` in [0, 1) to a sigma of the density `type`, bent by `bias`, truncated to [low, high].

    The bias acts on the position counted from the noisy end, before the density's quantile function, as in AI Toolkit.
    Returns fp64.
    """
    # fp64, because the sigmoid's quantile function loses digits near 0 and 1.
    from_noise = bias_quantile(u.double(), bias)
    # Truncating a density maps u to the range of its CDF between the limits: no draw is rejected or clipped to a limit.
    # So each sample uses a single draw. The final clamp is for rounding.
    bottom, top = CDFS[type](low, factor), CDFS[type](high, factor)
    p = bottom + (top - bottom) * (1.0 - from_noise)
    return QUANTILES[type](p, factor).clamp(low, high)


WEIGHTED_KNOTS: list[tuple[float, float]] = [
    (0, 0.9057), (1, 0.9098), (2, 0.9251), (3, 0.9399), (4, 0.9497), (5, 0.9622), (6, 0.9692),
    (7, 0.9927), (8, 1.0166), (9, 1.0393), (10, 1.0429), (11, 1.0678), (12, 1.0929), (13, 1.1149),
    (14, 1.1016), (15, 1.1209), (16, 1.1399), (17, 1.1559), (18, 1.1438), (19, 1.1606), (20, 1.1761),
    (25, 1.2201), (30, 1.2562), (35, 1.2973), (40, 1.3295), (45, 1.3556), (50, 1.3748), (55, 1.3910),
    (60, 1.4132), (70, 1.4601), (80, 1.4760), (90, 1.4951), (100, 1.5068), (110, 1.5116), (120, 1.5187),
    (130, 1.5184), (140, 1.5163), (150, 1.5069), (160, 1.4980), (170, 1.4874), (180, 1.4733), (190, 1.4587),
    (200, 1.4413), (210, 1.4249), (220, 1.4082), (230, 1.3910), (240, 1.3736), (250, 1.3549), (260, 1.3375),
    (270, 1.3186), (280, 1.3005), (290, 1.2810), (300, 1.2636), (310, 1.2446), (320, 1.2269), (330, 1.2084),
    (340, 1.1899), (350, 1.1720), (360, 1.1539), (370, 1.1354), (380, 1.1172), (390, 1.0997), (400, 1.0826),
    (410, 1.0654), (420, 1.0487), (430, 1.0326), (440, 1.0160), (450, 1.0004), (460, 0.9846), (470, 0.9694),
    (480, 0.9543), (490, 0.9398), (500, 0.9254), (510, 0.9114), (520, 0.8980), (530, 0.8849), (540, 0.8718),
    (550, 0.8596), (560, 0.8476), (570, 0.8363), (580, 0.8254), (590, 0.8149), (600, 0.8049), (610, 0.7955),
    (620, 0.7864), (630, 0.7776), (640, 0.7694), (650, 0.7618), (660, 0.7547), (670, 0.7479), (680, 0.7418),
    (690, 0.7364), (700, 0.7312), (710, 0.7269), (720, 0.7228), (730, 0.7198), (740, 0.7171), (750, 0.7152),
    (760, 0.7141), (770, 0.7136), (780, 0.7138), (790, 0.7144), (800, 0.7161), (810, 0.7181), (820, 0.7203),
    (830, 0.7230), (840, 0.7258), (850, 0.7285), (860, 0.7314), (870, 0.7325), (880, 0.7311), (890, 0.7258),
    (900, 0.7162), (910, 0.7008), (920, 0.6791), (930, 0.6515), (940, 0.6189), (950, 0.5822), (960, 0.5446),
    (970, 0.5098), (980, 0.4755), (985, 0.4606), (990, 0.4521), (995, 0.4465), (997, 0.4448), (999, 0.4473),
]  # fmt: skip
"""AI Toolkit's `weighted` loss weights as knots (i, weight), where i = 1000 (1 - sigma).

The table was measured there on another model (Flex.1-alpha) and one image: the inverse of its loss at each noise
level, with mean 1. Linear interpolation between these knots reproduces its 1000 entries within 0.0093.
"""


def loss_weight(sigma: AnyShape, type: str) -> AnyShape:
    """Return the factor of the loss at `sigma`, in fp32: AI Toolkit's table for `weighted`, else 1.

    The table is piecewise linear in i = 1000 (1 - sigma) between its knots, and constant outside [0, 999].
    """
    if type != "weighted":
        return torch.ones_like(sigma, dtype=torch.float32)
    knots = torch.tensor(WEIGHTED_KNOTS, dtype=torch.float64, device=sigma.device)
    index = (1000.0 * (1.0 - sigma.double())).clamp(knots[0, 0], knots[-1, 0])
    right = torch.searchsorted(knots[:, 0].contiguous(), index).clamp(1, len(knots) - 1)
    (x0, y0), (x1, y1) = knots[right - 1].unbind(-1), knots[right].unbind(-1)
    return (y0 + (y1 - y0) * (index - x0) / (x1 - x0)).float()


def differential_target(prediction: AnyShape, target: AnyShape, scale: float) -> AnyShape:
    """Return target' = pred + scale (target - pred); an MSE to it has `scale` times the gradient.

    The prediction is detached within the target, or the gradient would vanish through it in part.
    """
    fixed = prediction.detach()
    return fixed + scale * (target - fixed)


def contrastive_target(unconditional: AnyShape, target: AnyShape, scale: float) -> AnyShape:
    """Return target' = u + scale (target - u), pushed away from the prediction `u` for the empty prompt.

    With scale 1 it is the target itself.
    """
    return unconditional + scale * (target - unconditional)
