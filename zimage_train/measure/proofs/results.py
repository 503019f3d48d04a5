"""The LoRA of a short run: as other programs load it, the pictures that it draws, and how far it drifts from Turbo."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.encoding import prompt_encoder
from zimage_train.diffusion.drift import DriftMeter
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io import atomic
from zimage_train.lora import headers, lora_file, verify
from zimage_train.lora.deltas import Deltas, relative_error
from zimage_train.measure import stock_pipeline
from zimage_train.measure.budgets import BudgetCase
from zimage_train.measure.proofs.claims import Claim, largest, not_tried
from zimage_train.measure.proofs.processes import command_of, run
from zimage_train.measure.proofs.runs import train, trained_lora
from zimage_train.measure.proofs.subject import Subject

READ_ALIKE = 1e-6
"""Relative error of a change that is read from a file twice: what fp32 leaves of a product."""
PROMPT, SEED = "a photo of zorb on a table", 3
STEPS, OTHER_STEPS = 8, 10
"""Steps of a picture on Turbo, and on a model without steps of its own."""
KEPT_RMS = 8.0
"""Root mean square of 255 by which two pictures in bf16 may differ: a PSNR of 30 dB."""
PIPELINE_BYTES = 22e9
"""Memory of the published pipeline in bf16 while it draws."""
DRIFT_STEPS = 30
OWN_DRIFT = 1e-4
"""What rounding leaves of 0: the velocity is found again from both ends of an Euler step."""
TURBO_KEPT = "Turbo's own deviation from its 8 steps is 0"
DRIFTS_LESS = "with the training adapter a LoRA drifts less from Turbo than without"
PICTURES = {"without": None, "with": trained_lora}
"""Name of a pair of pictures -> what makes the LoRA that they are drawn with."""


def export_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on the LoRA file, as diffusers' own loader and ComfyUI's key map read it."""
    path = trained_lora(subject)
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
    return largest(relative_error(delta, found[module]) for module, delta in stored.items())


def picture_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on a picture without and with the LoRA, against `ZImagePipeline` in another process."""
    folder = subject.paths.transformer.parent
    drawn: dict[str, np.ndarray] = {}
    for name, lora_of in PICTURES.items():
        promise = f"a picture {name} the LoRA is that of ZImagePipeline"
        if not (folder / "model_index.json").is_file():
            yield not_tried(promise, "the pipeline loads a folder with all parts, in diffusers' layout")
            continue
        lora = lora_of(subject) if lora_of is not None else None
        ours, theirs = draw_pair(subject, folder, name, lora)
        drawn[name] = pixels(ours)
        apart = drawn[name] - pixels(theirs)
        note = f"{subject.side} px in {subject.dtype}, in another process"
        if lora is not None:
            change = np.abs(drawn["with"] - drawn["without"]).mean()
            note += f"; the LoRA changes it by {change:.3g} of 255 on average"
        if subject.dtype == "fp32":
            yield Claim(promise, float(np.abs(apart).max()), "of 255", 1, "equality", note)
        else:
            yield Claim(promise, float(np.sqrt((apart**2).mean())), "of 255 (rms)", KEPT_RMS, "miniature", note)


def draw_pair(subject: Subject, folder: Path, name: str, lora: Path | None) -> tuple[Path, Path]:
    """Return the paths of our picture and of the pipeline's, each drawn by a process of its own."""
    ours, theirs = (subject.work / f"{name}-{who}.png" for who in ("ours", "diffusers"))
    place, size = subject.work / name, [str(subject.side)] * 2
    atomic.remove_folder(place)
    for earlier in (ours, theirs):
        atomic.remove(earlier)  # of a part that is measured again
    command = [*command_of("sample"), str(folder), "--prompt", PROMPT, "--seed", str(SEED), "-o", str(place)]
    variant = subject.config.model.variant
    steps = str(STEPS if variant == "turbo" else OTHER_STEPS)
    command += ["--width", size[0], "--height", size[1], "--steps", steps, "--guidance", "0"]
    command += ["--variant", variant, "--dtype", subject.dtype, *(["--lora", str(lora)] if lora else [])]
    run(command)
    atomic.move(next(place.glob("*.png")), ours)
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[subject.dtype]
    device = subject.device.type
    if device == "cuda" and subject.device_bytes < PIPELINE_BYTES:
        device = "streamed"
    stock = [sys.executable, "-P", stock_pipeline.__file__, str(folder), str(lora or ""), PROMPT, "", str(SEED), *size]
    run([*stock, steps, "0.0", str(theirs), dtype, device, str(VARIANTS[variant].shift)])
    return ours, theirs


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def drift_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on the drift of Turbo itself, and of a LoRA with and without the training adapter."""
    if subject.config.model.variant != "turbo":
        for promise in (TURBO_KEPT, DRIFTS_LESS):
            yield not_tried(promise, "only Turbo has steps to drift from")
        return
    if subject.paths.adapter is None:
        yield not_tried(DRIFTS_LESS, "this model has no training adapter")
    else:
        yield drift_of_loras(subject)
    # The last, since its memory stays with this process, and a run plans for the whole card.
    yield Claim(TURBO_KEPT, own_drift(subject), "", OWN_DRIFT, "own rounding")


def drift_of_loras(subject: Subject) -> Claim:
    """Return the claim on two LoRAs that are trained with and without the training adapter."""
    sizes = {"width": subject.side, "height": subject.side}
    sample_settings = {"every": DRIFT_STEPS, "first": False, "prompts": ["a dog"], **sizes}
    changes: dict[str, Any] = {"train": {"steps": DRIFT_STEPS, "batch_size": 4}, "sample": sample_settings}
    with_adapter = measured_drift(train(subject, "adapter", changes))
    without = measured_drift(train(subject, "bare", changes | {"model": {"adapter": None}}))
    note = f"deviation {with_adapter:.3f} with, {without:.3f} without, after {DRIFT_STEPS} steps"
    return Claim(DRIFTS_LESS, with_adapter / without, "times", 1.0, "miniature", note)


def own_drift(subject: Subject) -> float:
    """Return the deviation of Turbo without a LoRA from its own steps."""
    request = SamplingRequest(
        prompt=PROMPT,
        negative="",
        seed=SEED,
        width=subject.side,
        height=subject.side,
        steps=STEPS,
        guidance=0.0,
        shift=VARIANTS["turbo"].shift,
    )
    dtype, device = subject.dtype, subject.device
    embeds = dict(prompt_encoder(subject.paths.extras, device, dtype)([PROMPT], lambda done, total: None))
    # A forward takes less than the step that is planned here.
    plan = BudgetCase(subject.shape, dtype, subject.side, None, subject.device_bytes, 1).plan(device)
    frozen = load_frozen(subject.paths.transformer, None, dtype, device, None, plan.placement.streamed)
    return DriftMeter([request], embeds).measure(frozen.model, lambda done, total: None)


def measured_drift(lora: Path) -> float:
    """Return the last drift that the run of `lora` measured."""
    events = (lora.parent.parent / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return next(event["drift"] for event in map(json.loads, reversed(events)) if "drift" in event)
