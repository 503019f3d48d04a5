"""A grid of images with labelled rows and columns, as a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_train.io import atomic

CELL_PX = 256
MARGIN_PX = 8
LINE_PX = 18
MAX_LABEL_PX = 220
MAX_LINES = 5
MAX_LABEL_CHARS = 500

GridRow = tuple[str, Sequence[Path | None]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Layout:
    """Position of the first cell in pixels; all cells are squares of the same size."""

    left: int
    top: int

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Return the upper left corner (x, y) of a cell."""
        pitch = CELL_PX + MARGIN_PX
        return self.left + column * pitch, self.top + row * pitch


def save_grid_image(path: Path, columns: Sequence[str], rows: Sequence[GridRow], corner: str = "") -> Layout:
    """Write a PNG with a cell for every image, white where there is none, and return the layout.

    Raises:
        DiskError: the file cannot be written.
    """
    font = ImageFont.load_default(14)
    column_labels = [wrap_text(label, font, CELL_PX) for label in columns]
    row_labels = [wrap_text(label, font, MAX_LABEL_PX) for label, _ in rows]
    label_width = font.getlength(corner)
    for lines in row_labels:
        label_width = max([label_width, *map(font.getlength, lines)])
    layout = Layout(
        left=2 * MARGIN_PX + round(label_width),
        top=2 * MARGIN_PX + LINE_PX * max(map(len, column_labels), default=0),
    )
    grid = Image.new("RGB", layout.place(len(rows), len(columns)), "white")
    draw = ImageDraw.Draw(grid)
    _write(draw, (MARGIN_PX, MARGIN_PX), [corner], font)
    for column, lines in enumerate(column_labels):
        _write(draw, (layout.place(0, column)[0], MARGIN_PX), lines, font)
    for row, ((_, paths), lines) in enumerate(zip(rows, row_labels, strict=True)):
        top = layout.place(row, 0)[1] + (CELL_PX - LINE_PX * len(lines)) // 2
        _write(draw, (MARGIN_PX, top), lines, font)
        for column, image_path in enumerate(paths):
            if image_path is not None:
                with Image.open(image_path) as image:
                    grid.paste(fit_to_cell(image), layout.place(row, column))
    with atomic.replace_atomically(path) as file:
        grid.save(file, format="PNG")
    return layout


def fit_to_cell(image: Image.Image) -> Image.Image:
    """Scale the longer side of an image to the size of a cell; small images are enlarged without blur."""
    factor = CELL_PX / max(image.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * factor), round(image.height * factor)), method)


def wrap_text(text: str, font: Font, width_px: int) -> list[str]:
    """Wrap `text` into at most `MAX_LINES` lines of `width_px`, at spaces if possible; a longer text ends in `...`."""
    lines: list[str] = []
    rest = " ".join(text.split())[:MAX_LABEL_CHARS]
    while rest and len(lines) < MAX_LINES:
        # The longest start of `rest` that fits; no character is narrower than 3 px, and at least one is taken.
        fits = min(len(rest), width_px // 3)
        while fits > 1 and font.getlength(rest[:fits]) > width_px:
            fits -= 1
        if fits < len(rest) and len(lines) == MAX_LINES - 1:
            lines.append(rest[: max(fits - 3, 1)] + "...")
            break
        space = rest.rfind(" ", 0, fits + 1)
        end = fits if fits == len(rest) or space <= 0 else space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[str], font: Font) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * LINE_PX), line, fill="black", font=font)
