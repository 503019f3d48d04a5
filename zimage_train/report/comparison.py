"""Comparison of images along a few axes: a labelled grid, and a page with a slider (torch-free)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ConfigError, Problem
from zimage_train.io import atomic
from zimage_train.report import grid, template

PAGE, GRID, IMAGES = "compare.html", "grid.png", "pictures"
STEP, PROMPT, SAMPLING, MODEL = "step", "prompt", "sampling", "model"
EMPTY = "(empty prompt)"
NUMERIC_AXES = ("strength", STEP, "seed")
"""Axes whose values are bare numbers, which need the name of the axis as a label."""
MAX_REMARKS = 8
SMALL_PX = 256
"""Images up to this width are enlarged without blur."""


@dataclass(frozen=True)
class ComparisonImage:
    """An image and its value on every axis of the comparison."""

    path: Path
    request: SamplingRequest
    values: Mapping[str, str]
    shown_at: Mapping[str, str] = field(default_factory=dict)
    """Axis -> value at which it is placed instead, as for the bare model, which stands in rows of any LoRA strength."""

    def position(self, axis: str) -> str:
        """Return the value on `axis` at which the image is placed."""
        return self.shown_at.get(axis, self.values[axis])


@dataclass(frozen=True)
class Subject:
    """A compared model, LoRA or run, with facts for the table below the images."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Images along axes: an axis makes the columns, other axes the rows, and each step is a page of its own."""

    title: str
    images: Sequence[ComparisonImage]
    columns: str
    rows: Sequence[str]
    subjects: Sequence[Subject]
    remarks: Sequence[str]


@dataclass(frozen=True)
class ComparisonPage:
    """A table of images."""

    step: str | None
    """None if steps are not pages of their own."""
    columns: list[str]
    rows: list[tuple[str, list[ComparisonImage | None]]]
    """The label and the cells of each row; None where there is no image."""

    def missing(self) -> list[tuple[str, str]]:
        """Return the labels (row, column) of every empty cell."""
        empty = []
        for label, cells in self.rows:
            for column, image in zip(self.columns, cells, strict=True):
                if image is None:
                    empty.append((label, column))
        return empty


def save_comparison(folder: Path, comparison: Comparison) -> list[str]:
    """Write grid and page into `folder`, with copies of the images that are elsewhere; return remarks.

    Raises:
        DiskError: a file cannot be written.
    """
    pages, images = comparison_pages(comparison), comparison.images
    remarks = [*comparison.remarks, *_missing_remarks(pages), *_noise_remarks(pages)]
    last = pages[-1]
    rows = [(label, [image.path if image else None for image in cells]) for label, cells in last.rows]
    corner = "" if last.step is None else axis_label(STEP, last.step)
    grid.save_grid_image(folder / GRID, last.columns, rows, corner=corner)
    page = template.render_html(
        "comparison.html",
        title=comparison.title,
        remarks=remarks,
        subjects=comparison.subjects,
        facts=list(dict.fromkeys(name for subject in comparison.subjects for name in subject.facts)),
        pages=pages,
        links=_link_images(folder, [image.path for image in images]),
        caption=caption,
        details=list({image.path: details(image) for image in images}.values()),
        small_px=SMALL_PX,
    )
    atomic.write_text(folder / PAGE, page)
    return remarks


def comparison_pages(comparison: Comparison) -> list[ComparisonPage]:
    """Arrange the images in tables of equal rows and columns, a table per step unless steps are rows or columns."""
    images, columns = comparison.images, comparison.columns
    values = {axis: _axis_values(images, axis) for axis in (columns, *comparison.rows)}
    # Axes with a single value do not show in the labels of rows.
    row_axes = [axis for axis in comparison.rows if len(values[axis]) > 1] or list(comparison.rows[:1])
    is_single_page = STEP in values or STEP not in images[0].values

    def row_of(image: ComparisonImage) -> tuple[int, ...]:
        return tuple(values[axis].index(image.position(axis)) for axis in row_axes)

    cells: dict[tuple[str | None, tuple[int, ...], str], ComparisonImage] = {}
    row_labels: dict[tuple[int, ...], str] = {}
    for image in images:
        row = row_of(image)
        step = None if is_single_page else image.position(STEP)
        cells[step, row, image.position(columns)] = image
        row_labels[row] = ", ".join(axis_label(axis, image.position(axis)) for axis in row_axes)

    column_labels = [axis_label(columns, value) for value in values[columns]]
    pages = []
    for step in [None] if is_single_page else _axis_values(images, STEP):
        rows = []
        for row in sorted(row_labels):
            rows.append((row_labels[row], [cells.get((step, row, value)) for value in values[columns]]))
        pages.append(ComparisonPage(step, column_labels, rows))
    return pages


def _axis_values(images: Sequence[ComparisonImage], axis: str) -> list[str]:
    """Return the values on an axis: steps by number, others in the order of the images."""
    values = list(dict.fromkeys(image.position(axis) for image in images))
    return sorted(values, key=int) if axis == STEP else values


def axis_label(axis: str, value: str) -> str:
    """Return a value as a label, with the name of its axis where the value alone would be unclear."""
    if axis in NUMERIC_AXES:
        return f"{axis} {value}"
    if "." in axis:  # a config key
        return f"{axis}={value}"
    return value


def sampling_label(request: SamplingRequest) -> str:
    """Return steps and guidance in both conventions, as text."""
    return f"{request.steps} steps, g {request.guidance:g} (CFG {request.guidance + 1:g})"


def details(image: ComparisonImage) -> dict[str, str]:
    """Return the image's values and sampling settings by name, for the table of all images."""
    request = image.request
    values = {axis: value for axis, value in image.values.items() if axis not in (PROMPT, SAMPLING)}
    return values | {
        "sampling steps": str(request.steps),
        "g": f"{request.guidance:g}",
        "CFG": f"{request.guidance + 1:g}",
        "seed of the noise": str(request.seed),
        "size": f"{request.width} x {request.height}",
        PROMPT: request.prompt,
    }


def caption(image: ComparisonImage) -> str:
    """Return the image's values and sampling settings as a line."""
    labels = []
    for axis, value in image.values.items():
        if axis not in (PROMPT, SAMPLING) and "." not in axis:
            labels.append(axis_label(axis, value))
    request = image.request
    return f"{', '.join(labels)}; {sampling_label(request)}, seed {request.seed}; {request.prompt}"


def find_axis(name: str, axes: Iterable[str]) -> str:
    """Return the axis that `--by` gives, by its name or the last part of it.

    Raises:
        ConfigError: there is no such axis.
    """
    candidates = list(axes)
    for axis in candidates:
        if name.lower() in (axis.lower(), axis.lower().rpartition(".")[2]):
            return axis
    raise ConfigError(
        Problem(f"--by {name}", "these images do not differ in it", f"give {' or '.join(candidates)}", "bad-argument")
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of `paths`, of equal depth, that are all different."""
    parts = [path.parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1)):
        ends = ["/".join(path_parts[-depth:]) for path_parts in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def slug(text: str) -> str:
    """Return `text` reduced to characters that are safe in a file name."""
    return re.sub(r"[^\w.+-]+", "-", text)[:80].strip("-.") or "picture"


def _link_images(folder: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Return the link to each image relative to `folder`, into which images from elsewhere are copied."""
    root = folder.resolve()
    links: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        target = path.resolve()
        if not target.is_relative_to(root):
            target = root / IMAGES / f"{len(links):03d}-{slug(path.parent.parent.name)}-{path.name}"
            atomic.write(target, [path.read_bytes()])
        links[path] = quote(target.relative_to(root).as_posix())
    return links


def _missing_remarks(pages: list[ComparisonPage]) -> list[str]:
    """Return a remark on each cell that is empty on some pages."""
    steps_by_cell: dict[tuple[str, str], list[str]] = {}
    for page in pages:
        for cell in page.missing():
            steps_by_cell.setdefault(cell, []).append(page.step or "")
    remarks = []
    for (row, column), steps in steps_by_cell.items():
        suffix = f" at step {', '.join(steps)}" if all(steps) else ""
        remarks.append(f"{column} has no image of {row!r}{suffix}")
    return _limit(remarks)


def _noise_remarks(pages: list[ComparisonPage]) -> list[str]:
    """Return a remark on each row whose images do not start from the same noise."""
    remarks = []
    for label, cells in pages[-1].rows:
        noises = {(image.request.seed, image.request.width, image.request.height) for image in cells if image}
        if len(noises) > 1:
            remarks.append(f"{label!r} is drawn from other noise in some columns (seed or size differ)")
    return _limit(remarks)


def _limit(remarks: list[str]) -> list[str]:
    if len(remarks) <= MAX_REMARKS:
        return remarks
    return [*remarks[:MAX_REMARKS], f"... and {len(remarks) - MAX_REMARKS} more"]
