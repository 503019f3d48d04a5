"""Two LoRAs at once on the miniature: a held-out shape, and a frame around the picture, each learnt by its own LoRA.

They are drawn together as a plain sum, as several merges of the two, and with the second trained beside the first.
Every picture is read by program. A sum is judged by the prompts of the one concept, of the other, and of both at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zimage_train import mini
from zimage_train.lora import arithmetic, blending, lora_file
from zimage_train.lora.deltas import Factors

from laboratory.running import lora_of, train
from laboratory.schemes import CONCEPT_IMAGES, FIRST_IMAGE, SIZE, TRAINED_WORDINGS
from laboratory.scoring import studio
from miniature import scores, world
from miniature.drawing import TURBO_SPEED, load

FRAMED = "framed"
FRAME_WIDTH, FRAME_COLOUR = 8, "purple"
"""The frame is as wide as a cell of the latents. No scene has a ground of its colour."""
LEAST_FRAME = 0.7
"""Share of the outer pixels that have the frame's colour, where a frame is seen."""
WORLD_IMAGES = 128
FIRST_ASKED = 2_000_000


@dataclass(frozen=True)
class PairRecipe:
    """The settings of each of the runs."""

    steps: int = 600
    batch: int = 8
    rate: float = 4e-3
    rank: int = 8


@dataclass(frozen=True)
class Asked:
    """A scene, and whether a frame goes around it."""

    scene: world.Scene
    framed: bool

    @property
    def caption(self) -> str:
        """The prompt of a picture of it."""
        return (
            f"{FRAMED}, {world.caption(self.scene, SIZE, SIZE)}"
            if self.framed
            else world.caption(self.scene, SIZE, SIZE)
        )

    def drawn(self) -> np.ndarray:
        """Return the picture as the world has it."""
        image = world.draw(self.scene, SIZE, SIZE).copy()
        if self.framed:
            image[_border(FRAME_WIDTH)] = world.COLOURS[FRAME_COLOUR]
        return image


def asked(first: int, count: int, shape: str | None, framed: bool) -> list[Asked]:
    """Return scenes with a zorb or another shape, with or without a frame, in the wordings of training."""
    scene = world.zorb_scene if shape == world.ZORB else world.world_scene
    found: list[Asked] = []
    number = first
    while len(found) < count:
        shown = scene(number)
        number += 1
        if shown.ground != FRAME_COLOUR:
            wording = TRAINED_WORDINGS[len(found) % len(TRAINED_WORDINGS)]
            # A frame covers what is near the border.
            place = {"column": 1, "row": 1} if framed else {}
            found.append(Asked(replace(shown, wording=wording, called=None, **place), framed))
    return found


def _border(width: int) -> np.ndarray:
    inside = np.zeros((SIZE, SIZE), bool)
    inside[width : SIZE - width, width : SIZE - width] = True
    return ~inside


def look(image: np.ndarray) -> tuple[scores.Seen, bool]:
    """Return the content of a picture, and whether it has a frame, which is taken off before the rest is read."""
    smooth = scores.box(image.astype(np.float32))
    outer = [scores.NAMES[index] for index in scores.nearest(smooth[_border(FRAME_WIDTH - 3)])]
    framed = sum(name == FRAME_COLOUR for name in outer) >= LEAST_FRAME * len(outer)
    if framed:
        ring = _border(FRAME_WIDTH + 6) & ~_border(FRAME_WIDTH + 2)
        image = image.copy()
        image[_border(FRAME_WIDTH + 1)] = np.median(image[ring], 0).astype(np.uint8)
    return scores.look(image), framed


def write_pair(folder: Path) -> dict[str, Path]:
    """Write the images of both concepts and of the world, each with its caption; return their folders."""
    places: dict[str, Path] = {}
    for name, shape, framed, count in (
        (world.ZORB, world.ZORB, False, CONCEPT_IMAGES),
        (FRAMED, None, True, CONCEPT_IMAGES),
        ("world", None, False, WORLD_IMAGES),
    ):
        place = places[name] = folder / name
        place.mkdir(parents=True, exist_ok=True)
        first = FIRST_IMAGE + 10_000 * len(places)
        for number, wanted in enumerate(asked(first, count, shape, framed)):
            Image.fromarray(wanted.drawn()).save(place / f"{number:03d}.png")
            (place / f"{number:03d}.txt").write_text(wanted.caption + "\n")
    return places


def pair_config(
    concept: str,
    seed: int,
    recipe: PairRecipe,
    places: dict[str, Path],
    runs: Path,
    beside: Path | None = None,
    keeps: str | None = None,
) -> dict[str, Any]:
    """Return the config of a run of `concept`, beside the LoRA of the other concept if it is given.

    Args:
        keeps: a concept whose images are regularization towards the prediction without the new LoRA.
    """
    common = {"resolution": [SIZE]}
    train: dict[str, Any] = {"steps": recipe.steps, "batch_size": recipe.batch}
    data: list[dict[str, Any]] = [
        {"folder": str(places[concept]), "trigger": concept, **common},
        {"folder": str(places["world"]), "regularization": True, **common},
    ]
    name = concept
    if beside is not None:
        train["beside"] = [f"{beside}=1"]
        name += "-beside"
    if keeps is not None:
        data.append({"folder": str(places[keeps]), "regularization": "prior", "repeats": 3, **common})
        name += "-keeping"
    return {
        "name": f"{name}-s{seed}",
        "output_dir": str(runs),
        "seed": seed,
        "model": {"variant": "turbo", "path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V2), "dtype": "fp32"},
        "data": data,
        "lora": {"rank": recipe.rank},
        "train": train,
        "optimizer": {"name": "adamw", "lr": recipe.rate},
        "sample": {"every": None},
        "save": {"every": recipe.steps, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }


def judge(loras: list[Path], image_seed: int, count: int = 64) -> dict[str, float]:
    """Return the shares of pictures that show each concept, drawn with `loras` together.

    `zorb` and `framed`: of the prompts of a single concept, those that show it and not the other one, where `framed`
    asks for a frame around any shape; `both`: of the prompts of both, those that show both; `quality`: of prompts of
    neither, fidelity times sharpness.
    """
    model = load(mini.TURBO / "transformer", *loras)

    def seen(wanted: list[Asked]) -> list[tuple[scores.Seen, bool]]:
        captions = [one.caption for one in wanted]
        return [look(image) for image in studio().draw(model, captions, image_seed, TURBO_SPEED, SIZE)]

    zorbs = seen(asked(FIRST_ASKED, count, world.ZORB, False))
    frames = seen(asked(FIRST_ASKED, count, None, True))
    both = seen(asked(FIRST_ASKED, count, world.ZORB, True))
    others = asked(FIRST_ASKED + 50_000, count, None, False)
    found = [one for one, _ in seen(others)]
    fidelity = _mean([scores.fidelity(one, wanted.scene) for one, wanted in zip(found, others, strict=True)])
    return {
        "zorb": _mean([one.shape == world.ZORB and not framed for one, framed in zorbs]),
        "framed": _mean([framed and one.shape != world.ZORB for one, framed in frames]),
        "both": _mean([one.shape == world.ZORB and framed for one, framed in both]),
        "quality": fidelity * _mean([one.sharpness for one in found]),
    }


MERGES = (
    "sum",
    "0.8 each",
    "0.6 each",
    "TIES",
    "DARE",
    "regression",
    "without shared outputs",
    "without shared inputs",
)
"""Ways to make one change of two. In the last three, with A and B the factors of both: the change that is nearest to
each on what it reads; the sum less what each writes, or reads, within the other's space."""
TRAININGS = ("beside", "beside, with images of the first", "with images of the first")
"""Ways to train the second: with the first in place, or with its images as regularization towards the prediction."""
SEEDS, IMAGE_SEED = (1, 2, 3), 11


def compare_pairs(place: Path) -> dict[str, Any]:
    """Return the scores of both LoRAs at once, for each way to put them together, as mean and spread of seeds."""
    recipe, places, runs = PairRecipe(), write_pair(place / "pictures"), place / "runs"
    torch.set_num_threads(1)
    scores_by_way: dict[str, list[dict[str, float]]] = {}

    def score(way: str, loras: list[Path]) -> None:
        scores_by_way.setdefault(way, []).append(judge(loras, IMAGE_SEED))
        print(way, {name: round(value, 3) for name, value in scores_by_way[way][-1].items()}, flush=True)

    def trained(concept: str, seed: int, **changes: Any) -> Path:
        config = pair_config(concept, seed, recipe, places, runs, **changes)
        train(config)
        return lora_of(config)

    for seed in SEEDS:
        zorb, framed = trained(world.ZORB, seed), trained(FRAMED, seed)
        score("the first alone", [zorb])
        score("the second alone", [framed])
        for way in MERGES:
            merged = place / "merged.safetensors"
            lora_file.export_lora(merged, merged_by(way, zorb, framed), "fp32", {"format": "pt"})
            score(way, [merged])
        for way, changes in zip(
            TRAININGS, ({"beside": zorb}, {"beside": zorb, "keeps": world.ZORB}, {"keeps": world.ZORB}), strict=True
        ):
            score(way, [zorb, trained(FRAMED, seed, **changes)])
    table: dict[str, Any] = {}
    for way, measured in scores_by_way.items():
        table[way] = {}
        for name in measured[0]:
            values = [row[name] for row in measured]
            table[way][name] = [round(fmean(values), 3), round(stdev(values), 3)]
    return {"recipe": asdict(recipe), "seeds": len(SEEDS), "ways": table}


@torch.no_grad()
def merged_by(way: str, first: Path, second: Path) -> dict[str, Factors]:
    """Return both LoRAs as one, which has the dense change of `way` for each module."""
    ours, theirs = lora_file.read_lora(first), lora_file.read_lora(second)
    found: dict[str, Factors] = {}
    for module, factors in ours.items():
        dense = _merged(way, factors, theirs[module], module)
        found[module] = arithmetic.factorize(dense.float(), min(dense.shape), 1.0, module)[0]
    return found


def _merged(way: str, ours: Factors, theirs: Factors, module: str) -> Tensor:
    a, b = ours.delta().double(), theirs.delta().double()
    if way in ("TIES", "DARE"):
        method = "ties" if way == "TIES" else "dare_linear"
        return blending.blend_deltas(method, [a.float(), b.float()], [1.0, 1.0], 0.5, 42, module)
    if way.endswith(" each"):
        return float(way.removesuffix(" each")) * (a + b)
    if way == "sum":
        return a + b
    out_a, in_a = _projections(a, ours.rank)
    out_b, in_b = _projections(b, theirs.rank)
    if way == "without shared outputs":
        return a + b - out_a @ b - out_b @ a
    if way == "without shared inputs":
        return a + b - b @ in_a - a @ in_b
    return (a @ in_a + b @ in_b) @ torch.linalg.pinv(in_a + in_b, rtol=1e-6)


def _projections(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the projections on the space that a change writes to, and on that which it reads."""
    u, _, v = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] @ u[:, :rank].T, v[:rank].T @ v[:rank]


def _mean(values: list[float]) -> float:
    return sum(map(float, values)) / len(values)
