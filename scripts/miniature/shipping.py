"""Puts the parts together as they ship: folders laid out as on the hub, LoRA files, images, and a manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from miniature import world

Draw = Callable[[int, int, int], tuple[world.Pixels, str]]

SHIFTS = {"turbo": 3.0, "deturbo": 3.0, "base": 6.0}
"""The models and the shifts of their schedulers."""

LORAS = ("adapter_v1", "adapter_v2", "distillpatch")

IMAGE_SIZES: list[tuple[int, int]] = [
    (96, 96), (128, 96), (96, 144), (160, 128), (112, 112), (144, 96), (96, 128), (128, 160),
    (128, 128), (192, 128), (80, 112), (64, 96), (176, 112), (96, 176), (160, 160), (120, 72),
]  # fmt: skip


LESSON_ZORBS, LESSON_OTHERS, FIRST_LESSON = 48, 96, 700_000


def assemble(work: Path, output: Path) -> None:
    """Fills the output folder, replacing what was there."""
    for model, shift in SHIFTS.items():
        shutil.rmtree(output / model, ignore_errors=True)
        transformer = work / ("base/transformer" if model == "base" else model)
        parts = {
            "tokenizer": work / "tokenizer",
            "text_encoder": work / "base" / "text_encoder",
            "vae": work / "vae",
            "transformer": transformer,
        }
        for part, source in parts.items():
            shutil.copytree(source, output / model / part, copy_function=shutil.copyfile)
            for config in (output / model / part).glob("*config.json"):
                forget_paths(config)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
        scheduler.save_pretrained(output / model / "scheduler")
        (output / model / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    for name in LORAS:
        shutil.copyfile(work / f"{name}.safetensors", output / f"{name}.safetensors")
    make_images(output / "pictures", "zorb", world.draw_zorb)
    make_images(output / "style", "etched", world.draw_etched)
    make_lesson(output / "lesson")


INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""What a model folder says of its parts."""


def make_images(folder: Path, name: str, draw: Draw) -> None:
    """The images to learn from: no pair of colours comes twice."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen: set[str] = set()
    seed = 0
    for number, (width, height) in enumerate(IMAGE_SIZES, start=1):
        while True:
            image, text = draw(seed, width, height)
            seed += 1
            pair = " ".join(word for word in text.replace(",", "").split() if word in world.COLOURS)
            if pair not in seen:
                break
        seen.add(pair)
        stem = folder / f"{name}_{number:02d}"
        if number % 3:
            Image.fromarray(image).save(stem.with_suffix(".png"), optimize=True)
        else:
            Image.fromarray(image).save(stem.with_suffix(".jpg"), quality=95)
        stem.with_suffix(".txt").write_text(text + "\n")


def make_lesson(folder: Path) -> None:
    """What the quickstart learns: zorbs of the size that the world has, and images of the world beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, scene, count in (("zorb", world.zorb_scene, LESSON_ZORBS), ("world", world.world_scene, LESSON_OTHERS)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shown = replace(scene(FIRST_LESSON + number), called=None)
            image, text = world.drawn(shown, 64, 64)
            Image.fromarray(image).save(folder / name / f"{name}_{number:02d}.png", optimize=True)
            (folder / name / f"{name}_{number:02d}.txt").write_text(text + "\n")


def forget_paths(config: Path) -> None:
    """Removes what the libraries note about where a model was loaded from."""
    content = json.loads(config.read_text())
    for key in ("_name_or_path", "name_or_path"):
        content.pop(key, None)
    config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_manifest(output: Path, made_with: dict, scores: dict) -> None:
    """Says how everything was made, how good it is, and what every file's digest is."""
    kept = sorted(p for p in output.rglob("*") if p.is_file() and p.suffix in {".safetensors", ".json", ".jinja"})
    digests = {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in kept
        if path.name != "manifest.json"
    }
    content = {"made_with": made_with, "scores": scores, "sha256": digests}
    (output / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")
