"""Workloads of the full model, to plan for."""

from collections import Counter
from dataclasses import replace

from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import targets
from zimage_train.planning.workload import Workload

from steps import FULL

MODULES = targets.select_modules(["attention", "feed_forward"], FULL.linears)
CAPTION = 64
"""Tokens."""


def recipe(side: int, guidance: float = 0.0) -> SamplingRequest:
    return SamplingRequest(
        prompt="x" * 100, negative="", seed=1, width=side, height=side, steps=8, guidance=guidance, shift=3.0
    )


def workload(sides: tuple[int, ...] = (1024,), **changes) -> Workload:
    trained = 16 * sum(sum(FULL.linears[module]) for module in MODULES)
    sizes = Counter({Bucket(side, side): 10 for side in sides})
    made = Workload(FULL, "bf16", trained, "adamw8bit", sizes, 1, CAPTION, (recipe(1024),), gpu=True)
    return replace(made, **changes)
