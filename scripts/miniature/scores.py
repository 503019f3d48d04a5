"""Scores of images of the miniature's world against what was asked for: exact ground truth, no neural judge.

Fidelity asks for the shape, its colour and the ground's; sharpness compares the grain's energy with the world's;
a concept is there if the shape or the way of drawing is held out. All lie in [0, 1], higher is better.
Drift is what training took of fidelity times sharpness on captions that have nothing to do with the concept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from miniature import world

BOX = 5
"""Pixels are averaged over squares of this side before colours are told apart, against the grain."""

FAR = 60.0
"""A pixel further than this from the ground's colour is not ground; the closest two colours are 90 apart."""

LEAST_PIXELS = 60
"""Fewer pixels than this make no shape; the smallest shape of the world, a small star, has 170."""

LEAST_OVERLAP = 0.6
"""A shape is recognised if it shares at least this part of the union with its true outline."""

FRAME = 4
"""The ground's colour is read from a frame of this many pixels along the border."""

NAMES = list(world.COLOURS)
PALETTE = np.array([world.COLOURS[name] for name in NAMES], np.float32)


@dataclass(frozen=True)
class Seen:
    """What is on an image: None where nothing is recognised; `overlap` with the outline of that shape."""

    shape: str | None
    etched: bool
    colour: str | None
    ground: str
    overlap: float
    sharpness: float


def look(image: world.Pixels) -> Seen:
    """Recognises what an image of (height, width, 3) uint8 shows."""
    smooth = box(image.astype(np.float32))
    ground = nearest(np.median(frame_of(smooth), 0)[None])[0]
    away = np.linalg.norm(smooth - PALETTE[ground], axis=2) > FAR
    others = nearest(smooth[away])
    counts = np.bincount(others[others != ground], minlength=len(NAMES))
    if counts.max() < LEAST_PIXELS:
        return Seen(None, False, None, NAMES[ground], 0.0, sharpness(image, np.zeros(away.shape, bool)))
    colour = int(counts.argmax())
    axis = PALETTE[colour] - PALETTE[ground]
    thing = (smooth - PALETTE[ground]) @ axis / (axis @ axis) > 0.5
    shape, etched, overlap = recognise(thing)
    return Seen(shape, etched, NAMES[colour], NAMES[ground], overlap, sharpness(image, thing | away))


def fidelity(seen: Seen, asked: world.Scene) -> float:
    """The share of what was asked for that is there: the shape drawn as asked, its colour, the ground's."""
    right_shape = seen.shape == asked.shape and seen.etched == asked.etched
    return (right_shape + (seen.colour == asked.colour) + (seen.ground == asked.ground)) / 3


def has_concept(seen: Seen, concept: str) -> bool:
    """Whether the held-out shape, or the held-out way of drawing, is on the image."""
    return seen.etched if concept == world.ETCHED else seen.shape == world.ZORB


def sharpness(image: world.Pixels, thing: np.ndarray) -> float:
    """The energy of the grain on the ground against the world's, or the world's against it if there is too much.

    The grain is seen in the Laplacian of the brightness of its cells; cells near the shape are left out.
    """
    side = world.GRAIN_CELL
    rows, columns = image.shape[0] // side, image.shape[1] // side
    cut = (slice(rows * side), slice(columns * side))
    cells = image[cut].astype(np.float32).mean(2).reshape(rows, side, columns, side).mean((1, 3))
    taken = thing[cut].reshape(rows, side, columns, side).sum((1, 3))
    laplacian = cells[1:-1, 1:-1] - neighbours(cells) / 4
    free = taken[1:-1, 1:-1] + neighbours(taken) == 0
    if free.sum() < 16:
        return 0.0
    energy = float(laplacian[free].var()) / (world.GRAIN**2 * 1.25)
    return min(energy, 1 / energy) if energy > 0 else 0.0


def neighbours(cells: np.ndarray) -> np.ndarray:
    """The sum of the four neighbours of each inner cell."""
    return cells[:-2, 1:-1] + cells[2:, 1:-1] + cells[1:-1, :-2] + cells[1:-1, 2:]


def box(image: np.ndarray) -> np.ndarray:
    """The average of the square around each pixel."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((BOX // 2, BOX // 2), (BOX // 2, BOX // 2), (0, 0)), mode="edge")
    rows = np.add.reduce([padded[at : at + height] for at in range(BOX)])
    return np.add.reduce([rows[:, at : at + width] for at in range(BOX)]) / BOX**2


def frame_of(image: np.ndarray) -> np.ndarray:
    """The pixels along the border: (pixels, 3)."""
    inside = np.zeros(image.shape[:2], bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    return image[~inside]


def nearest(pixels: np.ndarray) -> np.ndarray:
    """The index of the world's colour that is closest to each pixel of (pixels, 3)."""
    return np.linalg.norm(pixels[:, None] - PALETTE, axis=2).argmin(1)


def recognise(thing: np.ndarray) -> tuple[str | None, bool, float]:
    """The outline of the world, plain or etched, that shares most with a mask, both centred on their own middles."""
    rows, columns = np.nonzero(thing)
    middle = rows.mean(), columns.mean()
    best: tuple[str | None, bool, float] = (None, False, LEAST_OVERLAP)
    for (shape, etched), outlines in templates().items():
        for outline, (row, column) in outlines:
            placed = place(outline, round(middle[0] - row), round(middle[1] - column), thing.shape)
            overlap = (placed & thing).sum() / (placed | thing).sum()
            if overlap >= best[2]:
                best = (shape, etched, float(overlap))
    return best


@cache
def templates() -> dict[tuple[str, bool], list[tuple[np.ndarray, tuple[float, float]]]]:
    """The outlines of every shape, and their middles as (row, column): a pair for each size, plain and etched."""
    found = {}
    for shape in (*world.SHAPES, world.ZORB):
        for etched in (False, True):
            masks = [world.mask(shape, radius, etched) for radius in world.RADII.values()]
            outlines = [box(np.pad(mask, BOX)[:, :, None])[:, :, 0] > 0.5 for mask in masks]
            found[shape, etched] = [(o, tuple(np.argwhere(o).mean(0))) for o in outlines]
    return found


def place(outline: np.ndarray, top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """The outline on an empty mask, cut off where it leaves it."""
    placed = np.zeros(shape, bool)
    rows = slice(max(0, top), min(shape[0], top + outline.shape[0]))
    columns = slice(max(0, left), min(shape[1], left + outline.shape[1]))
    placed[rows, columns] = outline[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return placed
