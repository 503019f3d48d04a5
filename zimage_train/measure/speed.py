"""Whole steps of a run beside those of diffusers with peft, in turns in one process.

A step is a batch from main memory, forward, backward, clipping and AdamW. The reference is what the usual training
script does: diffusers' model with peft's LoRA in the model's precision, and torch's AdamW on each of its tensors.
"""

import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from zimage_train.config.schema import Config, OptimizerSettings
from zimage_train.lora import targets
from zimage_train.measure.models import RANK, random_batch, random_pair, random_tensors, workload_of
from zimage_train.measure.records import Measurement
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import velocity
from zimage_train.optim import optimizers
from zimage_train.planning import devices
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan
from zimage_train.training.batches import Batch
from zimage_train.training.step_runner import StepRunner, make_recorder

PAIRS = 7
WARM_UP = 3
"""Steps before the first pair: kernels are compiled, and the step is recorded."""
CAPTION_TOKENS = 48
MAX_NORM = 1.0
PLENTY = 1e12
Step = Callable[[], float]
"""Makes a step, and returns its loss."""


def our_step(shape: TransformerShape, dtype: str, batch: Batch, device: torch.device) -> Step:
    """Return a step as `train` makes it, with a plan in which nothing is recomputed."""
    side = batch.x0.shape[-1] * 8
    workload = workload_of(shape, side, dtype, device.type == "cuda")
    plan = MemoryPlan(workload, WeightPlacement(), {"none": NO_LIMIT}, PLENTY, True, "to be timed")
    frozen, attached = random_pair(shape, plan, device)
    config = Config.model_validate({"name": "timed", "data": [{"folder": "nowhere"}]})
    run_step = StepRunner(config, frozen, attached, plan, make_recorder(config, frozen, device))
    flat = attached.flat
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="adamw"), [flat.whole])

    def step() -> float:
        values = run_step(batch, 1.0)
        norm = torch.linalg.vector_norm(flat.grads)
        loss = torch.cat([values, norm.reshape(1)]).tolist()[0]  # as the loop does, to see whether they are finite
        flat.clip_grads(norm, MAX_NORM)
        optimizer.step()
        flat.zero_grad()
        return loss

    return step


def reference_step(shape: TransformerShape, dtype: str, batch: Batch, device: torch.device) -> Step:
    """Return the same step with diffusers and peft."""
    model = ZImageTransformer2DModel(**shape.config())
    nn.Module.to(model, device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.requires_grad_(False)
    with torch.no_grad():
        for name, tensor in random_tensors(shape, device):
            model.get_parameter(name).copy_(tensor)
    modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules), model)
    trained: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
            parameter.requires_grad_(True)
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step() -> float:
        own = batch.to(device)
        noisy = torch.lerp(own.x0, own.noise, own.sigma.view(-1, 1, 1, 1))
        loss = (velocity(model, noisy, own.sigma, own.prompts) - (own.noise - own.x0)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, MAX_NORM)
        value = torch.stack([loss.detach(), norm.float()]).tolist()[0]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


def compare_steps(
    shape: TransformerShape,
    dtype: str,
    sizes: list[tuple[int, int]],
    device: torch.device,
    bound: float | None = None,
    pairs: int = PAIRS,
) -> list[Measurement]:
    """Return the times of both steps, their ratio and our peaks, for (side in px, batch size) in `sizes`.

    The ratio is the median of that of each pair, so that a machine that gets slower slows both. `bound` is that of the
    ratio.
    """
    found = []
    for side, batch_size in sizes:
        tensor_type = torch.bfloat16 if dtype == "bf16" else torch.float32
        batch = random_batch(shape, tensor_type, side, side, CAPTION_TOKENS, size=batch_size)
        ours, peaks = our_step(shape, dtype, batch, device), [0.0, 0.0]
        with devices.reproducible(device):
            for _ in range(WARM_UP):
                ours()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            with devices.reproducible(device):
                ours()
            peaks = [torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9]
        reference = reference_step(shape, dtype, batch, device)
        for _ in range(WARM_UP):
            reference()
        times: list[tuple[float, float]] = []
        for _ in range(pairs):
            with devices.reproducible(device):
                own = seconds_of(ours, device)
            times.append((own, seconds_of(reference, device)))
        del ours, reference
        gc.collect()  # the model of the next size is to have the memory of this one
        where = f"{side} px, batch {batch_size}"
        ratio = median(own / other for own, other in times)
        found += [
            Measurement(f"ours to diffusers + peft, {where}", round(ratio, 4), "times", bound),
            Measurement(f"our step, {where}", round(median(own for own, _ in times) * 1000, 2), "ms"),
            Measurement(f"step of diffusers + peft, {where}", round(median(o for _, o in times) * 1000, 2), "ms"),
        ]
        if device.type == "cuda":
            found += [
                Measurement(f"our peak, {name}, {where}", round(value, 3), "GB")
                for name, value in zip(("allocated", "reserved"), peaks, strict=True)
            ]
    return found


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a step: on a GPU by its own clock, from before its first kernel to after its last."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def matmul_tflops(device: torch.device, size: int = 8192, times: int = 10) -> float:
    """Return the TFLOP/s of large products in bf16 on a GPU, the ceiling for the arithmetic of a step."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> Tensor:
        return a @ b

    work()
    seconds = median(seconds_of(work, device) for _ in range(times))
    return 2 * size**3 / seconds / 1e12
