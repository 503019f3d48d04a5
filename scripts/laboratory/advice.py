"""The effect of single settings on the miniature: each changed alone in a run on Turbo with its adapter.

Every run learns the concept of the laboratory (`schemes`), in a quarter of its steps and with half of its batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file

from zimage_train import mini

from laboratory.running import lora_of
from laboratory.schemes import TRAINED, Recipe, config
from laboratory.scoring import SIZE, Asked, studio
from laboratory.statistics import Interval, interval
from miniature import world
from miniature.drawing import TURBO_SPEED, load, score

RECIPE = Recipe(steps=500, batch=8)
ON_TURBO = next(scheme for scheme in TRAINED if scheme.name == "adapter_v2")
SEEDS, IMAGE_SEED = (101, 102, 103), 11
SCORES = ("concept", "leakage", "drift", "fidelity")


@dataclass(frozen=True)
class Advice:
    """A run with something changed."""

    says: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section -> settings."""
    averaged: bool = False
    """Whether the average of the weights is scored instead of the last ones."""
    regularized: bool = True
    """Whether images of the world are trained beside."""


ADVICE: dict[str, Advice] = {
    "plain": Advice("rank 16, weighted noise levels, half of the passes on regularization images"),
    "rank 4": Advice("`lora.rank: 4`", {"lora": {"rank": 4}}),
    "rank 64": Advice("`lora.rank: 64`", {"lora": {"rank": 64}}),
    "LoKr 16": Advice("`lora.type: lokr`, factor 16", {"lora": {"type": "lokr", "rank": None}}),
    "LoKr 16, fast": Advice(
        "the same at four times the rate",
        {"lora": {"type": "lokr", "rank": None}, "optimizer": {"name": "adamw", "lr": 1.6e-2}},
    ),
    "LoKr 4": Advice("`lora.type: lokr`, factor 4", {"lora": {"type": "lokr", "rank": None, "factor": 4}}),
    "LoKr 4, fast": Advice(
        "the same at four times the rate",
        {"lora": {"type": "lokr", "rank": None, "factor": 4}, "optimizer": {"name": "adamw", "lr": 1.6e-2}},
    ),
    "sigmoid": Advice("`timesteps.type: sigmoid`", {"timesteps": {"type": "sigmoid"}}),
    "sigmoid, shift 3": Advice("the same with `shift: 3`", {"timesteps": {"type": "sigmoid", "shift": 3.0}}),
    "uniform_shift": Advice("`timesteps.type: uniform_shift`", {"timesteps": {"type": "uniform_shift"}}),
    "turbo_grid": Advice("`timesteps.type: turbo_grid`", {"timesteps": {"type": "turbo_grid"}}),
    "differential 3": Advice("`guidance.differential: 3`", {"guidance": {"differential": 3.0}}),
    "contrastive 3": Advice("`guidance.contrastive: 3`", {"guidance": {"contrastive": 3.0}}),
    "EMA 0.99": Advice("`ema.decay: 0.99`, the average", {"ema": {"decay": 0.99}}, averaged=True),
    "preserve": Advice(
        "`preserve.kind: trigger`, without regularization images",
        {"preserve": {"kind": "trigger", "class_word": "circle"}},
        regularized=False,
    ),
    "no regularization": Advice("no regularization images", regularized=False),
    "share 0.25": Advice("a quarter of the passes on them", {"train": {"regularization_share": 0.25}}),
    "share 0.75": Advice("three quarters of the passes on them", {"train": {"regularization_share": 0.75}}),
}


def run_of(name: str, seed: int, images: tuple[Path, Path], runs: Path) -> dict[str, Any]:
    """Return the config of the run of an advice."""
    advice = ADVICE[name]
    values = copy.deepcopy(config(ON_TURBO, seed, RECIPE, images, runs))
    values["name"] = f"{name.replace(' ', '_').replace(',', '')}-s{seed}"
    if not advice.regularized:
        values["data"] = values["data"][:1]
        del values["train"]["regularization_share"]
    for section, settings in advice.changes.items():
        values[section] = {**values.get(section, {}), **settings}
    return values


def file_of(name: str, values: dict[str, Any]) -> Path:
    """Return the LoRA that is scored."""
    path = lora_of(values)
    return path.parent / "ema" / path.name if ADVICE[name].averaged else path


def model_with(lora: Path | None) -> ZImageTransformer2DModel:
    """Return Turbo with a LoRA or LoKr merged into it, without the trainer."""
    folder = mini.TURBO / "transformer"
    tensors = load_file(lora) if lora is not None else {}
    if lora is None or not any(key.endswith("lokr_w1") for key in tensors):
        return load(folder, *([lora] if lora else []))
    model = load(folder)
    for key, w1 in tensors.items():
        if key.endswith(".lokr_w1"):
            module = key.removeprefix("diffusion_model.").removesuffix(".lokr_w1")
            delta = torch.kron(w1.float(), tensors[key.replace("lokr_w1", "lokr_w2")].float())
            model.get_submodule(module).weight += delta
    return model


@torch.no_grad()
def evaluate(lora: Path | None) -> dict[str, float]:
    """Return the scores of a LoRA, or of Turbo without one, at Turbo's 8 steps."""
    asked, model = Asked.of(), model_with(lora)
    found = {}
    for name, scenes in (("concept", asked.concept), ("unrelated", asked.unrelated)):
        captions = [world.caption(scene, SIZE, SIZE) for scene in scenes]
        found[name] = score(studio().draw(model, captions, IMAGE_SEED, TURBO_SPEED, SIZE), scenes)
    other = found["unrelated"]
    return {
        "concept": found["concept"].concept,
        "leakage": other.concept,
        "fidelity": other.fidelity,
        "quality": other.quality,
    }


def table_of(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Interval]]:
    """Return the mean and 95 % interval of each score over the seeds, by advice; `scores` are by "name, seed"."""
    turbo = scores["turbo"]["quality"]
    found: dict[str, dict[str, Interval]] = {}
    for name in ADVICE:
        rows = [scores[f"{name}, {seed}"] for seed in SEEDS if f"{name}, {seed}" in scores]
        if rows:
            rows = [{**row, "drift": 1.0 - row["quality"] / turbo} for row in rows]
            found[name] = {}
            for key in SCORES:
                found[name][key] = interval([row[key] for row in rows])
    return found


def lines(table: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """Return the table of docs/recipes.md."""
    found = ["| changed | concept | leakage | drift | fidelity |", "|---|---|---|---|---|"]
    for name, row in table.items():
        cells = [f"{row[key][0]:.2f} ({row[key][1]:.2f} to {row[key][2]:.2f})" for key in SCORES]
        found.append(f"| {ADVICE[name].says} | {' | '.join(cells)} |")
    return found
