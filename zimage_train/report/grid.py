"""Pictures in rows and columns as one image, every row and column labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_train.io import atomic

CELL_PX = 256
MARGIN_PX = 8
LINE_PX = 18
WIDEST_LABEL_PX = 220
MAX_LINES = 5
LONGEST_LABEL = 500

GridRow = tuple[str, Sequence[Path | None]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Layout:
    """Where the first cell begins; all cells are squares of one size."""

    left: int
    top: int

    def place(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of a cell."""
        pitch = CELL_PX + MARGIN_PX
        return self.left + column * pitch, self.top + row * pitch


def save_grid_image(path: Path, columns: Sequence[str], rows: Sequence[GridRow], corner: str = "") -> Layout:
    """Write a PNG with a cell for every image; where there is none it stays white.

    Raises:
        DiskError: it cannot be written.
    """
    font = ImageFont.load_default(14)
    above = [wrapped(label, font, CELL_PX) for label in columns]
    beside = [wrapped(label, font, WIDEST_LABEL_PX) for label, _ in rows]
    widest = max(font.getlength(line) for lines in [*beside, [corner]] for line in lines)
    layout = Layout(
        left=2 * MARGIN_PX + round(widest),
        top=2 * MARGIN_PX + LINE_PX * max(map(len, above), default=0),
    )
    grid = Image.new("RGB", layout.place(len(rows), len(columns)), "white")
    draw = ImageDraw.Draw(grid)
    _write(draw, (MARGIN_PX, MARGIN_PX), [corner], font)
    for column, lines in enumerate(above):
        _write(draw, (layout.place(0, column)[0], MARGIN_PX), lines, font)
    for row, ((_, paths), lines) in enumerate(zip(rows, beside, strict=True)):
        top = layout.place(row, 0)[1] + (CELL_PX - LINE_PX * len(lines)) // 2
        _write(draw, (MARGIN_PX, top), lines, font)
        for column, one in enumerate(paths):
            if one is not None:
                with Image.open(one) as image:
                    grid.paste(scaled(image), layout.place(row, column))
    with atomic.replace_atomically(path) as file:
        grid.save(file, format="PNG")
    return layout


def scaled(image: Image.Image) -> Image.Image:
    """The image with its longer side at the size of a cell; small ones are enlarged without blur."""
    factor = CELL_PX / max(image.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * factor), round(image.height * factor)), method)


def wrapped(text: str, font: Font, width_px: int) -> list[str]:
    """`text` in lines of at most `width_px`, broken at spaces where it can be; what is too long ends in `...`."""
    lines: list[str] = []
    rest = " ".join(text.split())[:LONGEST_LABEL]
    while rest and len(lines) < MAX_LINES:
        fits = next(
            end
            for end in range(min(len(rest), width_px // 3), -1, -1)
            if end <= 1 or font.getlength(rest[:end]) <= width_px
        )
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
