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
    loss_section,
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
    if job is None:
        return None
    document = YamlDocument(job_values(job))
    document.lines, document.names = _origins(job)
    config = load.load_document(job.path, document, overrides, job.problems)
    return ConfigWithNotes(config, notes_of(job))


def write_config(config: Config, notes: list[str], source: Path) -> str:
    """Return the text of an imported config: its source and the notes as comments, then all settings."""
    kind = "a dataset file" if source.suffix.lower() == ".toml" else "a job of AI Toolkit"
    comments = [f"# Imported from {source.name}, {kind}.", *(f"# {note}" for note in notes)]
    one_line_each = [" ".join(comment.split()) for comment in comments]
    return "\n".join([*one_line_each, "", load.dump_config(config)])


def notes_of(job: AIToolkitJob) -> list[str]:
    """Return the notes of a conversion, and a line for each reason why keys are left out."""
    lines = list(job.notes)
    for (consequence, reason), keys in job.left_out.items():
        lines.append(f"{consequence}: {', '.join(keys)} ({reason})")
    return lines


def job_values(job: AIToolkitJob) -> Values:
    """Return the plain values of the config that `job` becomes, and add its problems and notes to `job`."""
    if job.values["name"] is None:
        job.refuse("config.name", "is missing", "name the run", "missing-key")
    if job.values["training_folder"] is None:
        job.refuse("training_folder", "is missing", "name the folder that holds the run folders", "missing-key")
    model = model_section(job)
    variant = model["variant"]
    optimizer = optimizers.optimizer_section(job)
    derived = {
        "name": job.values["name"] or "missing",
        "model": model,
        "data": data_section(job),
        "lora": lora_section(job),
        "train": train_section(job),
        "timesteps": timesteps_section(job, variant),
        "loss": loss_section(job),
        "guidance": guidance_section(job),
        "preserve": preserve_section(job),
        "optimizer": optimizer,
        "schedule": optimizers.schedule_section(job, optimizer.get("lr") or 1.0),
        "ema": ema_section(job),
        "sample": previews.sample_section(job, variant),
        "save": save_section(job),
        "log": log_section(job),
    }
    return _merge(_independent_values(job), derived)


def _independent_values(job: AIToolkitJob) -> Values:
    """Return the settings that depend on a single key."""
    values: Values = {"data": [{} for _ in job.values["datasets"] or [None]]}
    for key, row in KEYS.items():
        if not isinstance(row, Mapped) or row.derived:
            continue
        if key.startswith("datasets[]."):
            name = key.removeprefix("datasets[].")
            for dataset, entry in zip(job.values["datasets"] or [], values["data"], strict=False):
                entry[row.to.removeprefix("data[].")] = dataset[name]
            continue
        value: Any = job.values
        for part in key.split("."):
            value = value[part]
        if value is None:
            continue
        *sections, name = row.to.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return values


def _merge(first: Values, second: Values) -> Values:
    """Return the values of both, with sections and entries of lists merged; those of `second` win."""
    result = dict(first)
    for key, value in second.items():
        if isinstance(value, dict):
            value = _merge(result.get(key, {}), value)
        elif isinstance(value, list) and isinstance(result.get(key), list):
            value = [_merge(entry, other_entry) for entry, other_entry in zip(result[key], value, strict=True)]
        result[key] = value
    return result


def _origins(job: AIToolkitJob) -> tuple[dict[KeyPath, int], dict[KeyPath, str]]:
    """Return line and name in the job for every setting that it sets, and for the sections of these."""
    lines: dict[KeyPath, int] = {(): 1}
    names: dict[KeyPath, str] = {}
    # The deepest keys first, so that a section is named by its own: `data` by `datasets`, and not by `trigger_word`.
    for key, path in sorted(job.mapped, key=lambda mapped: -len(mapped[1])):
        row = KEYS[key]
        assert isinstance(row, Mapped)
        for setting in row.to.split(", ") if row.to else []:
            setting_path, job_path = _with_index(setting, path), path
            while setting_path and setting_path not in names:
                lines[setting_path] = job.line(job_path)
                names[setting_path] = job.name(job_path)
                setting_path, job_path = setting_path[:-1], job_path[:-1]
    return lines, names


def _with_index(setting: str, path: KeyPath) -> KeyPath:
    """Return the path of a setting with the index of the key at `path`: (`data`, 1, `flip`) for `data[].flip`."""
    index = next((part for part in reversed(path) if isinstance(part, int)), 0)
    parts: list[str | int] = []
    for part in setting.split("."):
        parts.append(part.removesuffix("[]"))
        if part.endswith("[]"):
            parts.append(index)
    return tuple(parts)
