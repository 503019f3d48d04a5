"""A table of numbers as an image of coloured cells, darker for smaller numbers."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_train.io import atomic

CELL_WIDTH_PX, CELL_HEIGHT_PX, LABEL_PX, TOP_PX = 64, 22, 130, 52
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Stops of the viridis scale, from low to high; it is perceptually uniform, also in grey."""


def save_heatmap(
    path: Path, title: str, rows: list[str], columns: list[str], values: list[list[float | None]], max_value: float
) -> None:
    """Write a PNG with a cell for each value between 0 and `max_value`, white for None.

    Raises:
        DiskError: the file cannot be written.
    """
    width = LABEL_PX + CELL_WIDTH_PX * len(columns) + 10
    image = Image.new("RGB", (width, TOP_PX + CELL_HEIGHT_PX * len(rows) + 10), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    draw.text((8, 8), title, fill="black", font=ImageFont.load_default(14))
    for number, column in enumerate(columns):
        draw.text((LABEL_PX + number * CELL_WIDTH_PX + 4, TOP_PX - 18), column, fill="black", font=font)
    for row, (label, row_values) in enumerate(zip(rows, values, strict=True)):
        top = TOP_PX + row * CELL_HEIGHT_PX
        draw.text((8, top + 4), label, fill="black", font=font)
        for number, value in enumerate(row_values):
            if value is not None:
                left = LABEL_PX + number * CELL_WIDTH_PX
                fraction = value / max_value if max_value > 0 else 0.0
                draw.rectangle((left, top, left + CELL_WIDTH_PX - 2, top + CELL_HEIGHT_PX - 2), fill=colour(fraction))
                ink = "black" if fraction > 0.6 else "white"
                draw.text((left + 6, top + 4), f"{value:.3g}", fill=ink, font=font)
    with atomic.replace_atomically(path) as file:
        image.save(file, format="PNG")


def colour(fraction: float) -> tuple[int, int, int]:
    """Return the RGB colour of a number in [0, 1], interpolated between the two nearest stops."""
    position = min(max(fraction, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(position), len(COLOURS) - 2)
    weight = position - index
    low_stop, high_stop = COLOURS[index], COLOURS[index + 1]
    red, green, blue = (round(low + (high - low) * weight) for low, high in zip(low_stop, high_stop, strict=True))
    return red, green, blue
