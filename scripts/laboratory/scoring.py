"""How a trained LoRA is scored: on captions of the concept, on the same in other words, and on all else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from zimage_train import mini

from laboratory.schemes import PARAPHRASES, TRAINED_WORDINGS
from miniature import world
from miniature.drawing import SLOW_SPEED, TURBO_SPEED, Score, Speed, Studio, load, score
from miniature.measuring import scenes

CAPTIONS = 64
SIZE = 64


@dataclass(frozen=True)
class Use:
    """A row of the table: whose LoRA is used on which model, with what else, and how that model is sampled."""

    name: str
    trained: str | None
    """The scheme that the LoRA is of; None: no LoRA."""
    model: Path = mini.TURBO
    also: tuple[Path, ...] = ()
    fast: Speed = TURBO_SPEED
    slow: Speed = SLOW_SPEED
    own: str = "8"
    """At which of the two speeds the concept is counted: the speed that the model is made for."""


BASE_FAST, BASE_SLOW = replace(TURBO_SPEED, shift=6.0), replace(SLOW_SPEED, shift=6.0)
USES = (
    Use("turbo", None),
    Use("direct", "direct"),
    Use("adapter_v1", "adapter_v1"),
    Use("adapter_v2", "adapter_v2"),
    Use("deturbo", "deturbo", mini.DETURBO, own="30"),
    Use("deturbo_on_turbo", "deturbo"),
    Use("base_on_base", "base", mini.BASE, fast=BASE_FAST, slow=BASE_SLOW, own="30"),
    Use("base_on_turbo", "base"),
    Use("imitation", "imitation"),
    Use("distillpatch", "direct", also=(mini.DISTILLPATCH,)),
)


@dataclass(frozen=True)
class Asked:
    """What is drawn for the scores."""

    concept: list[world.Scene]
    paraphrased: list[world.Scene]
    unrelated: list[world.Scene]

    @staticmethod
    def of(count: int = CAPTIONS) -> Asked:
        """Scenes that nothing was trained on; the concept in the wordings of its captions, and in others."""
        found = [world.zorb_scene(seed) for seed in range(2_000_000, 2_000_000 + count)]
        return Asked(in_words(found, TRAINED_WORDINGS), in_words(found, PARAPHRASES), scenes(count))


def in_words(found: list[world.Scene], wordings: tuple[int, ...]) -> list[world.Scene]:
    """The scenes, said in these wordings by turns."""
    return [replace(shown, wording=wordings[number % len(wordings)]) for number, shown in enumerate(found)]


@cache
def studio() -> Studio:
    """The parts that all uses share, loaded once in each process, which has a single thread."""
    torch.set_num_threads(1)
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    return Studio(mini.TURBO)


def evaluate(use: Use, lora: Path | None, seed: int) -> dict[str, float]:
    """All scores of a use with an image seed."""
    asked = Asked.of()
    model = load(use.model / "transformer", *([lora] if lora else []), *use.also)

    def drawn(shown: list[world.Scene], speed: Speed) -> Score:
        captions = [world.caption(scene, SIZE, SIZE) for scene in shown]
        return score(studio().draw(model, captions, seed, speed, SIZE), shown)

    speeds = {"8": use.fast, "30": use.slow}
    unrelated = {name: drawn(asked.unrelated, speed) for name, speed in speeds.items()}
    concept = drawn(asked.concept, speeds[use.own])
    return {
        "concept": concept.concept,
        "concept_paraphrase": drawn(asked.paraphrased, speeds[use.own]).concept,
        "concept_fidelity": concept.fidelity,
        "leakage": unrelated[use.own].concept,
        **{f"fidelity_{name}": result.fidelity for name, result in unrelated.items()},
        **{f"sharpness_{name}": result.sharpness for name, result in unrelated.items()},
        **{f"quality_{name}": result.quality for name, result in unrelated.items()},
    }


def shown(use: Use, lora: Path | None, wanted: list[world.Scene], seed: int) -> np.ndarray:
    """Pictures at the speed that the model is made for."""
    model = load(use.model / "transformer", *([lora] if lora else []), *use.also)
    captions = [world.caption(scene, SIZE, SIZE) for scene in wanted]
    return studio().draw(model, captions, seed, use.fast if use.own == "8" else use.slow, SIZE)
