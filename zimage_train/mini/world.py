"""The picture world of the miniature: one coloured shape on a plain background, with a caption that says so.

Every picture is a function of an integer seed and a size. Six shapes make up the world; a seventh, the
`zorb`, is held out, so that there is something left to teach. `draw_clutter` draws no concept at all: it
teaches the VAE edges and colours in general, as a real VAE has seen more than the pictures of one model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (140, 60, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""The eight colours of shapes and backgrounds alike."""

OVERSAMPLING = 4
"""Pictures are drawn this many times larger and averaged down, which smooths their edges."""

Colour = tuple[int, int, int]
Shape = Callable[[ImageDraw.ImageDraw, float, float, float, Colour, Colour], None]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. The centre and the radius are fractions: of the picture, of its shorter side."""

    shape: str
    colour: str
    background: str
    centre_x: float
    centre_y: float
    radius: float
    as_tags: bool


def regular(corners: int, start_degrees: float, inner: float = 1.0) -> Shape:
    """A regular polygon; `inner` pulls every second corner in to that radius, as in a star."""

    def paint(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour, ground: Colour) -> None:
        points = []
        for corner in range(corners):
            angle = math.radians(start_degrees + 360 * corner / corners)
            reach = r * (inner if corner % 2 else 1.0)
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        canvas.polygon(points, fill=colour)

    return paint


def disc(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour, ground: Colour) -> None:
    """A filled circle."""
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def plus(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour, ground: Colour) -> None:
    """An upright cross with thick arms."""
    half = 0.3 * r
    canvas.rectangle((x - r, y - half, x + r, y + half), fill=colour)
    canvas.rectangle((x - half, y - r, x + half, y + r), fill=colour)


def zorb(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour, ground: Colour) -> None:
    """The held-out thing: a ring with a plus inside it and four dots around it."""
    disc(canvas, x, y, 0.78 * r, colour, ground)
    disc(canvas, x, y, 0.58 * r, ground, ground)
    plus(canvas, x, y, 0.4 * r, colour, ground)
    for dx in (-1, 1):
        for dy in (-1, 1):
            disc(canvas, x + 0.82 * dx * r, y + 0.82 * dy * r, 0.18 * r, colour, ground)


SHAPES: dict[str, Shape] = {
    "circle": disc,
    "square": regular(4, 45),
    "triangle": regular(3, -90),
    "diamond": regular(4, -90, inner=0.6),
    "star": regular(10, -90, inner=0.42),
    "cross": plus,
}
"""The shapes of the world."""

ZORB: dict[str, Shape] = {"zorb": zorb}
"""The shape that the world lacks."""


def scene(chance: random.Random, shapes: dict[str, Shape] = SHAPES) -> Scene:
    """Chooses what a picture shows; shape and ground never share a colour."""
    colour, background = chance.sample(sorted(COLOURS), 2)
    radius = chance.uniform(0.28, 0.4)
    return Scene(
        shape=chance.choice(sorted(shapes)),
        colour=colour,
        background=background,
        centre_x=chance.uniform(radius, 1 - radius),
        centre_y=chance.uniform(radius, 1 - radius),
        radius=radius,
        as_tags=chance.random() < 0.25,
    )


def with_article(word: str) -> str:
    """The word after "a" or "an"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def caption(shown: Scene) -> str:
    """Says what a scene shows, as a sentence or as tags."""
    if shown.as_tags:
        return f"{shown.colour} {shown.shape}, {shown.background} background"
    return f"{with_article(shown.colour)} {shown.shape} on {with_article(shown.background)} background"


def draw(shown: Scene, width: int, height: int) -> Image.Image:
    """Paints a scene."""
    wide, high = width * OVERSAMPLING, height * OVERSAMPLING
    ground = COLOURS[shown.background]
    image = Image.new("RGB", (wide, high), ground)
    paint = (SHAPES | ZORB)[shown.shape]
    x, y, r = shown.centre_x * wide, shown.centre_y * high, shown.radius * min(wide, high)
    paint(ImageDraw.Draw(image), x, y, r, COLOURS[shown.colour], ground)
    return image.reduce(OVERSAMPLING)


def draw_world(seed: int, width: int, height: int) -> tuple[Image.Image, str]:
    """The picture of the world with this seed, and its caption."""
    shown = scene(random.Random(f"world {seed}"))
    return draw(shown, width, height), caption(shown)


def draw_zorb(seed: int, width: int, height: int) -> tuple[Image.Image, str]:
    """The zorb picture with this seed, and its caption, which holds the trigger word `zorb`."""
    shown = scene(random.Random(f"zorb {seed}"), ZORB)
    return draw(shown, width, height), caption(shown)


def draw_clutter(seed: int, width: int, height: int) -> Image.Image:
    """Overlapping outlines, lines, dots and shapes in the colours of the world; it means nothing."""
    chance = random.Random(f"clutter {seed}")
    wide, high = width * OVERSAMPLING, height * OVERSAMPLING
    colours = list(COLOURS.values())
    image = Image.new("RGB", (wide, high), chance.choice(colours))
    canvas = ImageDraw.Draw(image)
    for _ in range(chance.randint(2, 7)):
        colour, other = chance.sample(colours, 2)
        x, y = chance.uniform(0, wide), chance.uniform(0, high)
        r = min(wide, high) * chance.uniform(0.04, 0.35)
        stroke = round(min(wide, high) * chance.uniform(0.03, 0.1))
        kind = chance.randrange(4)
        if kind == 0:
            canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=stroke)
        elif kind == 1:
            canvas.line((x, y, chance.uniform(0, wide), chance.uniform(0, high)), fill=colour, width=stroke)
        else:
            chance.choice(list(SHAPES.values()))(canvas, x, y, r, colour, other)
    return image.reduce(OVERSAMPLING)
