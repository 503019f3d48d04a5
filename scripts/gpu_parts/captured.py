"""The step of a run, from Python and replayed as a CUDA graph: time, memory, bits, and memory over many steps."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.lora.layers import LoraLayers
from zimage_train.measure.models import random_batch, random_pair, workload_of
from zimage_train.measure.speed import PLENTY
from zimage_train.planning import devices
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan
from zimage_train.training.batches import Batch
from zimage_train.training.step_runner import CudaRecorder, StepRunner

from gpu_parts import measuring
from gpu_parts.parts import SHAPES, pixels, split

STEPS = 300
"""Steps over all `SHAPES`, after which no more memory may be held than after the first tenth."""
STREAMED = 20
"""Blocks that are streamed in the case that says so."""
CONFIG = Config.model_validate({"name": "measured", "data": [{"folder": "nowhere"}]})


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Milliseconds, peaks and equality of bits of both ways at a size, or memory over many steps of ten shapes."""
    device = measuring.device_of(dry)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # as a run does
    with devices.reproducible(device):
        return over_many_steps(dry) if case == "ten shapes" else at_a_size(case, dry)


def at_a_size(case: str, dry: bool) -> dict[str, Any]:
    size, way = split(case)
    device, side = measuring.device_of(dry), pixels(size)
    plan, shape = plan_of(way, side, dry), measuring.shape_of(dry)
    frozen, attached = random_pair(shape, plan, device)
    attached.flat.whole.data.normal_(0, 0.01)  # a new LoRA's B is 0, and so the gradient of its A
    batches = [random_batch(shape, torch.bfloat16, side, side, 48, seed) for seed in (2, 5)]
    eager, eager_answers = of_runner(StepRunner(CONFIG, frozen, attached, plan, None), attached, batches)
    recorder = None if dry else CudaRecorder()
    captured, answers = of_runner(StepRunner(CONFIG, frozen, attached, plan, recorder), attached, batches)
    captured["same_bits"] = all(map(torch.equal, answers, eager_answers))
    return {"eager": eager, "captured": captured}


def of_runner(runner: StepRunner, attached: LoraLayers, batches: list[Batch]) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what the steps of `runner` take, and their gradients on each batch, twice."""
    device = attached.flat.whole.device
    began = time.perf_counter()
    failure = runner.check(batches[0])
    found: dict[str, Any] = {"failure": failure, "check_s": round(time.perf_counter() - began, 2)}
    answers = [gradients(runner, attached.flat.grads, batch) for batch in (*batches, *batches)]
    measuring.forget_peaks()
    found |= measuring.milliseconds(lambda: runner(batches[0], 1.0), device) | measuring.peaks()
    attached.flat.zero_grad()
    runner.forget()
    return found, answers


def over_many_steps(dry: bool) -> dict[str, Any]:
    """Reserved memory after a tenth of the steps and after all of them, and the steps that were replayed."""
    device, shapes = measuring.device_of(dry), [(64, 64, 20), (96, 64, 40)] if dry else SHAPES
    largest = max(width for width, _, _ in shapes)
    plan = plan_of("none", largest, dry)
    frozen, attached = random_pair(measuring.shape_of(dry), plan, device)
    runner = StepRunner(CONFIG, frozen, attached, plan, None if dry else CudaRecorder())
    steps = 20 if dry else STEPS
    reserved = []
    for step in range(steps):
        width, height, tokens = shapes[step % len(shapes)]
        runner(random_batch(measuring.shape_of(dry), torch.bfloat16, width, height, tokens, step), 1.0)
        attached.flat.zero_grad()
        if step + 1 in (steps // 10 * 3, steps):
            reserved.append(0.0 if dry else round(torch.cuda.memory_reserved() / 1e9, 3))
    return {"reserved_gb": reserved, "grows": reserved[1] > 1.001 * reserved[0]}


def plan_of(way: str, side: int, dry: bool) -> MemoryPlan:
    """Return the plan of a run at `side` px: a recompute mode, or w1w3 with streamed blocks."""
    workload = workload_of(measuring.shape_of(dry), side, "bf16", gpu=not dry)
    placement, mode = WeightPlacement(), way
    if way == "streamed":
        placement, mode = replace(placement, streamed=1 if dry else STREAMED), "w1w3"
    return MemoryPlan(workload, placement, {mode: NO_LIMIT}, PLENTY, True, "to be measured")


def gradients(runner: StepRunner, grads: Tensor, batch: Batch) -> Tensor:
    """Return the gradients of a step in main memory: on the GPU they would count as the step's."""
    grads.zero_()
    runner(batch, 1.0)
    return grads.cpu().clone()
