"""Short runs of `train` in processes of their own: equal bytes, whatever happens between."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zimage_train import mini
from zimage_train.config import strict_yaml
from zimage_train.io import atomic
from zimage_train.measure.proofs.claims import Claim
from zimage_train.measure.proofs.processes import command_of, kill_after_step, run
from zimage_train.measure.proofs.subject import Subject

NAME = "proved"
STEPS, KILLED_AFTER, SAVED_EVERY = 12, 7, 3
ATTEMPTS = 3
"""Attempts to kill a run before its last step."""
MINIATURE_RATE, RATE = 3e-3, 1e-3
"""Learning rates with which a few steps change pictures."""
RUNS = ("whole", "again", "killed", "adapter", "bare", "cache", "cases", "with", "without")
"""Folders that parts leave in the folder of work, which nothing needs once all of them are measured."""
EQUAL = "two equal starts end with the same LoRA"
CONTINUED = "a run that is killed and continued ends with the same LoRA"


def exactness_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on a run that is begun twice, and on one that is killed."""
    atomic.remove(_lora_path(subject))  # which an earlier measurement, that failed, may have trained wrongly
    whole, again = trained_lora(subject), train(subject, "again", {})
    yield Claim(EQUAL, different_bytes(whole, again), "bytes that differ", 0, "equality", f"{STEPS} steps")
    for _ in range(ATTEMPTS):
        begun = train(subject, "killed", {}, kill_after=KILLED_AFTER)
        metrics = begun.parent.parent / "metrics.jsonl"
        if not metrics.exists() or metrics.read_bytes().count(b"\n") < STEPS:
            break  # it was killed in time: a busy machine may be late by the few milliseconds of the other steps
    killed = train(subject, "killed", {}, continues=True)
    starts = json.loads((killed.parent.parent / "run.json").read_bytes())["starts"]
    note = f"killed after step {KILLED_AFTER}, continued after step {starts[-1]} of {STEPS}"
    was_continued = 0 < starts[-1] < STEPS
    value = different_bytes(whole, killed) if was_continued else None
    yield Claim(CONTINUED, value, "bytes that differ", 0, "equality", note)


def trained_lora(subject: Subject) -> Path:
    """Return the LoRA of a whole run, which is trained by the first part that needs it."""
    path = _lora_path(subject)
    if not path.exists():
        atomic.move(train(subject, "whole", {}), path)  # at once: an interruption leaves no half of it
    return path


def _lora_path(subject: Subject) -> Path:
    return subject.work / "lora.safetensors"


def clear_runs(subject: Subject) -> None:
    """Remove the runs, with their caches and checkpoints."""
    for name in RUNS:
        atomic.remove_folder(subject.work / name)


def clear_work(subject: Subject) -> None:
    """Remove all that parts leave in the folder of work, and nothing else."""
    clear_runs(subject)
    for pattern in ("lora.safetensors", "*-ours.png", "*-diffusers.png"):
        for path in subject.work.glob(pattern):
            atomic.remove(path)


def train(
    subject: Subject, name: str, changes: dict[str, Any], kill_after: int | None = None, continues: bool = False
) -> Path:
    """Train in another process, in the folder `name`, and return the path of the LoRA.

    Args:
        kill_after: a step after which the process is killed.
        continues: whether an earlier run in this folder goes on, or is removed.
    """
    rate = MINIATURE_RATE if subject.is_miniature else RATE
    folder = subject.work / name
    if not continues:
        atomic.remove_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "name": NAME,  # it is in the file of the LoRA, and so the same for all
        "output_dir": str(folder),
        "seed": 7,
        "model": subject.config.model.model_dump(mode="json", exclude_unset=True),
        "data": [{"folder": str(mini.IMAGES), "resolution": [subject.side], "trigger": "zorb"}],
        "cache": {"folder": str(subject.work / "cache")},
        "lora": {"rank": 4 if subject.is_miniature else 16},
        "train": {"steps": STEPS, "batch_size": 1},
        "optimizer": {"name": "adamw", "lr": rate},
        "sample": {"every": None},
        "save": {"every": SAVED_EVERY},
        "log": {"tensorboard": False},
    }
    for section, settings in changes.items():
        values[section] = {**values[section], **settings}
    path = folder / "config.yaml"
    atomic.write_text(path, strict_yaml.dump(values))
    command = [*command_of("train"), str(path)]
    if kill_after is None:
        run(command)
    else:
        kill_after_step(command, folder / NAME / "metrics.jsonl", kill_after)
    return folder / NAME / "lora" / f"{NAME}.safetensors"


def different_bytes(one: Path, other: Path) -> int:
    """Return the number of bytes in which two files differ."""
    a, b = (np.fromfile(path, dtype=np.uint8) for path in (one, other))
    common = min(len(a), len(b))
    return abs(len(a) - len(b)) + int((a[:common] != b[:common]).sum())
