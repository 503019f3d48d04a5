"""Preview images on disk: one PNG each, with its recipe inside, and one grid of all steps by all prompts."""

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import DataError, Problem
from zimage_train.io import atomic
from zimage_train.report import grid

NAME = re.compile(r"(\d{6,})-(\d{2,})\.png")
RECIPE = "zimage_train.recipe"
DRAWN_BY = "zimage_train.drawn_by"


def preview_path(folder: Path, step: int, index: int) -> Path:
    return folder / f"{step:06d}-{index:02d}.png"


def save_preview(path: Path, image: Image.Image, recipe: SamplingRequest, drawn_by: str, run: str = "") -> None:
    """Write a PNG with its recipe under `parameters`, where image browsers look, and what drew it: model and LoRA.

    `run` is the digest of the run that it is a preview of.

    Raises:
        DiskError: it cannot be written.
    """
    info = PngInfo()
    info.add_itxt("parameters", recipe.describe())
    info.add_itxt(RECIPE, recipe.to_json())
    info.add_itxt(DRAWN_BY, drawn_by)
    if run:
        info.add_text("zimage_train.run", run)
    with atomic.replace_atomically(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def is_current(path: Path, recipe: SamplingRequest, run: str) -> bool:
    """Whether the image at `path` is whole and was made by `recipe` in the run of this digest."""
    texts = _texts(path)
    return _recipe(texts) == recipe and texts.get("zimage_train.run") == run


def remove_later(folder: Path, start: int, run: str) -> None:
    """Remove the previews that a run which goes on after `start` will draw anew, or that are of another run."""
    for path in folder.glob("*.png"):
        match = NAME.fullmatch(path.name)
        if match and (int(match[1]) > start or (start == 0 and _texts(path).get("zimage_train.run") != run)):
            atomic.remove(path)


def request_of(path: Path) -> SamplingRequest:
    """What the image at `path` was made by.

    Raises:
        DataError: it is not there, damaged, or was not made by this trainer.
    """
    recipe = _recipe(_texts(path))
    if recipe is None:
        what = "holds no recipe of zimage-train" if path.exists() else "does not exist"
        raise DataError(Problem(str(path), what, "give a PNG that train or sample has written"))
    return recipe


def drawn_by(path: Path) -> str:
    """The model and the LoRAs that drew the image at `path`, in words; empty if it does not say."""
    return _texts(path).get(DRAWN_BY, "")


@dataclass(frozen=True)
class PreviewTable:
    """Every preview of a run: a row a step, a column a recipe, None where a step has no such image."""

    labels: list[str]
    """What stands above each column."""
    recipes: list[SamplingRequest]
    rows: dict[int, list[Path | None]]


def preview_table(folder: Path, suffix: str = "") -> PreviewTable:
    """The previews in `folder` by what each file says of itself; a change of prompts adds columns."""
    found: dict[int, dict[tuple[int, SamplingRequest], Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match, recipe = NAME.fullmatch(path.name), _recipe(_texts(path))
        if match and recipe is not None:
            found.setdefault(int(match[1]), {})[int(match[2]), recipe] = path
    columns = list(dict.fromkeys(key for step in sorted(found) for key in found[step]))
    columns.sort(key=lambda key: key[0])  # a changed prompt stands beside the one that it replaced
    return PreviewTable(
        labels=[recipe.prompt + suffix for _, recipe in columns],
        recipes=[recipe for _, recipe in columns],
        rows={step: [found[step].get(column) for column in columns] for step in sorted(found)},
    )


def side_by_side(one: PreviewTable, other: PreviewTable) -> PreviewTable:
    """Both tables as one, each column of `one` followed by that of `other`."""
    sides = (one, other)
    order = sorted((index, side) for side in (0, 1) for index in range(len(sides[side].recipes)))
    rows = {
        step: [sides[side].rows[step][index] if step in sides[side].rows else None for index, side in order]
        for step in sorted({*one.rows, *other.rows})
    }
    return PreviewTable(
        labels=[sides[side].labels[index] for index, side in order],
        recipes=[sides[side].recipes[index] for index, side in order],
        rows=rows,
    )


def save_grid(path: Path, shown: PreviewTable) -> None:
    """Write an image of the table: a row a step, a column a prompt, both labelled.

    Raises:
        DiskError: it cannot be written.
    """
    if not shown.rows:
        return
    grid.save_grid_image(path, shown.labels, [(f"step {step}", paths) for step, paths in shown.rows.items()])


def _recipe(texts: dict[str, str]) -> SamplingRequest | None:
    try:
        return SamplingRequest.from_json(texts[RECIPE])
    except (KeyError, ValueError):
        return None


def _texts(path: Path) -> dict[str, str]:
    """The text of a PNG that can be read to its end; nothing for any other file."""
    try:
        with Image.open(path) as image:
            image.load()
            return dict(getattr(image, "text", {}))
    except (OSError, SyntaxError, ValueError):
        return {}
