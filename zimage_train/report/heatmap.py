"""A table of numbers as an image: one coloured cell each, darker for less."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_train.io import atomic

CELL_WIDTH_PX, CELL_HEIGHT_PX, LABEL_PX, TOP_PX = 64, 22, 130, 52
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From the least to the most: stops of the viridis scale, which is even to the eye, also in grey."""


def save_heatmap(
    path: Path, title: str, rows: list[str], columns: list[str], values: list[list[float | None]], most: float
) -> None:
    """Write a PNG with a cell for each value between 0 and `most`; None stays white.

    Raises:
        DiskError: it cannot be written.
    """
    width = LABEL_PX + CELL_WIDTH_PX * len(columns) + 10
    image = Image.new("RGB", (width, TOP_PX + CELL_HEIGHT_PX * len(rows) + 10), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    draw.text((8, 8), title, fill="black", font=ImageFont.load_default(14))
    for number, column in enumerate(columns):
        draw.text((LABEL_PX + number * CELL_WIDTH_PX + 4, TOP_PX - 18), column, fill="black", font=font)
    for row, (label, line) in enumerate(zip(rows, values, strict=True)):
        top = TOP_PX + row * CELL_HEIGHT_PX
        draw.text((8, top + 4), label, fill="black", font=font)
        for number, value in enumerate(line):
            if value is not None:
                left = LABEL_PX + number * CELL_WIDTH_PX
                share = value / most if most > 0 else 0.0
                draw.rectangle((left, top, left + CELL_WIDTH_PX - 2, top + CELL_HEIGHT_PX - 2), fill=colour(share))
                ink = "black" if share > 0.6 else "white"
                draw.text((left + 6, top + 4), f"{value:.3g}", fill=ink, font=font)
    with atomic.replace_atomically(path) as file:
        image.save(file, format="PNG")


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    weight = place - index
    low, high = COLOURS[index], COLOURS[index + 1]
    red, green, blue = (round(one + (other - one) * weight) for one, other in zip(low, high, strict=True))
    return red, green, blue
