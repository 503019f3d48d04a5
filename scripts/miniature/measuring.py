"""What the family's members can do: the scores in the manifest, and an image of each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from miniature import world
from miniature.drawing import SLOW_SPEED, TURBO_SPEED, Score, Speed, Studio, load, score

FIRST_SCENE = 1_000_000
"""Scenes from here on were shown to no model."""

CAPTIONS = 64
NOISE = 7
SHOWN = 12

BASE_FAST, BASE_SLOW, BASE_GUIDED = Speed(8, 0, 6.0), Speed(30, 0, 6.0), Speed(30, 1, 6.0)


def scenes(count: int = CAPTIONS) -> list[world.Scene]:
    """Scenes that the models have not seen, called by their names."""
    found = (world.world_scene(seed) for seed in range(FIRST_SCENE, FIRST_SCENE + 4 * count))
    return [shown for shown in found if shown.called is None][:count]


def measure(output: Path, grid: Path) -> dict[str, dict]:
    """Draws the same captions from the same noise with each member; returns its scores, and saves a strip of each."""
    studio, asked = Studio(output / "turbo"), scenes()
    captions = [world.caption(shown, 64, 64) for shown in asked]
    loras = {name: output / f"{name}.safetensors" for name in ("adapter_v1", "adapter_v2", "distillpatch")}
    members: dict[str, tuple[str, list[Path], list[Speed]]] = {
        "base": ("base", [], [BASE_FAST, TURBO_SPEED, BASE_SLOW, BASE_GUIDED]),
        "turbo": ("turbo", [], [TURBO_SPEED, SLOW_SPEED]),
        "deturbo": ("deturbo", [], [TURBO_SPEED, SLOW_SPEED, Speed(30, 0)]),
        "turbo + adapter_v1": ("turbo", [loras["adapter_v1"]], [TURBO_SPEED, SLOW_SPEED]),
        "turbo + adapter_v2": ("turbo", [loras["adapter_v2"]], [TURBO_SPEED, SLOW_SPEED]),
        "turbo + distillpatch": ("turbo", [loras["distillpatch"]], [TURBO_SPEED]),
        "turbo + adapter_v2 + distillpatch": ("turbo", [loras["adapter_v2"], loras["distillpatch"]], [TURBO_SPEED]),
    }
    found: dict[str, dict] = {"the world itself": rounded(truth(asked))}
    strips = [np.concatenate([world.draw(shown, 64, 64) for shown in asked[:SHOWN]], 1)]
    for name, (folder, merged, speeds) in members.items():
        model = load(output / folder / "transformer", *merged)
        for speed in speeds:
            images = studio.draw(model, captions, NOISE, speed)
            key = f"{name}, {speed.steps} steps, g {speed.guidance:g}, shift {speed.shift:g}"
            found[key] = rounded(score(images, asked))
            strips.append(np.concatenate(list(images[:SHOWN]), 1))
            print(key, found[key], flush=True)
    Image.fromarray(np.concatenate(strips)).save(grid)
    return found


def truth(asked: list[world.Scene]) -> Score:
    """What the world's own images score: the most that a model can."""
    return score(np.stack([world.draw(shown, 64, 64) for shown in asked]), asked)


def rounded(scored: Score) -> dict[str, float]:
    """A score as it is written down."""
    return {**{name: round(value, 3) for name, value in asdict(scored).items()}, "quality": round(scored.quality, 3)}
