"""The product's step with fused blocks, beside the same step with diffusers' blocks: time, memory and distance."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from zimage_train.measure.models import random_pair, workload_of
from zimage_train.models import region_ops
from zimage_train.planning import devices
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan
from zimage_train.training.device_plan import apply_recompute_plan

import bench
from gpu_parts import measuring
from gpu_parts.parts import pixels, split


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Milliseconds and peaks of both, and how far loss and gradients of fused blocks are from those of modules."""
    size, mode = split(case)
    device, shape = measuring.device_of(dry), measuring.shape_of(dry)
    workload = workload_of(shape, pixels(size), "bf16", gpu=not dry)
    plan = MemoryPlan(workload, WeightPlacement(), {mode: NO_LIMIT}, bench.PLENTY, True, "to be compared")
    frozen, attached = random_pair(shape, plan, device)
    attached.flat.whole.data.normal_(0, 0.01)  # a new LoRA's B is 0, and so the gradient of its A
    inputs = bench.inputs_of(frozen, workload.caption_tokens, pixels(size))

    def step() -> Tensor:
        attached.flat.zero_grad()
        loss = bench.loss_on(frozen, inputs)
        loss.backward()
        return loss.detach()

    found: dict[str, Any] = {"has_kernels": region_ops.has_kernels(device)}
    answers = {}
    with devices.reproducible(device):
        for name, is_fused in (("modules", False), ("fused", True)):
            apply_recompute_plan(frozen, attached, replace(plan, workload=replace(workload, is_fused=is_fused)), 0.0)
            step()
            measuring.forget_peaks()
            answers[name] = (step(), attached.flat.grads.clone())
            again = (step(), attached.flat.grads)
            same = all(bool((one == other).all()) for one, other in zip(answers[name], again, strict=True))
            found[name] = measuring.milliseconds(step, device) | measuring.peaks() | {"same_bits": same}
    for index, part in enumerate(("loss", "gradients")):
        found[f"{part}_off"] = measuring.distance(answers["fused"][index], answers["modules"][index])
    return found
