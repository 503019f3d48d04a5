"""Whether the same step gives the same gradients each time, and what that costs."""

import contextlib
from statistics import median
from typing import Any

import torch
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.measure.models import random_batch, random_pair
from zimage_train.measure.speed import CAPTION_TOKENS, plan_without_limits, seconds_of
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import devices
from zimage_train.training.step_runner import StepRunner


def repeat_step(shape: TransformerShape, side: int, dtype: str, times: int, device: torch.device) -> dict[str, Any]:
    """Return whether gradients are equal, how far apart, and the seconds: with torch's defaults, and as in a run."""
    plan = plan_without_limits(shape, side, dtype, device.type == "cuda")
    frozen, attached = random_pair(shape, plan, device)
    with torch.no_grad():
        attached.flat.whole.fill_(0.01)  # a new LoRA's B is 0, and so the gradient of its A
    config = Config.model_validate({"name": "repeated", "data": [{"folder": "nowhere"}]})
    runner = StepRunner(config, frozen, attached, plan, None)
    batch = random_batch(shape, torch.bfloat16 if dtype == "bf16" else torch.float32, side, side, CAPTION_TOKENS)
    found: dict[str, Any] = {}
    for name, how in (
        ("as torch does it", contextlib.nullcontext()),
        ("as a run", devices.reproducible(device)),
    ):
        with how:
            grads: list[Tensor] = []
            seconds: list[float] = []
            for _ in range(max(times, 2)):
                seconds.append(seconds_of(lambda: runner(batch, 1.0), device))
                grads.append(attached.flat.grads.clone())
                attached.flat.zero_grad()
        off = max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
        equal = all(torch.equal(grad, grads[0]) for grad in grads[1:])
        found[name] = {"equal": equal, "off": off, "seconds": round(median(seconds[1:]), 4)}
    return found
