"""The `compare` command for runs: compare their previews by prompt, at equal steps (torch-free)."""

import json
import operator
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_train.config import strict_yaml
from zimage_train.config.load import flatten_keys
from zimage_train.config.strict_yaml import YamlError
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ConfigError, DataError, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.io import atomic
from zimage_train.report import comparison, preview_images
from zimage_train.report.comparison import MODEL, PROMPT, STEP, Comparison, ComparisonImage, Subject
from zimage_train.report.metrics import read_records
from zimage_train.training.run_dir import RunDir

RUN = "run"
NOT_COMPARED = ("name", "output_dir", "cache.", "log.")
"""Settings that only name places and have no effect on what a run trains."""


@dataclass(frozen=True)
class RunPreview:
    """A preview image of a run."""

    model: str
    """The model that drew it: path, hub id or variant."""
    request: SamplingRequest
    path: Path


@dataclass(frozen=True)
class FinishedRun:
    """A run that has a folder on disk."""

    label: str
    folder: RunDir
    settings: Mapping[str, Any]
    """Its config, flat: key -> value."""

    def previews(self) -> dict[int, list[RunPreview]]:
        """Return the previews of each step, by prompt; those on the second model follow."""
        model = self.settings.get("model.path") or self.settings.get("model.variant")
        second_model = self.settings.get("sample.compare_on")
        previews: dict[int, list[RunPreview]] = {}
        for name, folder in ((model, self.folder.samples), (second_model, self.folder.samples / "also")):
            table = preview_images.preview_table(folder)
            for step, paths in table.rows.items():
                for request, path in zip(table.requests, paths, strict=True):
                    if path is not None:
                        previews.setdefault(step, []).append(RunPreview(str(name), request, path))
        return previews


def compare_runs(paths: Sequence[Path], by: str | None, output: Path) -> list[str]:
    """Write a comparison of the previews of runs into the folder `output`, and return the lines to print.

    Raises:
        ZImageTrainError: a path is not a run, a run has no previews, or no two runs have previews at the same step.
    """
    atomic.require_writable_folder(output, "--output")
    return save_comparison(output, make_comparison(open_runs(paths), by))


def save_comparison(output: Path, images: Comparison) -> list[str]:
    """Write grid and page into the folder `output`, and return the lines to print: remarks, and both paths."""
    lines = [f"note: {remark}" for remark in comparison.save_comparison(output, images)]
    return [*lines, f"grid: {output / comparison.GRID}", f"page: {output / comparison.PAGE}"]


def run_folders(path: Path) -> list[Path]:
    """Return `path` if it is a run folder, or the run folders in it, as a sweep makes them.

    Raises:
        ConfigError: there is none.
    """
    if (path / "config.yaml").is_file():
        return [path]
    folders = sorted(config.parent for config in path.glob("*/config.yaml"))
    if not folders:
        hint = "give output/NAME of a run, a sweep's folder, or LoRA files"
        if not path.exists():
            raise ConfigError(Problem(str(path), "does not exist", hint, "missing-file"))
        raise ConfigError(Problem(str(path), "is not a run folder: it has no config.yaml", hint, "not-a-run"))
    return folders


def open_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Return the runs at `paths`, labelled with the shortest names that are all different.

    Raises:
        ZImageTrainError: lists the paths that are not runs, and runs that are given twice.
    """
    errors: list[ZImageTrainError] = []
    settings_by_folder: dict[Path, Mapping[str, Any]] = {}
    for path in paths:
        with collect_errors(errors):
            folders = run_folders(path)
            require_distinct([*settings_by_folder, *folders])
            for folder in folders:
                settings_by_folder[folder] = settings_of(folder)
    raise_all(errors)
    runs = []
    labels = comparison.short_names(list(settings_by_folder))
    for label, (folder, settings) in zip(labels, settings_by_folder.items(), strict=True):
        runs.append(FinishedRun(label, RunDir(folder, settings["name"]), settings))
    return runs


def require_run(folder: Path, otherwise: str = "give output/NAME of a run, or LoRA files") -> None:
    """Require that `folder` is that of a run; `otherwise` is what to do if none is near it.

    Raises:
        ConfigError: it has no config.yaml; the hint names a folder near it that has.
    """
    if not (folder / "config.yaml").exists():
        candidates = (*folder.parents[:2], *sorted(folder.glob("*")))  # a LoRA is two below its run
        near = [candidate for candidate in candidates if (candidate / "config.yaml").exists()]
        hint = f"did you mean {near[0]}?" if near else otherwise
        raise ConfigError(Problem(str(folder), "is not a run folder: it has no config.yaml", hint, "not-a-run"))


def settings_of(folder: Path) -> Mapping[str, Any]:
    """Return the config in a run folder, flat; it is not validated, since another version may have written it.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        value = strict_yaml.parse(path.read_text(encoding="utf-8")).value
    except (OSError, UnicodeDecodeError, YamlError) as error:
        problem = Problem(str(path), f"cannot be read ({error})", "give another run", "unreadable-file")
        raise ConfigError(problem) from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(Problem(str(path), "is not the config of a run", "give output/NAME of a run", "not-a-run"))
    return flatten_keys(value)


def require_distinct(paths: Sequence[Path]) -> None:
    """Require that all paths lead to different files or folders.

    Raises:
        ConfigError: lists those that are given twice.
    """
    counts = Counter(path.resolve() for path in paths)
    repeated = [path for path in dict.fromkeys(paths) if counts[path.resolve()] > 1]
    if repeated:
        raise ConfigError(*(Problem(str(path), "is given twice", "give it once", "set-twice") for path in repeated))


def make_comparison(runs: Sequence[FinishedRun], by: str | None = None) -> Comparison:
    """Arrange the previews of `runs` at the steps that the runs share.

    Args:
        by: what differs between columns; by default the run, or the step if there is only a single run.

    Raises:
        DataError: there is nothing to compare.
        ConfigError: the images do not differ in what `by` names.
    """
    previews = [run.previews() for run in runs]
    _require_previews(runs, previews)
    steps, remarks = _shared_steps(runs, [set(by_step) for by_step in previews])
    settings = differing_settings([run.settings for run in runs])
    images: list[ComparisonImage] = []
    subjects: list[Subject] = []
    for index, run in enumerate(runs):
        run_settings = {key: values[index] for key, values in settings.items()}
        for step in steps:
            images += _images_of(run, step, previews[index].get(step, []), run_settings)
        subjects.append(Subject(run.label, run_facts(run) | run_settings))
    if len({image.values[MODEL] for image in images}) == 1:
        images = [_without_axis(image, MODEL) for image in images]
    columns = RUN if len(runs) > 1 else STEP
    if by is not None:
        columns = comparison.find_axis(by, images[0].values)
    return Comparison(
        title=" against ".join(run.label for run in runs),
        images=images,
        columns=columns,
        rows=_row_axes(columns, images, list(settings)),
        subjects=subjects,
        remarks=remarks,
    )


def _require_previews(runs: Sequence[FinishedRun], previews: Sequence[Mapping[int, list[RunPreview]]]) -> None:
    hint = "set sample.prompts and sample.every; the same train command then draws the last step"
    problems = []
    for run, by_step in zip(runs, previews, strict=True):
        if not by_step:
            problems.append(Problem(str(run.folder.root), "has no previews", hint, "no-previews"))
    if problems:
        raise DataError(*problems)


def _images_of(
    run: FinishedRun, step: int, previews: Sequence[RunPreview], settings: Mapping[str, str]
) -> list[ComparisonImage]:
    """Return the previews of a step, with a number after the prompts that occur repeatedly (by several seeds)."""
    counts: Counter[tuple[str, str]] = Counter()
    images = []
    for preview in previews:
        text = preview.request.prompt
        counts[preview.model, text] += 1
        number = counts[preview.model, text]
        prompt = text or comparison.EMPTY
        if number > 1:
            prompt = f"{prompt} ({number})"
        values = {RUN: run.label, **settings, MODEL: preview.model, STEP: str(step), PROMPT: prompt}
        images.append(ComparisonImage(preview.path, preview.request, values))
    return images


def _without_axis(image: ComparisonImage, axis: str) -> ComparisonImage:
    return replace(image, values={key: value for key, value in image.values.items() if key != axis})


def _row_axes(columns: str, images: Sequence[ComparisonImage], settings: Sequence[str]) -> list[str]:
    """Return the axes that distinguish the images of a column.

    If the columns are a setting, runs are distinguished by their other settings, so that runs which differ only in that
    setting share a row.
    """
    if columns in settings:
        run_axes = [axis for axis in settings if axis != columns]
    elif columns == RUN:
        run_axes = []
    else:
        run_axes = [RUN]
    rows = [axis for axis in (PROMPT, *run_axes, MODEL) if axis in images[0].values and axis != columns]
    axes = (STEP, columns, *rows)
    cells = {operator.itemgetter(*axes)(image.values) for image in images}
    if len(cells) < len(images):  # some runs have the same settings
        rows.append(RUN)
    return rows


def _shared_steps(runs: Sequence[FinishedRun], steps_of_runs: Sequence[set[int]]) -> tuple[list[int], list[str]]:
    """Return the steps at which all runs have previews, or else at least two, and remarks on steps left out.

    Raises:
        DataError: there is no such step after step 0, at which nothing is trained yet.
    """
    counts: Counter[int] = Counter()
    for steps in steps_of_runs:
        counts.update(steps)
    shared = {step for step, count in counts.items() if count == len(runs)}
    if len(runs) > 1 and max(shared, default=0) == 0:
        shared = {step for step, count in counts.items() if count >= 2}
    if len(runs) > 1 and max(shared, default=0) == 0:
        pairs = zip(runs, steps_of_runs, strict=True)
        known = "; ".join(f"{run.label}: {_join_steps(steps)}" for run, steps in pairs)
        what = f"no two runs have some at the same step after step 0 ({known})"
        hint = "choose a sample.every that divides the steps of all runs"
        raise DataError(Problem("previews", what, hint, "no-common-step"))
    remarks = []
    for run, steps in zip(runs, steps_of_runs, strict=True):
        if left_out := steps - shared:
            text = f"previews at step {_join_steps(left_out)} are left out, since other runs have none there"
            remarks.append(f"{run.label}: {text}")
    return sorted(shared), remarks


def _join_steps(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return each setting in which flat configs differ, with its value in each config as text."""
    keys: dict[str, None] = {}  # a set that keeps the order
    for config in configs:
        keys |= dict.fromkeys(key for key in config if not key.startswith(NOT_COMPARED))
    settings = {}
    for key in keys:
        values = []
        for config in configs:
            values.append(_as_text(config[key]) if key in config else "(absent)")
        if len(set(values)) > 1:
            settings[key] = values
    return settings


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def run_facts(run: FinishedRun) -> dict[str, str]:
    """Return steps, mean loss over the last tenth, median seconds a step and the path of the LoRA of a run, as text."""
    records = [record for record in read_records(run.folder.metrics) if record["step"] > 0]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    last_losses = losses[-max(len(losses) // 10, 1) :]
    seconds = [record["seconds"] for record in records if isinstance(record.get("seconds"), int | float)]
    lora = run.folder.lora()
    return {
        "steps": str(records[-1]["step"]) if records else "0",
        "loss (last tenth)": f"{statistics.fmean(last_losses):.4f}" if last_losses else "",
        "seconds a step": f"{statistics.median(seconds):.3g}" if seconds else "",
        "LoRA": str(lora) if lora.exists() else "not finished",
    }
