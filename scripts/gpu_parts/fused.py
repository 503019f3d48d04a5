"""The product's step with fused blocks, beside the same step with diffusers' blocks: time, memory and distance."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.measure.models import random_batch, random_pair, workload_of
from zimage_train.measure.speed import CAPTION_TOKENS, PLENTY
from zimage_train.models import region_ops
from zimage_train.planning import devices
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan
from zimage_train.training.step_runner import StepRunner

from gpu_parts import measuring
from gpu_parts.parts import pixels, split

CONFIG = Config.model_validate({"name": "measured", "data": [{"folder": "nowhere"}]})


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Milliseconds and peaks of both, and how far loss and gradients of fused blocks are from those of modules."""
    size, mode = split(case)
    device, shape, side = measuring.device_of(dry), measuring.shape_of(dry), pixels(size)
    workload = workload_of(shape, side, "bf16", gpu=not dry)
    plan = MemoryPlan(workload, WeightPlacement(), {mode: NO_LIMIT}, PLENTY, True, "to be compared")
    frozen, attached = random_pair(shape, plan, device)
    attached.flat.whole.data.normal_(0, 0.01)  # a new LoRA's B is 0, and so the gradient of its A
    runner = StepRunner(CONFIG, frozen, attached, plan, None)
    batch = random_batch(shape, torch.bfloat16, side, side, CAPTION_TOKENS)

    def step() -> Tensor:
        attached.flat.zero_grad()
        return runner(batch, 1.0).clone()

    found: dict[str, Any] = {"has_kernels": region_ops.has_kernels(device)}
    answers = {}
    with devices.reproducible(device):
        for name, is_fused in (("modules", False), ("fused", True)):
            runner.use_plan(replace(plan, workload=replace(workload, is_fused=is_fused)))
            step()
            measuring.forget_peaks()
            answers[name] = (step(), attached.flat.grads.clone())
            again = (step(), attached.flat.grads)
            same = all(bool((one == other).all()) for one, other in zip(answers[name], again, strict=True))
            found[name] = measuring.milliseconds(step, device) | measuring.peaks() | {"same_bits": same}
    for index, part in enumerate(("loss", "gradients")):
        found[f"{part}_off"] = measuring.distance(answers["fused"][index], answers["modules"][index])
    return found
