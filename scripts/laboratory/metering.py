"""The trainer's drift meter on the laboratory's runs, whose true drift is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from zimage_train import mini
from zimage_train.diffusion import drift
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import arithmetic, lora_file, swap
from zimage_train.models import text_encoder
from zimage_train.models.components import ExtrasPaths

from laboratory.scoring import SIZE, USES
from miniature import world
from miniature.measuring import scenes

PROMPTS, NOISE = 8, 900
CPU = torch.device("cpu")


def silent(done: int, total: int) -> None:
    """Reports nothing."""


def meter(loras: Mapping[str, Mapping[int, Path]], seeds: Sequence[int]) -> dict[str, float]:
    """The deviation of every LoRA that is used on Turbo, by "use, training seed"."""
    prompts = [world.caption(shown, SIZE, SIZE) for shown in scenes()[-PROMPTS:]]
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    embeds = {prompt: encoder.encode(prompt) for prompt in prompts}
    model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model
    recipes = [
        SamplingRequest(
            prompt=prompt, negative="", seed=NOISE + i, width=SIZE, height=SIZE, steps=8, guidance=0.0, shift=3.0
        )
        for i, prompt in enumerate(prompts)
    ]
    walked = drift.record_trajectories(model, recipes, embeds, silent)
    found: dict[str, float] = {}
    for use in USES:
        if use.trained is None or use.model != mini.TURBO:
            continue
        for seed in seeds:
            stack = arithmetic.sum_deltas(
                [(lora_file.read_lora(path), 1.0) for path in (loras[use.trained][seed], *use.also)]
            )
            with swap.with_lora(model, stack):
                found[f"{use.name}, {seed}"] = drift.overall_deviation(drift.deviations(model, walked, embeds, silent))
    return found
