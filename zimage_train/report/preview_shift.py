"""How far each preview is from its image before training, and what that says: nothing learned yet, or leaking."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from zimage_train.report.preview_images import PreviewTable

NOT_LEARNING_BELOW = 0.02
"""Below this the images with the trigger look as before training."""
LEAK_RATIO = 0.75
"""From this share of the change with the trigger on, images without it change nearly as much."""
NOTICEABLE_SHIFT = 0.05
"""A change without the trigger below this is no leak, whatever its share."""
LATE_SHARE = 0.25
"""Before this share of the run nothing is said."""


@dataclass(frozen=True)
class PreviewShift:
    """Mean distance of the previews of one step from those of step 0; None: there is no such prompt."""

    step: int
    with_trigger: float | None
    without_trigger: float | None


def image_distance(one: Path, other: Path) -> float | None:
    """Root mean square difference of two images' values, 0 to 1; None if their sizes differ."""
    with Image.open(one) as first, Image.open(other) as second:
        if first.size != second.size:
            return None
        a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (first, second))
    return float(np.sqrt(((a - b) ** 2).mean()))


def distances(table: PreviewTable) -> dict[int, list[float | None]]:
    """Step -> each column's distance from its image of step 0; None without one."""
    first = table.rows.get(0, [None] * len(table.recipes))
    return {
        step: [
            image_distance(start, path) if start and path else None for start, path in zip(first, paths, strict=True)
        ]
        for step, paths in table.rows.items()
        if step > 0
    }


def preview_shifts(table: PreviewTable, triggers: Collection[str]) -> list[PreviewShift]:
    """The means of every step, over prompts with a trigger and over those without."""
    with_trigger = [has_trigger(recipe.prompt, triggers) for recipe in table.recipes]

    def mean(values: list[float | None], wanted: bool) -> float | None:
        found = [value for value, has in zip(values, with_trigger, strict=True) if has is wanted and value is not None]
        return sum(found) / len(found) if found else None

    return [PreviewShift(step, mean(row, True), mean(row, False)) for step, row in distances(table).items()]


def sharpness(path: Path) -> float:
    """Variance of the Laplacian of an image's luma, 0 to 255: blur and washed-out edges lower it."""
    with Image.open(path) as image:
        luma = np.asarray(image.convert("L"), dtype=np.float64)
    inner = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((around - 4 * inner).var())


def sharpness_kept(table: PreviewTable, triggers: Collection[str], step: int) -> float | None:
    """The sharpness of a step's previews as a share of those before training; a mean over prompts without a trigger.

    A prompt of the concept may rightly become softer or sharper, so it counts only where there is no other.
    """
    pairs = [
        (start, now, has_trigger(recipe.prompt, triggers))
        for start, now, recipe in zip(table.rows.get(0, []), table.rows.get(step, []), table.recipes, strict=False)
        if start and now
    ]
    neutral = [pair for pair in pairs if not pair[2]] or pairs
    shares = [sharpness(now) / before for start, now, _ in neutral if (before := sharpness(start)) > 0]
    return sum(shares) / len(shares) if shares else None


def has_trigger(prompt: str, triggers: Collection[str]) -> bool:
    """Whether the prompt speaks of a concept."""
    return any(trigger in prompt for trigger in triggers)


def shift_remark(change: PreviewShift, last: int) -> str | None:
    """What the user should know after this step of `last`, or nothing."""
    if change.with_trigger is None or change.step < LATE_SHARE * last:
        return None
    if change.with_trigger < NOT_LEARNING_BELOW:
        return (
            f"not learning: at step {change.step} previews with the trigger differ by {change.with_trigger:.3f} from "
            "those before training; check captions and trigger, or raise optimizer.lr"
        )
    without = change.without_trigger
    if without is not None and without >= max(NOTICEABLE_SHIFT, LEAK_RATIO * change.with_trigger):
        return (
            f"leaking: at step {change.step} previews without the trigger changed by {without:.3f}, with it by "
            f"{change.with_trigger:.3f}; describe in captions what is not the concept (`zimage-train caption`), use "
            "fewer steps, or a lower rank"
        )
    return None
