"""The density of sigma that a config trains with, as a function that maps uniform numbers to sigmas.

Everything here is fp64, because the quantile functions lose digits near 0 and 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.config.timesteps import LISTED, NORMAL, TimestepSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import flow
from zimage_train.typing import AnyShape

GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0
"""Step of the sequence whose multiples, without their whole part, fill [0, 1) most evenly at every length."""
BISECTIONS = 54
"""Halvings of [0, 1], after which the rest is less than the spacing of fp64 numbers near 1."""


@dataclass(frozen=True)
class SigmaDensity:
    """A density of sigma: its settings, and the factor of its shift for the size of an image."""

    settings: TimestepSettings
    factor: float

    def quantile(self, u: AnyShape) -> AnyShape:
        """Map uniform draws in [0, 1) to sigmas within `min` and `max`, in fp64.

        The bias acts on the position counted from the noisy end, before the quantile function, as in AI Toolkit.
        """
        settings = self.settings
        from_noise = bias_quantile(u.double(), settings.bias)
        if settings.type in LISTED:
            return _one_of(settings.intervals(settings.min, settings.max), 1.0 - from_noise)
        # Truncating a density maps u to the range of its CDF between the limits: no draw is rejected or clipped to a
        # limit. So each sample uses a single draw. The final clamp is for rounding.
        bottom, top = self._cdf(settings.min), self._cdf(settings.max)
        p = bottom + (top - bottom) * (1.0 - from_noise)
        return flow.shift(_quantile(settings, p), self.factor).clamp(settings.min, settings.max)

    def _cdf(self, sigma: float) -> float:
        """Return the share of the density below `sigma`, after the shift."""
        if sigma in (0.0, 1.0):  # exactly, whatever rounding makes of the factor
            return sigma
        before = flow.unshift(sigma, self.factor)
        if self.settings.type not in NORMAL:
            return self.settings.cdf(before)
        mean, scale = self.settings.logit_normal
        logit = torch.logit(torch.tensor(before, dtype=torch.float64))
        return float(torch.special.ndtr((logit - mean) / scale))


def density_of(config: Config, pixels: int) -> SigmaDensity:
    """Return the density that images of so many pixels are trained with."""
    settings = config.timesteps
    return SigmaDensity(settings, settings.shift_factor(VARIANTS[config.model.variant].shift, pixels))


def bias_quantile(u: AnyShape, bias: str) -> AnyShape:
    """Bend uniform `u` towards 0 (noise) with u^3, or 1 (image) with 1 - u^3, as AI Toolkit's content and style do."""
    return BIASES[bias](u)


BIASES = {
    "balanced": lambda u: u,
    "high_noise": lambda u: u**3,
    "low_noise": lambda u: 1.0 - u**3,
}


def stratified(u: AnyShape, part: int, parts: int, epoch: int) -> AnyShape:
    """Move uniform draws `u` into one of `parts` equal parts of [0, 1), which turn by the golden ratio every epoch.

    So the draws of an epoch, one in each part, are even, and so are those of one part from epoch to epoch.
    """
    return ((part + u.double()) / parts + epoch * GOLDEN_RATIO) % 1.0


def _quantile(settings: TimestepSettings, p: Tensor) -> Tensor:
    """Return the sigma below which a share `p` of the density is, before any shift."""
    if settings.type in NORMAL:
        mean, scale = settings.logit_normal
        return torch.sigmoid(mean + scale * torch.special.ndtri(p))
    return _cosine_bell_quantile(p) if settings.type == "cosine_bell" else p


def _cosine_bell_quantile(p: Tensor) -> Tensor:
    """Return sigma with sigma - sin(2 pi sigma) / (2 pi) = p by bisection, since there is no formula for it."""
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        is_below = middle - torch.sin(2.0 * math.pi * middle) / (2.0 * math.pi) < p
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2.0


def _one_of(intervals: list[tuple[float, float]], p: Tensor) -> Tensor:
    """Return for `p` in [0, 1] a sigma of one of `intervals`: the whole part of p n chooses it, the rest the place."""
    low, high = torch.tensor(intervals, dtype=torch.float64, device=p.device).unbind(-1)
    position = p * len(intervals)
    index = position.long().clamp(max=len(intervals) - 1)
    return low[index] + (position - index) * (high[index] - low[index])
