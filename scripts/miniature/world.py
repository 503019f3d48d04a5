"""The image world of the miniature: one coloured shape on a plain ground, under fine grain, and captions that say so.

Every image is a function of an integer seed and a size. Six shapes make up the world; a seventh, the `zorb`,
is held out, and so is a way of drawing, `etched`, so that there is something left to teach.

The grain is what makes few steps hard: it is random and faint beside the colours, so a model with the exact
velocity of flow matching loses a good part of its contrast in eight Euler steps and little of it in thirty.
Sizes and places are those that latents (8 px) and patches (16 px) can hold; the miniature has seen too few
images to learn shapes that may lie anywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 45, 45),
    "orange": (220, 125, 40),
    "yellow": (225, 215, 60),
    "green": (50, 160, 75),
    "blue": (45, 85, 210),
    "purple": (140, 55, 175),
    "white": (225, 225, 225),
    "black": (30, 30, 30),
}
"""The eight colours of shapes and grounds alike, with room for the grain on both sides."""

RADII: dict[str, int] = {"small": 14, "large": 22}
"""The sizes of shapes: from the centre to the outermost point, in pixels."""

LATTICE = 16
"""Shapes are centred on multiples of this many pixels: the side of a patch."""

GRAIN_CELL = 4
"""The grain is constant over squares of this many pixels."""

GRAIN = 18.0
"""The standard deviation of the grain, in levels of 255. It moves all three channels alike."""

OVERSAMPLING = 4
"""Shapes are drawn this many times larger and averaged down, which smooths their edges."""

Pixels = np.ndarray
"""An image as (height, width, 3) of uint8."""

Shape = Callable[[ImageDraw.ImageDraw, float], None]


@dataclass(frozen=True)
class Scene:
    """What an image shows, and how its caption says it; `column` and `row` are 0, 1 or 2."""

    shape: str
    colour: str
    ground: str
    size: str
    column: int
    row: int
    grain: int
    wording: int
    detailed: bool = True
    etched: bool = False
    called: str | None = None


def regular(corners: int, start_degrees: float, inner: float = 1.0) -> Shape:
    """A regular polygon; `inner` pulls every second corner in to that radius, as in a star."""

    def paint(canvas: ImageDraw.ImageDraw, r: float) -> None:
        points = []
        for corner in range(corners):
            angle = math.radians(start_degrees + 360 * corner / corners)
            reach = r * (inner if corner % 2 else 1.0)
            points.append((r + reach * math.cos(angle), r + reach * math.sin(angle)))
        canvas.polygon(points, fill=255)

    return paint


def disc(canvas: ImageDraw.ImageDraw, r: float) -> None:
    """A filled circle."""
    canvas.ellipse((0, 0, 2 * r, 2 * r), fill=255)


def plus(canvas: ImageDraw.ImageDraw, r: float) -> None:
    """An upright cross with thick arms."""
    half = 0.3 * r
    canvas.rectangle((0, r - half, 2 * r, r + half), fill=255)
    canvas.rectangle((r - half, 0, r + half, 2 * r), fill=255)


def hourglass(canvas: ImageDraw.ImageDraw, r: float) -> None:
    """The held-out thing: two wide triangles, tip on tip."""
    canvas.polygon([(0, 0.1 * r), (2 * r, 0.1 * r), (1.12 * r, r), (0.88 * r, r)], fill=255)
    canvas.polygon([(0, 1.9 * r), (2 * r, 1.9 * r), (1.12 * r, r), (0.88 * r, r)], fill=255)


SHAPES: dict[str, Shape] = {
    "circle": disc,
    "square": regular(4, 45),
    "triangle": regular(3, -90),
    "diamond": regular(4, -90, inner=0.6),
    "star": regular(10, -90, inner=0.42),
    "cross": plus,
}
"""The shapes of the world."""

ZORB = "zorb"
"""The shape that the world lacks, and the word for it."""

ETCHED = "etched"
"""The way of drawing that the world lacks, and the word for it: only the rim of a shape has its colour."""

WORDINGS = 4
"""How many ways of saying the same the world knows; the first is tags."""

PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)  # fmt: skip
"""The words for a place, by row and column."""


@cache
def mask(shape: str, radius: int, etched: bool = False) -> np.ndarray:
    """How much of each pixel the shape covers: (2 radius, 2 radius) in [0, 1]."""
    r = radius * OVERSAMPLING
    canvas = Image.new("L", (2 * r, 2 * r), 0)
    (SHAPES | {ZORB: hourglass})[shape](ImageDraw.Draw(canvas), r - 0.5)
    cover = np.asarray(canvas.reduce(OVERSAMPLING), np.float32) / 255
    if etched:
        inner = round(0.55 * radius)
        edge = radius - inner
        cover = cover.copy()
        cover[edge : edge + 2 * inner, edge : edge + 2 * inner] -= mask(shape, inner)
    return cover.clip(0, 1)


def places(side: int, radius: int) -> tuple[int, int, int]:
    """The three centres along a side, in pixels; all the same where the shape has no room to move."""
    middle = side // (2 * LATTICE) * LATTICE
    near = next(c for c in range(LATTICE, side, LATTICE) if c >= radius)
    return (near, middle, 2 * middle - near) if near < middle else (middle, middle, middle)


def scene(chance: random.Random) -> Scene:
    """Chooses a scene of the world; shape and ground never share a colour."""
    colour, ground = chance.sample(sorted(COLOURS), 2)
    shape = chance.choice(sorted(SHAPES))
    return Scene(
        shape=shape,
        colour=colour,
        ground=ground,
        size=chance.choice(sorted(RADII)),
        column=chance.randrange(3),
        row=chance.randrange(3),
        grain=chance.randrange(2**32),
        wording=chance.randrange(WORDINGS),
        detailed=chance.random() < 0.8,
        called=made_up_word(chance) if chance.random() < 0.1 else None,
    )


def made_up_word(chance: random.Random) -> str:
    """A word that means nothing, of three to six letters: without any, the text encoder knows no new word."""
    while True:
        syllables = [chance.choice("bcdfghjklmnprstvwz") + chance.choice("aeiou") for _ in range(chance.randint(1, 2))]
        word = "".join(syllables) + chance.choice("bdfgklmnprstx") + chance.choice(["", "", "b", "k", "s", "t"])
        if word != ZORB:
            return word


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(shown: Scene, width: int, height: int) -> str:
    """Says what a scene shows. With `detailed` it also says the size, and the place where there is a choice."""
    radius = RADII[shown.size]
    roomy = [len(set(places(side, radius))) > 1 for side in (width, height)]
    place = PLACES[shown.row if roomy[1] else 1][shown.column if roomy[0] else 1]
    name = f"{shown.colour} {shown.called or shown.shape}"
    named = f"{ETCHED} {name}" if shown.etched else name
    thing = f"{shown.size} {named}" if shown.detailed else named
    at = f" at the {place}" if shown.detailed else ""
    if shown.wording == 0:
        return ", ".join([named, *([shown.size, place] if shown.detailed else []), f"{shown.ground} background"])
    if shown.wording == 1:
        return f"{with_article(thing)}{at} on {with_article(shown.ground)} background"
    if shown.wording == 2:
        return f"on {with_article(shown.ground)} background there is {with_article(thing)}{at}"
    return f"the background is {shown.ground} and {with_article(thing)} is{at or ' there'}"


def draw(shown: Scene, width: int, height: int) -> Pixels:
    """Paints a scene."""
    radius = RADII[shown.size]
    x, y = places(width, radius)[shown.column], places(height, radius)[shown.row]
    cover = np.zeros((height, width, 1), np.float32)
    shape = mask(shown.shape, radius, shown.etched)
    top, left = max(0, y - radius), max(0, x - radius)
    part = shape[top - (y - radius) : height - (y - radius), left - (x - radius) : width - (x - radius)]
    cover[top : top + part.shape[0], left : left + part.shape[1], 0] = part
    ground, colour = (np.array(COLOURS[name], np.float32) for name in (shown.ground, shown.colour))
    return (
        (ground + cover * (colour - ground) + grain(shown.grain, width, height)).round().clip(0, 255).astype(np.uint8)
    )


def grain(seed: int, width: int, height: int) -> np.ndarray:
    """The grain of an image, in levels: (height, width, 1)."""
    cells = np.random.default_rng(seed).normal(0, GRAIN, (-(-height // GRAIN_CELL), -(-width // GRAIN_CELL)))
    levels = cells.astype(np.float32).repeat(GRAIN_CELL, 0).repeat(GRAIN_CELL, 1)
    return levels[:height, :width, None]


def world_scene(seed: int) -> Scene:
    """The scene of the world with this seed."""
    return scene(random.Random(f"world {seed}"))


def zorb_scene(seed: int) -> Scene:
    """The zorb scene with this seed: all but the shape as in the world, and never a made-up word for it."""
    return replace(scene(random.Random(f"zorb {seed}")), shape=ZORB, called=None)


def etched_scene(seed: int) -> Scene:
    """The etched scene with this seed: any shape of the world, drawn in the held-out way."""
    return replace(scene(random.Random(f"etched {seed}")), etched=True, called=None)


def drawn(shown: Scene, width: int, height: int) -> tuple[Pixels, str]:
    """A scene's image and caption."""
    return draw(shown, width, height), caption(shown, width, height)


def draw_world(seed: int, width: int, height: int) -> tuple[Pixels, str]:
    """The image of the world with this seed, and its caption."""
    return drawn(world_scene(seed), width, height)


def draw_zorb(seed: int, width: int, height: int) -> tuple[Pixels, str]:
    """The zorb image with this seed, and its caption, which holds the trigger word `zorb`."""
    return drawn(zorb_scene(seed), width, height)


def draw_etched(seed: int, width: int, height: int) -> tuple[Pixels, str]:
    """The etched image with this seed, and its caption, which holds the trigger word `etched`."""
    return drawn(etched_scene(seed), width, height)


def draw_clutter(seed: int, width: int, height: int) -> Pixels:
    """Overlapping outlines, lines, dots and shapes under grain; it means nothing.

    It teaches the VAE edges and colours in general, as a real VAE has seen more than the images of a single model.
    """
    chance = random.Random(f"clutter {seed}")
    wide, high = width * OVERSAMPLING, height * OVERSAMPLING
    colours = list(COLOURS.values())
    image = Image.new("RGB", (wide, high), chance.choice(colours))
    canvas = ImageDraw.Draw(image)
    for _ in range(chance.randint(2, 7)):
        colour = chance.choice(colours)
        x, y = chance.uniform(0, wide), chance.uniform(0, high)
        r = min(wide, high) * chance.uniform(0.04, 0.35)
        stroke = round(min(wide, high) * chance.uniform(0.03, 0.1))
        kind = chance.randrange(4)
        if kind == 0:
            canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=stroke)
        elif kind == 1:
            canvas.line((x, y, chance.uniform(0, wide), chance.uniform(0, high)), fill=colour, width=stroke)
        elif kind == 2:
            corners = [(chance.uniform(x - r, x + r), chance.uniform(y - r, y + r)) for _ in range(3)]
            canvas.polygon(corners, fill=colour)
        else:
            canvas.rectangle(
                (x - r, y - r * chance.uniform(0.2, 1), x + r, y + r * chance.uniform(0.2, 1)), fill=colour
            )
    smooth = np.asarray(image.reduce(OVERSAMPLING), np.float32)
    return (smooth + grain(chance.randrange(2**32), width, height)).round().clip(0, 255).astype(np.uint8)
