"""Preview images on disk: a PNG for each, with its sampling request as metadata, and a grid of steps by prompts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from zimage_train.dataset.images import without_warnings
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import DataError, Problem
from zimage_train.io import atomic
from zimage_train.report import grid

NAME = re.compile(r"(\d{6,})-(\d{2,})\.png")
REQUEST_KEY = "zimage_train.recipe"
DRAWN_BY_KEY = "zimage_train.drawn_by"
RUN_KEY = "zimage_train.run"


def preview_path(folder: Path, step: int, index: int) -> Path:
    """Return the path of the preview of prompt `index` at `step`."""
    return folder / f"{step:06d}-{index:02d}.png"


def save_preview(path: Path, image: Image.Image, request: SamplingRequest, drawn_by: str, run: str = "") -> None:
    """Write a PNG whose metadata has the request, and in `drawn_by` the model and LoRA that drew it.

    The request is also written under `parameters`, where image browsers look for it. `run` is the digest of the run
    that the image is a preview of.

    Raises:
        DiskError: the file cannot be written.
    """
    info = _recipe_info(request)
    info.add_itxt(DRAWN_BY_KEY, drawn_by)
    if run:
        info.add_text(RUN_KEY, run)
    with atomic.replace_atomically(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def copy_preview(source: Path, request: SamplingRequest, path: Path) -> None:
    """Write the preview at `source` to `path` for others to see: with its request, but with nothing about the run.

    Raises:
        DiskError: the file cannot be written.
        OSError: `source` cannot be read.
    """
    with Image.open(source) as image, atomic.replace_atomically(path) as file:
        image.save(file, format="PNG", pnginfo=_recipe_info(request))


def is_current(path: Path, request: SamplingRequest, run: str) -> bool:
    """Return whether the image at `path` is complete and was drawn for `request` by the run with this digest."""
    texts = read_texts(path)
    return parse_request(texts) == request and texts.get(RUN_KEY) == run


def remove_later(folder: Path, start: int, run: str) -> None:
    """Remove previews of steps after `start`, at which the run continues, and at step 0 those of another run."""
    for path in folder.glob("*.png"):
        match = NAME.fullmatch(path.name)
        if match is None:
            continue
        is_of_other_run = start == 0 and read_texts(path).get(RUN_KEY) != run
        if int(match[1]) > start or is_of_other_run:
            atomic.remove(path)


def request_of(path: Path) -> SamplingRequest:
    """Return the request that the image at `path` was drawn for.

    Raises:
        DataError: the file does not exist, is damaged, or was not written by this trainer.
    """
    request = parse_request(read_texts(path))
    if request is None:
        what = what_is_wrong_with(path) or "has no sampling settings of zimage-train"
        raise DataError(Problem(str(path), what, "give a PNG that train or sample has written", "not-a-preview"))
    return request


def drawn_by(path: Path) -> str:
    """Return the model and LoRAs that drew the image at `path`, as text; empty if the image does not name them."""
    return read_texts(path).get(DRAWN_BY_KEY, "")


@dataclass(frozen=True)
class PreviewTable:
    """The previews of a run, with a row for each step and a column for each request."""

    labels: list[str]
    """Headings of the columns."""
    requests: list[SamplingRequest]
    rows: dict[int, list[Path | None]]
    """Step -> path of each column's image, or None where the step has no such image."""


def preview_table(folder: Path, suffix: str = "") -> PreviewTable:
    """Return the previews in `folder`, arranged by their metadata; `suffix` is added to the labels.

    If the prompts of a run have changed, there is a column for each version of a prompt.
    """
    paths_by_step: dict[int, dict[tuple[int, SamplingRequest], Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match, request = NAME.fullmatch(path.name), parse_request(read_texts(path))
        if match and request is not None:
            paths_by_step.setdefault(int(match[1]), {})[int(match[2]), request] = path
    steps = sorted(paths_by_step)
    columns: list[tuple[int, SamplingRequest]] = []
    for step in steps:
        for column in paths_by_step[step]:
            if column not in columns:
                columns.append(column)
    columns.sort(key=lambda column: column[0])  # a stable sort: versions of a prompt stand side by side, oldest first
    return PreviewTable(
        labels=[request.prompt + suffix for _, request in columns],
        requests=[request for _, request in columns],
        rows={step: [paths_by_step[step].get(column) for column in columns] for step in steps},
    )


def side_by_side(tables: Sequence[PreviewTable]) -> PreviewTable:
    """Merge tables into a single table, in which each column of the first is followed by those of the others."""
    columns: list[tuple[PreviewTable, int]] = []
    for index in range(max(len(table.requests) for table in tables)):
        columns.extend((table, index) for table in tables if index < len(table.requests))
    rows: dict[int, list[Path | None]] = {}
    for step in sorted(set(chain.from_iterable(table.rows for table in tables))):
        rows[step] = [table.rows[step][index] if step in table.rows else None for table, index in columns]
    return PreviewTable(
        labels=[table.labels[index] for table, index in columns],
        requests=[table.requests[index] for table, index in columns],
        rows=rows,
    )


def save_grid(path: Path, table: PreviewTable) -> None:
    """Write the table as a single image with labelled steps and prompts; do nothing if it is empty.

    Raises:
        DiskError: the file cannot be written.
    """
    if not table.rows:
        return
    grid.save_grid_image(path, table.labels, [(f"step {step}", paths) for step, paths in table.rows.items()])


def _recipe_info(request: SamplingRequest) -> PngInfo:
    info = PngInfo()
    info.add_itxt("parameters", request.describe())
    info.add_itxt(REQUEST_KEY, request.to_json())
    return info


def parse_request(texts: dict[str, str]) -> SamplingRequest | None:
    """Return the request in the text chunks of an image, or None if this trainer has not written them."""
    try:
        return SamplingRequest.from_json(texts[REQUEST_KEY])
    except (KeyError, ValueError):
        return None


def what_is_wrong_with(path: Path) -> str | None:
    """Return why no text chunks can be read from `path`, as a part of a sentence, or None if it is a whole PNG."""
    if not path.exists():
        return "does not exist"
    try:
        with without_warnings(), Image.open(path) as image:
            if image.format != "PNG":
                return f"is a {image.format}, whose metadata is not read"
            image.load()
    except UnidentifiedImageError:
        return "is no image, or damaged"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read ({str(error)[:80]})"
    return None


def read_texts(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG, or nothing if the file cannot be read to its end."""
    try:
        with without_warnings(), Image.open(path) as image:
            image.load()  # decodes all of it, so that a truncated image counts as missing
            return {key: str(text) for key, text in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {}
