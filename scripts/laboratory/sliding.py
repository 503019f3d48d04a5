"""Effect of a slider of size on the miniature: images at several weights, measured by program.

Captions name no size, so what the weight does to it is the slider's alone. The area is the share of the pixels that are
not ground; the shape and the colours are compared with the caption. The slider of prompts knows `large` and `small` as
words, that of pairs has seen each scene at both sizes.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.report import grid

from laboratory.scoring import BASE_SLOW, SIZE, studio
from miniature import scores, world
from miniature.drawing import SLOW_SPEED, TURBO_SPEED, Speed, load
from miniature.measuring import scenes

WEIGHTS = (-1.0, 0.0, 1.0, 2.0)
SEEDS = (1, 2, 3)
TRAINED, SCORED, SHOWN = 32, 48, 4
FIRST_PROMPT = 700_000
"""Scenes from here on give the prompts and pairs; none is scored."""
NOISE = 7
MODELS: dict[str, tuple[Path, Speed]] = {
    "turbo": (mini.TURBO, TURBO_SPEED),
    "deturbo": (mini.DETURBO, SLOW_SPEED),
    "base": (mini.BASE, BASE_SLOW),
}
SETTINGS: dict[str, Any] = {
    "lora": {"rank": 8},
    "optimizer": {"name": "adamw", "lr": 2e-3},
    "sample": {"every": None},
    "save": {"every": None},
    "log": {"tensorboard": False},
}
PROMPTS = {"positive": "[prompt], large", "negative": "[prompt], small", "guidance": 0.5}


def compare_sliders(place: Path, image: Path) -> dict[str, Any]:
    """Return the effect of each slider at each weight, and draw that of prompts on Turbo into `image`."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for variant, seeds in {"turbo": SEEDS, "deturbo": SEEDS[:1], "base": SEEDS[:1]}.items():
        runs = [train_slider(prompts_config(place, variant, seed)) for seed in seeds]
        found[f"prompts on {variant}"] = _rows(variant, runs)
        if variant == "turbo":
            _show(place, image, runs[0])
    found["pairs on turbo"] = _rows("turbo", [train_slider(pairs_config(place, seed)) for seed in SEEDS])
    return {"steps": 150, "scored": SCORED, "weights": list(WEIGHTS), "sliders": found}


def captions(asked: list[world.Scene]) -> list[str]:
    """Say each scene without its size and place, in two wordings by turns."""
    said = [replace(scene, detailed=False, wording=number % 2) for number, scene in enumerate(asked)]
    return [world.caption(scene, SIZE, SIZE) for scene in said]


def trained_scenes() -> list[world.Scene]:
    """Return the scenes of the prompts and pairs."""
    found = (world.world_scene(seed) for seed in range(FIRST_PROMPT, FIRST_PROMPT + 4 * TRAINED))
    return [scene for scene in found if scene.called is None][:TRAINED]


def prompts_config(place: Path, variant: str, seed: int) -> dict[str, Any]:
    prompts = place / "prompts.txt"
    prompts.write_text("\n".join(captions(trained_scenes())) + "\n")
    return SETTINGS | {
        "name": f"prompts_{variant}_s{seed}x",
        "output_dir": str(place / "runs"),
        "seed": seed,
        "model": {"variant": variant, "path": str(MODELS[variant][0]), "adapter": None, "dtype": "fp32"},
        "cache": {"folder": str(place / "cache")},
        "data": [{"prompts": str(prompts), "resolution": [SIZE], "caption_dropout": 0.0}],
        "train": {"method": "slider", "steps": 150, "batch_size": 4},
        "slider": PROMPTS,
    }


def pairs_config(place: Path, seed: int) -> dict[str, Any]:
    """Return the config of a run on pairs of each scene with a large and with a small shape."""
    asked = trained_scenes()
    for size in ("large", "small"):
        folder = place / size
        folder.mkdir(parents=True, exist_ok=True)
        for number, (scene, said) in enumerate(zip(asked, captions(asked), strict=True)):
            Image.fromarray(world.draw(replace(scene, size=size), SIZE, SIZE)).save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(said)
    data = {"folder": str(place / "large"), "negative": str(place / "small"), "resolution": [SIZE]}
    return SETTINGS | {
        "name": f"pairs_s{seed}x",
        "output_dir": str(place / "runs"),
        "seed": seed,
        "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V2), "dtype": "fp32"},
        "cache": {"folder": str(place / "cache")},
        "data": [data | {"caption_dropout": 0.0}],
        "train": {"method": "pairs", "steps": 150, "batch_size": 4},
    }


def train_slider(values: dict[str, Any]) -> Path:
    config = Config.model_validate(values)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_training(config, fresh=False)
    return Path(config.output_dir) / config.name / "lora" / f"{config.name}.safetensors"


def images_at(lora: Path, weight: float, variant: str, asked: list[world.Scene]) -> np.ndarray:
    """Draw the captions of scenes with a LoRA at a weight, as diffusers adds it."""
    folder, speed = MODELS[variant]
    model = load(folder / "transformer")
    model.load_lora_adapter(load_file(lora), prefix="diffusion_model")
    model.fuse_lora(lora_scale=weight)
    model.unload_lora()
    return studio().draw(model, captions(asked), NOISE, speed, SIZE)


def area(image: np.ndarray) -> float:
    """Return the share of the pixels that are not ground."""
    smooth = scores.box(image.astype(np.float32))
    ground = scores.nearest(np.median(scores.frame_of(smooth), 0)[None])[0]
    return float((np.linalg.norm(smooth - scores.PALETTE[ground], axis=2) > scores.FAR).mean())


def measure(images: np.ndarray, asked: list[world.Scene]) -> dict[str, float]:
    """Return the means over the images: the area, whether shape and colours are those of the caption, the sharpness."""
    seen = [scores.look(image) for image in images]
    return {
        "area": fmean(map(area, images)),
        "shape": fmean(found.shape == scene.shape for found, scene in zip(seen, asked, strict=True)),
        "colour": fmean(found.colour == scene.colour for found, scene in zip(seen, asked, strict=True)),
        "ground": fmean(found.ground == scene.ground for found, scene in zip(seen, asked, strict=True)),
        "sharpness": fmean(found.sharpness for found in seen),
    }


def _rows(variant: str, runs: list[Path]) -> dict[str, dict[str, list[float]]]:
    """Return by weight the mean and the spread over the runs of each measure."""
    asked, rows = scenes(SCORED), dict[str, dict[str, list[float]]]()
    for weight in WEIGHTS:
        measured = [measure(images_at(run, weight, variant, asked), asked) for run in runs]
        row: dict[str, list[float]] = {}
        for name in measured[0]:
            values = [one[name] for one in measured]
            row[name] = [round(fmean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]
        rows[f"{weight:g}"] = row
        print(variant, weight, row, flush=True)
    return rows


def _show(place: Path, image: Path, lora: Path) -> None:
    """Write a grid with a column for each weight and a row for each of some captions."""
    asked = scenes(SHOWN)
    drawn = {weight: images_at(lora, weight, "turbo", asked) for weight in WEIGHTS}
    rows: list[grid.GridRow] = []
    for number, caption in enumerate(captions(asked)):
        paths = [place / f"{number}_{index}.png" for index in range(len(WEIGHTS))]
        for path, weight in zip(paths, WEIGHTS, strict=True):
            Image.fromarray(drawn[weight][number]).save(path)
        rows.append((caption, paths))
    image.parent.mkdir(parents=True, exist_ok=True)
    grid.save_grid_image(image, [f"weight {weight:g}" for weight in WEIGHTS], rows)
    with Image.open(image) as whole:
        half = whole.reduce(2)
    half.save(image, optimize=True)
