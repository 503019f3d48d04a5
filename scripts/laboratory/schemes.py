"""What is trained: the same images, steps and rate under each scheme, as configs of the trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from zimage_train import mini

from miniature import world

CONCEPT_IMAGES, WORLD_IMAGES = 48, 256
FIRST_IMAGE = 500_000
"""Scenes from here on are trained on; the family has seen none of them, and none is scored."""

TRAINED_WORDINGS, PARAPHRASES = (0, 1), (2, 3)
"""Captions that the LoRAs are trained with, and those that say the same in words they have not seen with a zorb."""

SIZE = 64


@dataclass(frozen=True)
class Recipe:
    """The settings that were tuned, the same for every scheme."""

    steps: int = 2000
    batch: int = 16
    rate: float = 4e-3
    rank: int = 16
    share: float = 0.5
    """Of regularization images."""
    imitation_steps: int = 800
    imitation_rate: float = 1e-3
    teacher_guidance: float = 0.5


QUICK = Recipe(steps=1500, imitation_steps=500)
"""What fits into twenty minutes."""


@dataclass(frozen=True)
class Scheme:
    """A way of training, and what the LoRA is then used on."""

    name: str
    variant: str
    adapter: Path | None
    says: str

    @property
    def model(self) -> Path:
        return {"turbo": mini.TURBO, "deturbo": mini.DETURBO, "base": mini.BASE}[self.variant]


DIRECT = Scheme("direct", "turbo", None, "plain SFT on Turbo")
TRAINED = (
    DIRECT,
    Scheme("adapter_v1", "turbo", mini.ADAPTER_V1, "SFT on Turbo with adapter v1, which is taken off again"),
    Scheme("adapter_v2", "turbo", mini.ADAPTER_V2, "the same with adapter v2"),
    Scheme("deturbo", "deturbo", None, "SFT on De-Turbo"),
    Scheme("base", "base", None, "SFT on Base"),
)


def write_images(folder: Path) -> tuple[Path, Path]:
    """The images of the concept and those of the world beside them, each with its caption."""
    concept, others = folder / "zorb", folder / "world"
    for place, scene, count in (
        (concept, world.zorb_scene, CONCEPT_IMAGES),
        (others, world.world_scene, WORLD_IMAGES),
    ):
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shown = scene(FIRST_IMAGE + number)
            wording = TRAINED_WORDINGS[number % len(TRAINED_WORDINGS)] if place == concept else shown.wording
            image, text = world.drawn(replace(shown, wording=wording, called=None), SIZE, SIZE)
            Image.fromarray(image).save(place / f"{number:03d}.png")
            (place / f"{number:03d}.txt").write_text(text + "\n")
    return concept, others


def config(scheme: Scheme, seed: int, recipe: Recipe, images: tuple[Path, Path], runs: Path) -> dict[str, Any]:
    """A run of `scheme`."""
    concept, others = images
    common = {"resolution": [SIZE]}
    return {
        "name": f"{scheme.name}-s{seed}",
        "output_dir": str(runs),
        "seed": seed,
        "model": {
            "variant": scheme.variant,
            "path": str(scheme.model),
            "adapter": str(scheme.adapter) if scheme.adapter else None,
            "dtype": "fp32",
        },
        "data": [
            {"folder": str(concept), "trigger": world.ZORB, **common},
            {"folder": str(others), "regularization": True, **common},
        ],
        "lora": {"rank": recipe.rank},
        "train": {
            "steps": recipe.steps,
            "batch_size": recipe.batch,
            "regularization_share": recipe.share,
        },
        "optimizer": {"name": "adamw", "lr": recipe.rate},
        "sample": {"every": None},
        "save": {"every": recipe.steps},
    }


def imitation(trained: Path, seed: int, recipe: Recipe, images: tuple[Path, Path], runs: Path) -> dict[str, Any]:
    """A run that gives the LoRA of `direct` its eight steps back."""
    base = config(DIRECT, seed, recipe, images, runs)
    return base | {
        "name": f"imitation-s{seed}",
        "data": [{"folder": str(folder), "resolution": [SIZE]} for folder in images],
        "lora": {"rank": recipe.rank, "init_from": str(trained)},
        "train": {
            "method": "trajectory_imitation",
            "steps": recipe.imitation_steps,
            "batch_size": recipe.batch,
        },
        "teacher": {"guidance": recipe.teacher_guidance},
        "optimizer": {"name": "adamw", "lr": recipe.imitation_rate},
        "save": {"every": recipe.imitation_steps},
    }
