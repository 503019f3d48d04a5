"""How far previews have moved from those before training, and how sharp they are."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from zimage_train.config.triggers import has_any_trigger
from zimage_train.report.preview_images import PreviewTable


@dataclass(frozen=True)
class PreviewShift:
    """Mean distance of a step's previews from those of step 0; None if there is no prompt of that kind."""

    step: int
    with_trigger: float | None
    without_trigger: float | None


def image_distance(path_a: Path, path_b: Path) -> float | None:
    """Return the RMS difference of two images' values in [0, 1], or None if their sizes differ."""
    with Image.open(path_a) as image_a, Image.open(path_b) as image_b:
        if image_a.size != image_b.size:
            return None
        a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (image_a, image_b))
    return float(np.sqrt(((a - b) ** 2).mean()))


def distances(table: PreviewTable) -> dict[int, list[float | None]]:
    """Return, for each step after 0, each column's distance from its image at step 0, or None if either is missing."""
    initial_paths = table.rows.get(0, [None] * len(table.requests))
    by_step: dict[int, list[float | None]] = {}
    for step, paths in table.rows.items():
        if step > 0:
            pairs = zip(initial_paths, paths, strict=True)
            by_step[step] = [image_distance(initial, path) if initial and path else None for initial, path in pairs]
    return by_step


def preview_shifts(table: PreviewTable, triggers: Collection[str]) -> list[PreviewShift]:
    """Return the mean shift of every step after 0, over prompts with a trigger and over those without."""
    with_trigger = [has_any_trigger(request.prompt, triggers) for request in table.requests]

    def mean(row: list[float | None], of_trigger: bool) -> float | None:
        values = []
        for value, has in zip(row, with_trigger, strict=True):
            if has is of_trigger and value is not None:
                values.append(value)
        return sum(values) / len(values) if values else None

    return [PreviewShift(step, mean(row, True), mean(row, False)) for step, row in distances(table).items()]


def sharpness(path: Path) -> float:
    """Return the variance of the Laplacian of an image's luma (0 to 255), which blur and washed-out edges lower."""
    with Image.open(path) as image:
        luma = np.asarray(image.convert("L"), dtype=np.float64)
    center = luma[1:-1, 1:-1]
    neighbours = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((neighbours - 4 * center).var())


def sharpness_kept(table: PreviewTable, triggers: Collection[str], step: int) -> float | None:
    """Return the mean ratio of the sharpness of a step's previews to that before training, or None without images.

    Prompts with a trigger count only if there are no others: the concept may rightly be softer or sharper.
    """
    neutral: list[tuple[Path, Path]] = []
    with_trigger: list[tuple[Path, Path]] = []
    columns = zip(table.rows.get(0, []), table.rows.get(step, []), table.requests, strict=False)
    for initial, current, request in columns:
        if initial and current:
            pairs = with_trigger if has_any_trigger(request.prompt, triggers) else neutral
            pairs.append((initial, current))
    ratios = []
    for initial, current in neutral or with_trigger:
        before = sharpness(initial)
        if before > 0:
            ratios.append(sharpness(current) / before)
    return sum(ratios) / len(ratios) if ratios else None
