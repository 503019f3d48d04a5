"""Preview pictures on disk: one PNG each, with its recipe inside, and one grid of all steps by all prompts."""

import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from zimage_train import files
from zimage_train.sampling.recipe import Recipe

NAME = re.compile(r"(\d{6,})-(\d{2,})\.png")
CELL_PX = 256
MARGIN_PX = 8
LABEL_PX = 22


def path_of(folder: Path, step: int, index: int) -> Path:
    return folder / f"{step:06d}-{index:02d}.png"


def save(path: Path, image: Image.Image, recipe: Recipe) -> None:
    """Write a PNG that carries its recipe under `parameters`, where image browsers look for it."""
    info = PngInfo()
    info.add_itxt("parameters", recipe.describe())
    with files.replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def by_step(folder: Path) -> dict[int, list[Path]]:
    """Step -> its previews in the order of the prompts, steps rising."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.glob("*.png"):
        if match := NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append((int(match[2]), path))
    return {step: [path for _, path in sorted(found[step])] for step in sorted(found)}


def save_grid(folder: Path, prompts: list[str]) -> None:
    """Write `grid.png`: a row a step, a column a prompt, both labelled."""
    rows = by_step(folder)
    columns = max((len(paths) for paths in rows.values()), default=0)
    if not columns:
        return
    font = ImageFont.load_default(14)
    width = 90 + columns * (CELL_PX + MARGIN_PX)
    height = LABEL_PX + MARGIN_PX + len(rows) * (CELL_PX + MARGIN_PX)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for column in range(columns):
        text = _shortened(prompts[column] if column < len(prompts) else "", font)
        draw.text((90 + column * (CELL_PX + MARGIN_PX), 4), text, fill="black", font=font)
    for row, (step, paths) in enumerate(rows.items()):
        top = LABEL_PX + MARGIN_PX + row * (CELL_PX + MARGIN_PX)
        draw.text((6, top + CELL_PX // 2), f"step {step}", fill="black", font=font)
        for column, path in enumerate(paths):
            with Image.open(path) as image:
                grid.paste(_scaled(image), (90 + column * (CELL_PX + MARGIN_PX), top))
    with files.replacing(folder / "grid.png") as file:
        grid.save(file, format="PNG")


def _scaled(image: Image.Image) -> Image.Image:
    """The picture with its longer side at the size of a cell; small ones are enlarged without blur."""
    factor = CELL_PX / max(image.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * factor), round(image.height * factor)), method)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= CELL_PX:
        return text
    while text and font.getlength(text + "...") > CELL_PX:
        text = text[:-1]
    return text + "..."
