"""Whole runs in processes of their own: equal bytes, the exported file, previews, and drift."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zimage_train import mini
from zimage_train.config import strict_yaml
from zimage_train.errors import Problem, ZImageTrainError
from zimage_train.lora import headers, lora_file, verify
from zimage_train.lora.deltas import Deltas, relative_error
from zimage_train.measure import stock_pipeline
from zimage_train.measure.proofs.claims import Claim, not_tried
from zimage_train.measure.proofs.subject import Subject

STEPS, KILLED_AFTER, SAVED_EVERY = 12, 7, 3
DRIFT_STEPS, DRIFT_RATE = 30, 1e-3
PROMPT, SEED = "a photo of zorb on a table", 3
READ_ALIKE = 1e-6
"""Relative error of a change that is read from a file twice: what fp32 leaves of a product."""
KEPT_PSNR_ERROR = 8.0
"""Root mean square of 255 by which two pictures in bf16 may differ: a PSNR of 30 dB."""


def run_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on the result of a short run: it is the same each time, is loaded alike, and draws alike."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _run_claims(subject, Path(folder))


def _run_claims(subject: Subject, root: Path) -> Iterator[Claim]:
    whole = train(subject, root / "whole", {"train": {"steps": STEPS, "batch_size": 1}})
    again = train(subject, root / "again", {"train": {"steps": STEPS, "batch_size": 1}})
    note = f"{STEPS} steps"
    promise = "two equal starts end with the same LoRA"
    yield Claim(promise, different_bytes(whole, again), "bytes that differ", 0, "equality", note)
    changes = {"train": {"steps": STEPS, "batch_size": 1}}
    train(subject, root / "killed", changes, kill_after=KILLED_AFTER)
    killed = train(subject, root / "killed", changes)
    starts = json.loads((killed.parent.parent / "run.json").read_bytes())["starts"]
    promise = "a run that is killed and continued ends with the same LoRA"
    note = f"killed after step {KILLED_AFTER}, continued after step {starts[-1]} of {STEPS}"
    is_continued = 0 < starts[-1] < STEPS
    value = different_bytes(whole, killed) if is_continued else None
    yield Claim(promise, value, "bytes that differ", 0, "equality", note)
    yield from export_claims(subject, whole)
    yield from preview_claims(subject, whole, root)


def export_claims(subject: Subject, path: Path) -> Iterator[Claim]:
    """Yield claims on the LoRA file `path`, as diffusers' own loader and ComfyUI's key map read it."""
    stored = lora_file.read_deltas(path, headers.READ)
    for loader, loaded in (
        ("diffusers' loader", verify.as_diffusers(path, subject.shape)),
        ("a transcription of ComfyUI's key map", verify.as_comfyui(path, subject.shape.linears)),
    ):
        promise = f"{loader} loads the change of every module"
        note = f"{len(stored)} modules"
        yield Claim(promise, worst_error(stored, loaded), "of the change", READ_ALIKE, "equality", note)


def worst_error(stored: Deltas, loaded: Deltas) -> float:
    """Return the largest relative error of a module; infinite if one is missing."""
    found = {module: delta for module, delta in loaded.items() if module in stored or delta.norm() > 0}
    if found.keys() != stored.keys():
        return float("inf")
    return max(relative_error(delta, found[module]) for module, delta in stored.items())


def preview_claims(subject: Subject, lora: Path, root: Path) -> Iterator[Claim]:
    """Yield claims on a picture without and with the LoRA, against `ZImagePipeline` in another process."""
    side = 64 if subject.is_miniature else 512
    for name, file in (("without a LoRA", None), ("with the LoRA of a run", lora)):
        place = root / ("with" if file else "without")
        place.mkdir()
        command = [*command_of("sample"), str(subject.folder), "--prompt", PROMPT, "--seed", str(SEED)]
        command += ["--width", str(side), "--height", str(side), "--dtype", subject.dtype, "-o", str(place)]
        run([*command, *(["--lora", str(file)] if file else [])])
        theirs = place / "stock.png"
        dtype = {"bf16": "bfloat16", "fp32": "float32"}[subject.dtype]
        stock = [sys.executable, "-P", stock_pipeline.__file__, str(subject.folder), str(file or ""), PROMPT, ""]
        stock += map(str, (SEED, side, side, 8, 0.0, theirs, dtype, subject.device.type))
        run(stock)
        ours = next(path for path in place.glob("*.png") if path != theirs)
        apart = pixels(ours) - pixels(theirs)
        promise = f"a picture {name} is that of ZImagePipeline"
        note = f"{side} px in {subject.dtype}, in another process"
        if subject.dtype == "fp32":
            yield Claim(promise, float(np.abs(apart).max()), "of 255", 1, "equality", note)
        else:
            yield Claim(promise, float(np.sqrt((apart**2).mean())), "of 255 (rms)", KEPT_PSNR_ERROR, "miniature", note)


def drift_claims(subject: Subject) -> Iterator[Claim]:
    """Yield the claim that a LoRA that was trained with the training adapter drifts less from Turbo."""
    promise = "with the training adapter a LoRA drifts less from Turbo than without"
    if subject.paths.adapter is None:
        yield not_tried(promise, "this model has no training adapter")
        return
    sample = {"every": DRIFT_STEPS, "first": False, "prompts": ["a dog"], "width": 64, "height": 64}
    if not subject.is_miniature:
        sample |= {"width": 512, "height": 512}
    changes = {"train": {"steps": DRIFT_STEPS}, "optimizer": {"lr": DRIFT_RATE}, "sample": sample}
    drifts = []
    for adapter in (str(subject.paths.adapter), None):
        with tempfile.TemporaryDirectory() as folder:
            lora = train(subject, Path(folder), changes | {"model": {"adapter": adapter}})
            events = (lora.parent.parent / "events.jsonl").read_text().splitlines()
            drifts += [event["drift"] for event in map(json.loads, events) if "drift" in event]
    with_adapter, without = drifts
    note = f"deviation {with_adapter:.3f} with, {without:.3f} without, after {DRIFT_STEPS} steps"
    yield Claim(promise, with_adapter / without, "times", 1.0, "miniature", note)


def train(subject: Subject, root: Path, changes: dict[str, Any], kill_after: int | None = None) -> Path:
    """Train by a command in another process; return the path of the LoRA. `kill_after` a step, end it at once."""
    root.mkdir(exist_ok=True)
    adapter = None if subject.paths.adapter is None else str(subject.paths.adapter)
    values: dict[str, Any] = {
        "name": "proved",
        "output_dir": str(root),
        "seed": 7,
        "model": {"path": str(subject.folder), "adapter": adapter, "dtype": subject.dtype},
        "data": [{"folder": str(mini.IMAGES), "resolution": [64 if subject.is_miniature else 512], "trigger": "zorb"}],
        "cache": {"folder": str(root.parent / "cache")},
        "lora": {"rank": 4 if subject.is_miniature else 16},
        "train": {"steps": STEPS},
        "optimizer": {"name": "adamw"},
        "sample": {"every": None},
        "save": {"every": SAVED_EVERY},
        "log": {"tensorboard": False},
    }
    for section, settings in changes.items():
        values[section] = {**values[section], **settings}
    path = root / "proved.yaml"
    path.write_text(strict_yaml.dump(values), encoding="utf-8")
    run_folder = root / "proved"
    command = [*command_of("train"), str(path)]
    if kill_after is None:
        run(command)
    else:
        kill_after_step(command, run_folder / "metrics.jsonl", kill_after)
    return run_folder / "lora" / "proved.safetensors"


def kill_after_step(command: list[str], metrics: Path, step: int) -> None:
    """Start `command`, and kill it when `metrics` has the record of `step`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=offline())
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            process.kill()
        time.sleep(0.002)


def command_of(name: str) -> list[str]:
    return [sys.executable, "-m", "zimage_train", name]


def run(command: list[str]) -> None:
    """Run a command to its end.

    Raises:
        ZImageTrainError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline())
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ZImageTrainError(Problem(" ".join(command[2:4]), f"failed: {' '.join(last)}", "", "command-failed"))


def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def different_bytes(one: Path, other: Path) -> int:
    """Return the number of bytes in which two files differ."""
    a, b = one.read_bytes(), other.read_bytes()
    return abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
