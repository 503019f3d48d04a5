"""Which size an image is trained at: multiples of 16 px, close in area and aspect, never upscaled."""

import math
from typing import NamedTuple

STEP_PX = 16
MAX_SIDE_PX = 512 * STEP_PX
"""The position tables of the transformer end here."""


class Bucket(NamedTuple):
    """Width and height in px, both multiples of 16."""

    width: int
    height: int


def nearest_bucket(width: int, height: int, resolution: float) -> Bucket:
    """The size at which an image of `width` x `height` px is trained at `resolution`, the root of an area.

    Its area is at most resolution^2 and at most the image's own; among the multiples of 16 around the ideal size
    it loses the fewest pixels to cropping and rounding. A turned image gets the turned bucket.

    Raises:
        ValueError: a side is shorter than 16 px, here or at this resolution.
    """
    if min(width, height) < STEP_PX:
        raise ValueError(f"{width}x{height} px is smaller than one {STEP_PX} px patch")
    if width < height:
        return Bucket(*reversed(nearest_bucket(height, width, resolution)))
    limit = min(width * height, round(resolution**2))
    scale = math.sqrt(limit / (width * height))
    candidates = [
        Bucket(w, h)
        for w in _around(width * scale)
        for h in _around(height * scale)
        if w * h <= limit and w <= width and h <= height and (width != height or w == h)
    ]
    if not candidates:
        raise ValueError(f"{width}x{height} px is too narrow for resolution {resolution:.0f}")
    return max(candidates, key=lambda size: (_kept(width, height, size) * size.width * size.height, size))


def _around(side: float) -> list[int]:
    low = min(max(math.floor(side / STEP_PX), 1) * STEP_PX, MAX_SIDE_PX)
    return [low] if low == MAX_SIDE_PX else [low, low + STEP_PX]


def _kept(width: int, height: int, size: Bucket) -> float:
    """Share of the image that survives scaling it to cover `size` and cropping the rest."""
    scale = max(size.width / width, size.height / height)
    return size.width * size.height / (width * scale * height * scale)


def crop_percent(width: int, height: int, size: Bucket) -> float:
    """How much of an image is cropped away in its bucket, in percent."""
    return 100 * (1 - _kept(width, height, size))
