"""The `compare` command for runs: the previews that they drew, by prompt and at equal steps (torch-free)."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
OF_A_RUN = ("name", "output_dir", "cache.", "log.")
"""Settings that say where things are, and nothing of how a run trains."""


@dataclass(frozen=True)
class FinishedRun:
    """A run as it lies on disk."""

    label: str
    folder: RunDir
    settings: Mapping[str, Any]
    """Its config, flat."""

    def drawn(self) -> dict[int, list[tuple[str, SamplingRequest, Path]]]:
        """Step -> the model, the recipe and the path of each preview, in the order of the prompts."""
        found: dict[int, list[tuple[str, SamplingRequest, Path]]] = {}
        own = self.settings.get("model.path") or self.settings.get("model.variant")
        also = self.settings.get("sample.compare_on")
        for model, place in ((own, self.folder.samples), (also, self.folder.samples / "also")):
            table = preview_images.preview_table(place)
            for step, row in table.rows.items():
                shown = zip(table.requests, row, strict=True)
                found.setdefault(step, []).extend((str(model), recipe, path) for recipe, path in shown if path)
        return found


def compare_runs(paths: Sequence[Path], by: str | None, output: Path) -> list[str]:
    """Put the previews of the runs at `paths` side by side into the folder `output`; returns what to tell.

    Raises:
        ZImageTrainError: what is there is no run, has no previews, or none at a step that another has.
    """
    atomic.require_writable_folder(output)
    found = of_runs(opened(paths), by)
    return written(output, found)


def written(output: Path, found: Comparison) -> list[str]:
    """Save `found`, and say where it is."""
    remarks = comparison.save_comparison(output, found)
    return [
        *(f"note: {one}" for one in remarks),
        f"grid: {output / comparison.GRID}",
        f"page: {output / comparison.PAGE}",
    ]


def run_folders(path: Path) -> list[Path]:
    """The run folder at `path`, or those in it, as a sweep leaves them.

    Raises:
        ConfigError: there are none.
    """
    found = [path] if (path / "config.yaml").is_file() else sorted(one.parent for one in path.glob("*/config.yaml"))
    if not found:
        what = "is no run folder: it has no config.yaml" if path.exists() else "does not exist"
        raise ConfigError(Problem(str(path), what, "give output/NAME of a run, a sweep's folder, or LoRA files"))
    return found


def opened(paths: Sequence[Path]) -> list[FinishedRun]:
    """The runs at `paths`, each with a short name.

    Raises:
        ZImageTrainError: lists what is no run.
    """
    errors: list[ZImageTrainError] = []
    found: dict[Path, Mapping[str, Any]] = {}
    for path in paths:
        with collect_errors(errors):
            require_once([*found, *run_folders(path)])
            found |= {folder: settings_of(folder) for folder in run_folders(path)}
    raise_all(errors)
    labels = comparison.short_names(list(found))
    return [
        FinishedRun(label, RunDir(folder, settings["name"]), settings)
        for label, (folder, settings) in zip(labels, found.items(), strict=True)
    ]


def settings_of(folder: Path) -> Mapping[str, Any]:
    """The config that a run has written, flat; one of another version may have other settings than this one's.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        value = strict_yaml.parse(path.read_text(encoding="utf-8")).value
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise ConfigError(Problem(str(path), f"cannot be read ({error})", "give another run")) from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(Problem(str(path), "is not the config of a run", "give output/NAME of a run"))
    return flatten_keys(value)


def require_once(paths: Sequence[Path]) -> None:
    """Refuse what is given twice.

    Raises:
        ConfigError: names it.
    """
    counts = Counter(path.resolve() for path in paths)
    twice = [path for path in dict.fromkeys(paths) if counts[path.resolve()] > 1]
    if twice:
        raise ConfigError(*(Problem(str(path), "is given twice", "leave one out") for path in twice))


def of_runs(runs: Sequence[FinishedRun], by: str | None = None) -> Comparison:
    """What `runs` drew, at the steps that they share.

    Raises:
        DataError: there is nothing to compare.
        ConfigError: the images do not differ in what `by` names.
    """
    drawn = [run.drawn() for run in runs]
    empty = [run for run, found in zip(runs, drawn, strict=True) if not found]
    if empty:
        todo = "set sample.prompts and sample.every; the same train command then draws the last step"
        raise DataError(*(Problem(str(run.folder.root), "has no previews", todo) for run in empty))
    steps, remarks = _shared_steps(runs, [set(found) for found in drawn])
    settings = differing([run.settings for run in runs])
    shots = [
        shot
        for place, run in enumerate(runs)
        for step in steps
        for shot in _shots(run, step, drawn[place].get(step, []), {key: each[place] for key, each in settings.items()})
    ]
    if len({shot.values[MODEL] for shot in shots}) == 1:
        shots = [
            ComparisonImage(one.path, one.request, {k: v for k, v in one.values.items() if k != MODEL}) for one in shots
        ]
    axes = list(shots[0].values)
    columns = comparison.find_axis(by, axes) if by else RUN if len(runs) > 1 else STEP
    return Comparison(
        title=" against ".join(run.label for run in runs),
        images=shots,
        columns=columns,
        rows=_rows(columns, shots, list(settings)),
        subjects=[
            Subject(run.label, facts(run) | {key: settings[key][i] for key in settings}) for i, run in enumerate(runs)
        ],
        remarks=remarks,
    )


def _shots(
    run: FinishedRun, step: int, drawn: list[tuple[str, SamplingRequest, Path]], settings: dict[str, str]
) -> Iterator[ComparisonImage]:
    seen: Counter[tuple[str, str]] = Counter()
    for model, recipe, path in drawn:
        seen[model, recipe.prompt] += 1
        number = seen[model, recipe.prompt]  # one prompt may be drawn by several seeds
        prompt = (recipe.prompt or comparison.EMPTY) + (f" ({number})" if number > 1 else "")
        yield ComparisonImage(path, recipe, {RUN: run.label, **settings, MODEL: model, STEP: str(step), PROMPT: prompt})


def _rows(columns: str, shots: list[ComparisonImage], settings: list[str]) -> list[str]:
    """The axes that tell images of one column apart: runs by their settings where columns are a setting."""
    others = [axis for axis in settings if axis != columns] if columns in settings else [RUN] if columns != RUN else []
    rows = [axis for axis in (PROMPT, *others, MODEL) if axis in shots[0].values and axis != columns]
    places = {(shot.values[STEP], shot.values[columns], *(shot.values[axis] for axis in rows)) for shot in shots}
    return rows if len(places) == len(shots) else [*rows, RUN]  # runs that are alike in every setting


def _shared_steps(runs: Sequence[FinishedRun], drawn: list[set[int]]) -> tuple[list[int], list[str]]:
    """The steps that all runs have previews of, else those that two of them have; and which are left out."""
    counts = Counter(step for steps in drawn for step in steps)
    by_all, by_two = ({step for step in counts if counts[step] >= least} for least in (len(runs), 2))
    shared = by_all if any(by_all) or len(runs) == 1 else by_two
    if len(runs) > 1 and not any(shared):
        told = "; ".join(f"{run.label}: {_listed(steps)}" for run, steps in zip(runs, drawn, strict=True))
        todo = "let sample.every divide the steps of all of them"
        raise DataError(Problem("previews", f"the runs have none at a common step after training began ({told})", todo))
    remarks = [
        f"{run.label}: previews at step {_listed(left)} are left out, which the others lack"
        for run, steps in zip(runs, drawn, strict=True)
        if (left := steps - shared)
    ]
    return sorted(shared), remarks


def _listed(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def differing(flat: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Each setting in which runs differ, with the value that each of them has."""
    keys = dict.fromkeys(key for one in flat for key in one if not key.startswith(OF_A_RUN))
    values = {key: [_as_yaml(one[key]) if key in one else "(absent)" for one in flat] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def facts(run: FinishedRun) -> dict[str, str]:
    """What a run came to: loss over the last tenth, seconds a step, and where its LoRA is."""
    records = [record for record in read_records(run.folder.metrics) if record["step"] > 0]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    last = losses[-max(len(losses) // 10, 1) :]
    seconds = [record["seconds"] for record in records if isinstance(record.get("seconds"), int | float)]
    lora = run.folder.lora()
    return {
        "steps": str(records[-1]["step"]) if records else "0",
        "loss (last tenth)": f"{statistics.fmean(last):.4f}" if last else "",
        "seconds a step": f"{statistics.median(seconds):.3g}" if seconds else "",
        "LoRA": str(lora) if lora.exists() else "not finished",
    }
