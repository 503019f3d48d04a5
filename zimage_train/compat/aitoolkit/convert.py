"""From a job of AI Toolkit to a config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zimage_train.compat.aitoolkit import optimizers, previews
from zimage_train.compat.aitoolkit.job import AIToolkitJob, read_job
from zimage_train.compat.aitoolkit.keys import KEYS
from zimage_train.compat.aitoolkit.rules import Mapped
from zimage_train.compat.aitoolkit.sections import (
    data_section,
    ema_section,
    guidance_section,
    log_section,
    lora_section,
    model_section,
    preserve_section,
    save_section,
    timesteps_section,
    train_section,
)
from zimage_train.config import load
from zimage_train.config.foreign import ConfigWithNotes
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath, YamlDocument

Values = dict[str, Any]


def convert_job(path: Path, text: str, overrides: Sequence[str] = ()) -> ConfigWithNotes | None:
    """Return the config that the job in `text` becomes, or None if it is no job after all.

    Raises:
        ConfigError: lists every problem.
    """
    job = read_job(path, text)
    return None if job is None else ConfigWithNotes(_settle(job, overrides), notes_of(job))


def write_config(config: Config, notes: list[str], source: Path) -> str:
    """The text of an imported config: where it is from, what there is to say, every setting."""
    head = [f"# Imported from {source.name}, a job of AI Toolkit.", *(f"# {note}" for note in notes)]
    return "\n".join([*(" ".join(line.split()) for line in head), "", load.dump_config(config)])


def notes_of(job: AIToolkitJob) -> list[str]:
    """One line for each thing that its owner would not expect, and one for each reason to leave keys out."""
    return job.notes + [f"{what}: {', '.join(keys)} ({why})" for (what, why), keys in job.left_out.items()]


def _settle(job: AIToolkitJob, overrides: Sequence[str]) -> Config:
    document = YamlDocument(job_values(job))
    document.lines, document.names = _places(job)
    return load.load_document(job.path, document, overrides, job.problems)


def job_values(job: AIToolkitJob) -> Values:
    """Plain values of the config that `job` becomes; what is wrong with them is added to the job's problems."""
    if job.values["name"] is None:
        job.refuse("config.name", "is missing", "name the run", "missing-key")
    if job.values["training_folder"] is None:
        job.refuse("training_folder", "is missing", "name the folder that holds the run folders", "missing-key")
    model = model_section(job)
    variant = model["variant"]
    optimizer = optimizers.optimizer(job)
    joint = {
        "name": job.values["name"] or "missing",
        "model": model,
        "data": data_section(job),
        "lora": lora_section(job),
        "train": train_section(job),
        "timesteps": timesteps_section(job, variant),
        "guidance": guidance_section(job),
        "preserve": preserve_section(job),
        "optimizer": optimizer,
        "schedule": optimizers.schedule(job, optimizer.get("lr") or 1.0),
        "ema": ema_section(job),
        "sample": previews.sample(job, variant),
        "save": save_section(job),
        "log": log_section(job),
    }
    return _merged(_alone(job), joint)


def _alone(job: AIToolkitJob) -> Values:
    """The settings that one key decides by itself."""
    values: Values = {"data": [{} for _ in job.values["datasets"] or [None]]}
    for key, row in KEYS.items():
        if not isinstance(row, Mapped) or row.derived:
            continue
        if key.startswith("datasets[]."):
            name = key.removeprefix("datasets[].")
            for there, entry in zip(job.values["datasets"] or [], values["data"], strict=False):
                entry[row.to.removeprefix("data[].")] = there[name]
            continue
        there: Any = job.values
        for part in key.split("."):
            there = there[part]
        *sections, name = row.to.split(".")
        place = values
        for part in sections:
            place = place.setdefault(part, {})
        if there is not None:
            place[name] = there
    return values


def _merged(one: Values, other: Values) -> Values:
    """Both, section by section, and entry by entry."""
    result = dict(one)
    for key, value in other.items():
        if isinstance(value, dict):
            value = _merged(result.get(key, {}), value)
        elif isinstance(value, list) and isinstance(result.get(key), list):
            value = [_merged(first, second) for first, second in zip(result[key], value, strict=True)]
        result[key] = value
    return result


def _places(job: AIToolkitJob) -> tuple[dict[KeyPath, int], dict[KeyPath, str]]:
    """Line and name in the job for each setting that it decides, and for the sections of these."""
    lines: dict[KeyPath, int] = {(): 1}
    names: dict[KeyPath, str] = {}
    for key, path in job.mapped:
        row = KEYS[key]
        assert isinstance(row, Mapped)
        for to in row.to.split(", ") if row.to else []:
            ours, theirs = _numbered(to, path), path
            while ours and ours not in names:
                lines[ours] = job.line(theirs)
                names[ours] = job.name(theirs)
                ours, theirs = ours[:-1], theirs[:-1]
    return lines, names


def _numbered(to: str, path: KeyPath) -> KeyPath:
    """`data[].flip` for the second dataset -> (`data`, 1, `flip`)."""
    number = next((part for part in reversed(path) if isinstance(part, int)), 0)
    numbered: list[str | int] = []
    for part in to.split("."):
        numbered += [part.removesuffix("[]"), number] if part.endswith("[]") else [part]
    return tuple(numbered)
