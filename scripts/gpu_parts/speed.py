"""Whole steps of a run beside those of diffusers with peft, in turns: time, ratio, memory."""

from dataclasses import replace
from typing import Any

import torch

from zimage_train.config.lora import LoraSettings
from zimage_train.measure import speed
from zimage_train.measure.peers import diffusers_and_peft
from zimage_train.measure.records import report
from zimage_train.measure.speed import SpeedCase

from gpu_parts import measuring
from gpu_parts.parts import pixels, split

GOALS_MS = {512: 70, 768: 165, 1024: 325}
"""Goal for our step on an H100, by side in px: batch 1, sums in a fixed order, torch alone."""

LOKR_TIMES = 1.15
"""How many times as long as with a LoRA a step with a LoKr is to take at the most."""


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Measure a size, at which our step is to take half the time of the reference."""
    size, batch = split(case)
    device, shape = measuring.device_of(dry), measuring.shape_of(dry)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # as a run does
    lora = LoraSettings(type="lokr") if batch == "lokr" else None
    side = 0 if size == "mixed" else pixels(size)
    batch_size = 1 if lora else int(batch.removeprefix("batch "))
    tested = SpeedCase("mixed epoch", speed.MIXED_SIZES) if size == "mixed" else speed.square(side, batch_size)
    if lora is not None:
        tested = replace(tested, name=f"{tested.name}, LoKr", lora=lora)
    pairs = 1 if dry else speed.PAIRS
    found = speed.compare_steps(shape, "bf16", [tested], device, diffusers_and_peft, 0.5, pairs)
    goal = GOALS_MS.get(side) if batch_size == 1 else None
    if goal is not None and lora is not None:
        goal *= LOKR_TIMES
    result: dict[str, Any] = {"goal_ms": goal}
    return result | {"rows": report(found, device)["measurements"]}
