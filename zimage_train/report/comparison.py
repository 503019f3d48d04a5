"""Pictures that differ in a few known things, side by side: a labelled grid and a page (torch-free)."""

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
NAMED = ("strength", STEP, "seed")
"""Axes whose values are numbers, which say nothing by themselves."""
MAX_REMARKS = 8
SMALL_PX = 256
"""Pictures up to this size are enlarged without blur."""


@dataclass(frozen=True)
class ComparisonImage:
    """An image, and where it stands on every axis of the comparison."""

    path: Path
    recipe: SamplingRequest
    values: Mapping[str, str]
    counts_as: Mapping[str, str] = field(default_factory=dict)
    """Axes on which it is shown at another value: the bare model stands beside LoRAs of any strength."""

    def at(self, axis: str) -> str:
        return self.counts_as.get(axis, self.values[axis])


@dataclass(frozen=True)
class Subject:
    """One of the things that are compared, and what there is to say of it."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Pictures along axes: one makes the columns, others the rows, and each step is a sheet of its own."""

    title: str
    shots: Sequence[ComparisonImage]
    columns: str
    rows: Sequence[str]
    subjects: Sequence[Subject]
    remarks: Sequence[str]


@dataclass(frozen=True)
class ComparisonPage:
    """A table of images; None: there is no such image."""

    step: str | None
    columns: list[str]
    rows: list[tuple[str, list[ComparisonImage | None]]]

    def missing(self) -> list[tuple[str, str]]:
        """The row and the column of every image that is not there."""
        return [
            (label, name) for label, line in self.rows for name, one in zip(self.columns, line, strict=True) if not one
        ]


def save_comparison(folder: Path, comparison: Comparison) -> list[str]:
    """Write grid and page into `folder`, and into its `images` a copy of each image that lies elsewhere.

    Returns what there is to remark.

    Raises:
        DiskError: something cannot be written.
    """
    found, shots = comparison_pages(comparison), comparison.shots
    remarks = [*comparison.remarks, *_missing(found), *_other_noise(found)]
    last = found[-1]
    rows = [(label, [one and one.path for one in line]) for label, line in last.rows]
    grid.save_grid_image(
        folder / GRID, last.columns, rows, corner="" if last.step is None else axis_label(STEP, last.step)
    )
    page = template.render_html(
        "comparison.html",
        title=comparison.title,
        remarks=remarks,
        subjects=comparison.subjects,
        facts=list(dict.fromkeys(name for subject in comparison.subjects for name in subject.facts)),
        sheets=found,
        places=_gathered(folder, [shot.path for shot in shots]),
        words=words,
        numbers=list({shot.path: numbers(shot) for shot in shots}.values()),
        small_px=SMALL_PX,
    )
    atomic.write_text(folder / PAGE, page)
    return remarks


def comparison_pages(comparison: Comparison) -> list[ComparisonPage]:
    """The images in tables of equal rows and columns, one a step; a single one where steps are rows or columns."""
    shots, columns = comparison.shots, comparison.columns
    order = {axis: _values(shots, axis) for axis in (columns, *comparison.rows)}
    axes = [axis for axis in comparison.rows if len(order[axis]) > 1] or list(comparison.rows[:1])
    is_flat = STEP in order or STEP not in shots[0].values

    def row_of(shot: ComparisonImage) -> tuple[int, ...]:
        return tuple(order[axis].index(shot.at(axis)) for axis in axes)

    def step_of(shot: ComparisonImage) -> str | None:
        return None if is_flat else shot.at(STEP)

    found = {(step_of(shot), row_of(shot), shot.at(columns)): shot for shot in shots}
    labels = {row_of(shot): ", ".join(axis_label(axis, shot.at(axis)) for axis in axes) for shot in shots}
    return [
        ComparisonPage(
            step,
            [axis_label(columns, value) for value in order[columns]],
            [(labels[row], [found.get((step, row, value)) for value in order[columns]]) for row in sorted(labels)],
        )
        for step in ([None] if is_flat else _values(shots, STEP))
    ]


def _values(shots: Sequence[ComparisonImage], axis: str) -> list[str]:
    """What is on an axis, in order."""
    found = list(dict.fromkeys(shot.at(axis) for shot in shots))
    return sorted(found, key=int) if axis == STEP else found


def axis_label(axis: str, value: str) -> str:
    """A value in words."""
    return f"{axis} {value}" if axis in NAMED else f"{axis}={value}" if "." in axis else value


def sampled(recipe: SamplingRequest) -> str:
    """Steps, and guidance in both conventions."""
    return f"{recipe.steps} steps, g {recipe.guidance:g} (CFG {recipe.guidance + 1:g})"


def numbers(shot: ComparisonImage) -> dict[str, str]:
    """What made an image, by name."""
    recipe = shot.recipe
    return {axis: value for axis, value in shot.values.items() if axis not in (PROMPT, SAMPLING)} | {
        "sampling steps": str(recipe.steps),
        "g": f"{recipe.guidance:g}",
        "CFG": f"{recipe.guidance + 1:g}",
        "seed of the noise": str(recipe.seed),
        "size": f"{recipe.width} x {recipe.height}",
        PROMPT: recipe.prompt,
    }


def words(shot: ComparisonImage) -> str:
    """What made an image, in a line."""
    told = [
        axis_label(axis, text)
        for axis, text in shot.values.items()
        if axis not in (PROMPT, SAMPLING) and "." not in axis
    ]
    return f"{', '.join(told)}; {sampled(shot.recipe)}, seed {shot.recipe.seed}; {shot.recipe.prompt}"


def axis_named(asked: str, axes: Iterable[str]) -> str:
    """The axis that `--by` means: by its name, or the last part of it.

    Raises:
        ConfigError: there is no such axis.
    """
    known = list(axes)
    found = [axis for axis in known if asked.lower() in (axis.lower(), axis.lower().rpartition(".")[2])]
    if not found:
        raise ConfigError(Problem(f"--by {asked}", "these images do not differ in it", f"give {' or '.join(known)}"))
    return found[0]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of `paths`, as short as they can be without two of them being alike."""
    parts = [path.parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1)):
        ends = ["/".join(one[-depth:]) for one in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def slug(text: str) -> str:
    """What a file name can hold of `text`."""
    return re.sub(r"[^\w.+-]+", "-", text)[:80].strip("-.") or "picture"


def _gathered(folder: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Each image as the page refers to it: relative to `folder`, into which it is copied if it lies elsewhere."""
    home = folder.resolve()
    places: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        real = path.resolve()
        if not real.is_relative_to(home):
            real = home / IMAGES / f"{len(places):03d}-{slug(path.parent.parent.name)}-{path.name}"
            atomic.write(real, [path.read_bytes()])
        places[path] = quote(real.relative_to(home).as_posix())
    return places


def _missing(found: list[ComparisonPage]) -> list[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for sheet in found:
        for place in sheet.missing():
            where.setdefault(place, []).append(sheet.step or "")
    lines = [
        f"{column} has no image of {row!r}" + (f" at step {', '.join(steps)}" if all(steps) else "")
        for (row, column), steps in where.items()
    ]
    return _few(lines)


def _other_noise(found: list[ComparisonPage]) -> list[str]:
    """Rows whose images do not come from the same noise."""
    lines = []
    for label, line in found[-1].rows:
        noises = {(one.recipe.seed, one.recipe.width, one.recipe.height) for one in line if one}
        if len(noises) > 1:
            lines.append(f"{label!r} is drawn from other noise in some columns (seed or size differ)")
    return _few(lines)


def _few(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MAX_REMARKS else [*lines[:MAX_REMARKS], f"... and {len(lines) - MAX_REMARKS} more"]
