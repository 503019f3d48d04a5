"""The image of the laboratory: what each use draws for the same captions from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from zimage_train.report import grid

from laboratory.scoring import SIZE, USES, Asked, shown
from miniature import world

CONCEPT, UNRELATED, NOISE = 4, 4, 21


def save(path: Path, place: Path, loras: Mapping[str, Mapping[int, Path]]) -> None:
    """Draws with the LoRA of the first seed of each scheme; single images go to `place`."""
    place.mkdir(parents=True, exist_ok=True)
    asked = Asked.of()
    scenes = asked.concept[:CONCEPT] + asked.unrelated[:UNRELATED]
    rows = [("the world itself", _saved(place, "world", [world.draw(scene, SIZE, SIZE) for scene in scenes]))]
    for use in USES:
        lora = next(iter(loras[use.trained].values())) if use.trained else None
        speed = use.fast if use.own == "8" else use.slow
        label = f"{use.name}, {speed.steps} steps"
        rows.append((label, _saved(place, use.name, list(shown(use, lora, scenes, NOISE)))))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save_grid_image(path, [world.caption(scene, SIZE, SIZE) for scene in scenes], rows)
    with Image.open(path) as whole:
        half = whole.reduce(2)
    half.save(path, optimize=True)


def _saved(place: Path, name: str, images: list[world.Pixels]) -> list[Path]:
    paths = [place / f"{name}-{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths
