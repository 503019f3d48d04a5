"""Requirements on the device, its limits for a plan, reproducible kernels, and out-of-memory errors as problems."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from zimage_train.config.types import Quantization
from zimage_train.errors import ConfigError, Location, Problem
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import gpus, memory
from zimage_train.planning.gpus import FP8_CAPABILITY, DeviceLimits


def require_device(
    device: torch.device, shape: TransformerShape, dtype: str, quantize: Quantization | Literal["auto"] | None = None
) -> None:
    """Require that `device` can train the model, before anything is downloaded or encoded for it.

    Raises:
        ConfigError: there is no GPU and the model needs it, or the GPU does not have what `dtype` or `quantize` needs.
    """
    parameters = memory.parameters_of(shape)
    if device.type == "cpu" and parameters > memory.MAX_CPU_PARAMETERS:
        message = f"no GPU was found, and {parameters / 1e9:.1f} billion parameters would take weeks on the CPU"
        hint = "check the driver with nvidia-smi, and that torch is a CUDA build"
        raise ConfigError(Problem("device", message, hint, "no-gpu"))
    # False: without emulation, which would pass on older cards and be far too slow.
    if device.type == "cuda" and dtype == "bf16" and not torch.cuda.is_bf16_supported(False):
        message = f"{torch.cuda.get_device_name()} has no bf16"
        hint = "an RTX 30 series card or newer is needed"
        raise ConfigError(Problem(Location(key="model.dtype"), message, hint, "unsupported-gpu"))
    if device.type == "cuda" and quantize == "fp8_fast":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            message = f"is fp8_fast, and {torch.cuda.get_device_name()} has no fp8 arithmetic"
            hint = "set int8, which is more exact at the same size, or take an RTX 40 series card or newer"
            raise ConfigError(Problem(Location(key="model.quantize"), message, hint, "unsupported-gpu"))


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make a step give the same bits each time within the block, on a GPU as on a CPU.

    By default the backward of attention adds partial results in the order in which they are ready, so that gradients
    of equal steps differ by 1e-3 of their norm. The kernel of the forward must match that of the backward, so whole
    steps belong in the block. It costs 7 % of the time at 512 px and 20 % at 1024 px (docs/bench/repeat.json).
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    fill_before = settings.fill_uninitialized_memory
    # Deterministic mode would fill every empty tensor with NaN, a pass over all memory that is allocated.
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill_before
        torch.use_deterministic_algorithms(was_deterministic)


def device_limits(device: torch.device) -> DeviceLimits:
    """Return the limits for a plan: the total memory of the GPU less a reserve, or all main memory on a CPU.

    What is free at the moment does not count, so that a resumed run gets the same plan.
    """
    if device.type != "cuda":
        return DeviceLimits("cpu", main_memory_bytes(), None)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(properties.name, gpus.usable_bytes(properties.total_memory), gpus.find_gpu(properties.name))


def retry_limit_bytes(device: torch.device) -> int:
    """Return the bytes to plan for after the GPU ran out of memory: nine tenths of its memory; 0 on a CPU."""
    # Less than `usable_bytes`, because the prediction has turned out to be too low.
    return int(torch.cuda.get_device_properties(device).total_memory * 0.9) if device.type == "cuda" else 0


def peak_gpu_gb(device: torch.device) -> float | None:
    """Return the peak of this process's GPU memory, GB, or None without a GPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)


@contextlib.contextmanager
def explained_out_of_memory(hint: str) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU within the block into a problem with `hint`.

    Raises:
        ConfigError: the GPU ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak_gb = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        first_sentence = str(error).partition(". ")[0]
        message = f"{first_sentence}; {peak_gb:.1f} GB were in use at most"
        raise ConfigError(Problem("memory", message, hint, "out-of-memory")) from error
