"""Densities of sigma over each other, as an image of two panels: how often each is drawn, and how much it counts."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_train.io import atomic

SCALE = 2
"""Pixels of the image for each px below, so that it is sharp where it is enlarged."""
WIDTH_PX, PANEL_PX, LEFT_PX, GAP_PX, LINE_PX = 900, 230, 48, 46, 20
COLOURS = ((31, 92, 179), (214, 91, 16), (46, 139, 87), (128, 62, 148))
"""Of each config; blue and orange stay apart for every kind of colour vision."""
GRID, INK = (225, 225, 225), (40, 40, 40)
TICKS = 5
ROUND_STEPS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""Steps of a scale that are easily read, times a power of ten."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of a config: values at equal steps of sigma from 0 to 1, of mean 1 where they are a density."""

    label: str
    density: list[float]
    weighted: list[float]
    """The density times the loss weight."""


def save_density_plot(path: Path, curves: Sequence[Curves]) -> None:
    """Write a PNG with a panel of the densities and a panel of the densities times their loss weights.

    Raises:
        DiskError: the file cannot be written.
    """
    legend = LINE_PX * len(curves)
    height = legend + 2 * (PANEL_PX + GAP_PX) + LINE_PX
    image = Image.new("RGB", (WIDTH_PX * SCALE, height * SCALE), "white")
    draw = ImageDraw.Draw(image)
    for number, curve in enumerate(curves):
        top, colour = 6 + number * LINE_PX, COLOURS[number % len(COLOURS)]
        draw.line(_scaled((LEFT_PX, top + 8, LEFT_PX + 24, top + 8)), fill=colour, width=3 * SCALE)
        _text(draw, LEFT_PX + 32, top, curve.label)
    _panel(draw, legend + 30, "how often each noise level is drawn", [curve.density for curve in curves])
    second = legend + 30 + PANEL_PX + GAP_PX
    _panel(draw, second, "the same, times its loss weight", [curve.weighted for curve in curves])
    _text(draw, LEFT_PX, second + PANEL_PX + 18, "sigma: 0 is the image, 1 is pure noise")
    with atomic.replace_atomically(path) as file:
        image.save(file, format="PNG")


def _panel(draw: ImageDraw.ImageDraw, top: int, title: str, lines: Sequence[Sequence[float]]) -> None:
    """Draw the lines of a panel below its title, with a scale that holds all of them."""
    largest = TICKS * _round_step(max(max(values) for values in lines) / TICKS)
    bottom, width = top + PANEL_PX, WIDTH_PX - LEFT_PX - 20
    _text(draw, LEFT_PX, top - 20, title)
    for tick in range(TICKS + 1):
        share = tick / TICKS
        x, y = LEFT_PX + width * share, bottom - PANEL_PX * share
        draw.line(_scaled((x, top, x, bottom)), fill=GRID, width=SCALE)
        draw.line(_scaled((LEFT_PX, y, LEFT_PX + width, y)), fill=GRID, width=SCALE)
        _text(draw, x - 8, bottom + 3, f"{share:g}")
        _text(draw, 8, y - 8, f"{largest * share:.2g}")
    for colour, values in zip(itertools.cycle(COLOURS), lines, strict=False):
        points: list[float] = []
        for index, value in enumerate(values):
            y = bottom - PANEL_PX * value / largest
            points += [LEFT_PX + width * index / len(values), y, LEFT_PX + width * (index + 1) / len(values), y]
        draw.line(_scaled(points), fill=colour, width=2 * SCALE)


def _round_step(least: float) -> float:
    """Return the smallest round number that is at least so large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in ROUND_STEPS if step * power >= least)


def _scaled(points: Sequence[float]) -> list[float]:
    return [point * SCALE for point in points]


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str) -> None:
    draw.text((x * SCALE, y * SCALE), text, fill=INK, font=ImageFont.load_default(12 * SCALE))
