"""The size at which an image is trained: multiples of 16 px, close in area and aspect, never upscaled."""

import itertools
import math
from typing import NamedTuple

STEP_PX = 16
"""Every side is a multiple of this: 8 px for each latent, times 2 latents for each patch of the transformer."""
MAX_SIDE_PX = 512 * STEP_PX
"""Longest side: the position tables of the transformer have 512 patches for each axis."""


class Bucket(NamedTuple):
    """Width and height in px, both multiples of 16."""

    width: int
    height: int


def nearest_bucket(width: int, height: int, resolution: float) -> Bucket:
    """Return the size at which an image of `width` x `height` px is trained at `resolution`.

    Its area is at most resolution^2 and at most that of the image. Among the multiples of 16 around the ideal size it
    is the size that loses the fewest pixels to cropping and rounding. A square image gets a square bucket, and an image
    turned by 90 degrees the turned bucket.

    Raises:
        ValueError: a side is shorter than 16 px, in the image or once it is scaled to `resolution`.
    """
    if min(width, height) < STEP_PX:
        raise ValueError(f"{width}x{height} px is smaller than one {STEP_PX} px patch")
    if width < height:
        return Bucket(*reversed(nearest_bucket(height, width, resolution)))
    limit = min(width * height, round(resolution**2))
    scale = math.sqrt(limit / (width * height))
    candidates: list[Bucket] = []
    for w, h in itertools.product(_multiples_around(width * scale), _multiples_around(height * scale)):
        is_upscaled = w > width or h > height
        breaks_square = width == height and w != h
        if w * h <= limit and not is_upscaled and not breaks_square:
            candidates.append(Bucket(w, h))
    if not candidates:
        raise ValueError(f"{width}x{height} px is too narrow for resolution {resolution:.0f}")

    def score(size: Bucket) -> float:
        """Return the area of `size`, reduced by the fraction of the image that is cropped away."""
        return _kept_fraction(width, height, size) * size.width * size.height

    # The size itself decides between equal scores, so that the result does not depend on the order of the candidates.
    return max(candidates, key=lambda size: (score(size), size))


def _multiples_around(side: float) -> list[int]:
    """Return the multiples of 16 px below and above `side`, within the limits of a side."""
    low = min(max(math.floor(side / STEP_PX), 1) * STEP_PX, MAX_SIDE_PX)
    return [low] if low == MAX_SIDE_PX else [low, low + STEP_PX]


def _kept_fraction(width: int, height: int, size: Bucket) -> float:
    """Return the fraction of an image that is left when it is scaled to cover `size` and the rest is cropped."""
    scale = max(size.width / width, size.height / height)
    return size.width * size.height / (width * scale * height * scale)


def crop_percent(width: int, height: int, size: Bucket) -> float:
    """Return how much of an image is cropped away in its bucket, in percent."""
    return 100 * (1 - _kept_fraction(width, height, size))
