"""Whole steps of a run beside those of another trainer, in turns in one process.

A step is a batch from main memory, forward, backward, clipping and AdamW. The usual other is what most training scripts
do: diffusers' model with peft's LoRA in the model's precision, and torch's AdamW on each of its tensors.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.config.optimizers import OptimizerSettings
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.measure.models import random_batch, random_pair, workload_of
from zimage_train.measure.peers import Peer
from zimage_train.measure.records import Measurement
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import PaddedPrompt
from zimage_train.optim import optimizers
from zimage_train.planning import devices, flops
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan
from zimage_train.training.batches import Batch
from zimage_train.training.step_runner import StepRunner, make_recorder

PAIRS = 7
WARM_UP = 3
"""Steps of each shape before the first pair: kernels are compiled, and the step is recorded."""
CAPTION_TOKENS = 48
MAX_NORM = 1.0
PLENTY = 1e12
Step = Callable[[Batch], float]
"""Makes a step on a batch, and returns its loss."""
MakePeer = Callable[[TransformerShape, torch.dtype, torch.device], Peer]


@dataclass(frozen=True)
class SpeedCase:
    """What is timed: a batch of each of some sizes, one after the other."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    """Width and height, px."""
    batch_size: int = 1
    lora: LoraSettings | None = None
    """What our step trains; None: a LoRA, as the other does."""


MIXED_SIZES = ((1024, 1024), (832, 1216), (768, 768), (640, 896), (512, 512), (448, 576))
"""Sizes of an epoch with three resolutions and some aspect ratios."""


def square(side: int, batch_size: int) -> SpeedCase:
    return SpeedCase(f"{side} px, batch {batch_size}", ((side, side),), batch_size)


def plan_without_limits(shape: TransformerShape, side: int, dtype: str, gpu: bool) -> MemoryPlan:
    """Return a plan in which nothing is recomputed, quantised or streamed."""
    workload = workload_of(shape, side, dtype, gpu)
    return MemoryPlan(workload, WeightPlacement(), {"none": NO_LIMIT}, PLENTY, True, "to be timed")


def our_step(shape: TransformerShape, plan: MemoryPlan, device: torch.device, lora: LoraSettings | None = None) -> Step:
    """Return a step as `train` makes it by `plan`, on a model of random weights."""
    frozen, attached = random_pair(shape, plan, device, lora)
    config = Config.model_validate({"name": "timed", "data": [{"folder": "nowhere"}]})
    run_step = StepRunner(config, frozen, attached, plan, make_recorder(config, frozen, device))
    flat = attached.flat
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="adamw"), [flat.whole])

    def step(batch: Batch) -> float:
        values = run_step(batch, 1.0)
        norm = torch.linalg.vector_norm(flat.grads)
        loss = torch.cat([values, norm.reshape(1)]).tolist()[0]  # as the loop does, to see whether they are finite
        flat.clip_grads(norm, MAX_NORM)
        optimizer.step()
        flat.zero_grad()
        return loss

    return step


def peer_step(peer: Peer, device: torch.device) -> Step:
    """Return the same step with the model and the LoRA of another trainer."""
    optimizer = torch.optim.AdamW(peer.trained, lr=1e-4)
    dtype = next(peer.model.parameters()).dtype

    def step(batch: Batch) -> float:
        prompts = [without_padding(prompt).to(device, dtype) for prompt in batch.prompts]
        own = batch.to(device)
        noisy = torch.lerp(own.x0, own.noise, own.sigma.view(-1, 1, 1, 1))
        with peer.precision():
            velocity = peer.predict(noisy, own.sigma, prompts)
        loss = (velocity.float() - (own.noise - own.x0)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(peer.trained, MAX_NORM)
        value = torch.stack([loss.detach(), norm.float()]).tolist()[0]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


def without_padding(prompt: Tensor | PaddedPrompt) -> Tensor:
    """Return the embeddings of a prompt in main memory as a trainer caches them."""
    return prompt.embeds[~prompt.is_padding] if isinstance(prompt, PaddedPrompt) else prompt


@dataclass(frozen=True)
class StepTimes:
    """Times of one case: of our steps, and of those of another trainer in turns with them."""

    own: list[float]
    """Seconds of all batches of the case, each time."""
    other: list[float]
    """Those of the other at the same time; empty without another."""
    operations: float
    """Of all batches, in ours."""
    first_losses: tuple[float, ...]
    """Ours, and the other's if there is one."""
    peaks: dict[str, float]
    """Ours, GB; empty without a GPU."""
    peer: str = ""
    """Name of the other."""

    @property
    def ratio(self) -> float:
        """Return the median ratio of ours to the other's, pair by pair: a machine that slows down slows both."""
        return median(own / theirs for own, theirs in zip(self.own, self.other, strict=True))

    @property
    def tflops(self) -> float:
        return self.operations / median(self.own) / 1e12


def compare_steps(
    shape: TransformerShape,
    dtype: str,
    cases: list[SpeedCase],
    device: torch.device,
    make_peer: MakePeer,
    bound: float | None = None,
    pairs: int = PAIRS,
) -> list[Measurement]:
    """Return the times of both steps in each of `cases`, their ratio, both first losses and our peaks.

    `bound` is that of the ratio.
    """
    found: list[Measurement] = []
    for case in cases:
        largest = max(width for width, _ in case.sizes)
        plan = plan_without_limits(shape, largest, dtype, device.type == "cuda")
        times = time_steps(shape, plan, case, device, make_peer, pairs)
        apart = round(abs(times.first_losses[0] / times.first_losses[1] - 1), 6)
        found += [
            Measurement(f"ours to {times.peer}, {case.name}", round(times.ratio, 4), "times", bound),
            Measurement(f"our step, {case.name}", _ms(times.own), "ms"),
            Measurement(f"step of {times.peer}, {case.name}", _ms(times.other), "ms"),
            Measurement(f"arithmetic of our step, {case.name}", round(times.tflops, 3), "TFLOP/s"),
            Measurement(f"first losses apart, {case.name}", apart, "of the loss"),
        ]
        found += [Measurement(f"our peak, {name}, {case.name}", value, "GB") for name, value in times.peaks.items()]
    return found


def time_steps(
    shape: TransformerShape,
    plan: MemoryPlan,
    case: SpeedCase,
    device: torch.device,
    make_peer: MakePeer | None,
    pairs: int = PAIRS,
) -> StepTimes:
    """Time our steps by `plan`, in turns with those of another trainer if there is one."""
    gc.collect()  # the models of an earlier case leave their memory to these
    tensor_type = torch.bfloat16 if plan.workload.dtype == "bf16" else torch.float32
    batches = []
    for number, (width, height) in enumerate(case.sizes):
        batches.append(
            random_batch(shape, tensor_type, width, height, CAPTION_TOKENS, 2 + number, size=case.batch_size)
        )
    ours = our_step(shape, plan, device, case.lora)
    with devices.reproducible(device):
        losses = [ours(batches[0])]
        run_epochs(ours, batches, WARM_UP)
        with peak_memory(device) as peaks:
            run_epochs(ours, batches, 1)
    other: Step | None = None
    peer = make_peer(shape, tensor_type, device) if make_peer is not None else None
    if peer is not None:
        other = peer_step(peer, device)
        losses.append(other(batches[0]))
        run_epochs(other, batches, WARM_UP)
    own_seconds: list[float] = []
    other_seconds: list[float] = []
    for _ in range(pairs):
        with devices.reproducible(device):
            own_seconds.append(seconds_of(lambda: run_epochs(ours, batches, 1), device))
        if other is not None:
            other_seconds.append(seconds_of(partial(run_epochs, other, batches, 1), device))
    operations = 0.0
    for width, height in case.sizes:
        operations += case.batch_size * flops.step_flops(shape, Bucket(width, height), "none")
    name = peer.name if peer is not None else ""
    return StepTimes(own_seconds, other_seconds, operations, tuple(losses), peaks, name)


def run_epochs(step: Step, batches: list[Batch], times: int) -> None:
    for _ in range(times):
        for batch in batches:
            step(batch)


def _ms(seconds: list[float]) -> float:
    return round(median(seconds) * 1000, 2)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill the dict with the peaks of allocated and reserved memory within the block, GB; empty without a GPU."""
    peaks: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield peaks
    if device.type == "cuda":
        peaks["allocated"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        peaks["reserved"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of `work`: on a GPU by its own clock, from before its first kernel to after its last."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def matmul_tflops(
    device: torch.device, size: int = 8192, times: int = 10, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Return the TFLOP/s of large products, the ceiling for the arithmetic of a step in `dtype`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def work() -> Tensor:
        return a @ b

    work()
    seconds = median(seconds_of(work, device) for _ in range(times))
    return 2 * size**3 / seconds / 1e12
