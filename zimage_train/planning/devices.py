"""What the GPU, or the lack of one, allows; and what to say when its memory runs out."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from zimage_train.errors import ConfigError, Location, Problem
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import gpus, memory
from zimage_train.planning.gpus import DeviceLimits


def require_device(device: torch.device, shape: TransformerShape, dtype: str) -> None:
    """Refuse what `device` cannot do, before anything is downloaded, read or encoded for it.

    Raises:
        ConfigError: no GPU for a model that needs one, or one without bf16.
    """
    parameters = memory.parameters_of(shape)
    if device.type == "cpu" and parameters > memory.MAX_CPU_PARAMETERS:
        what = f"no GPU was found, and {parameters / 1e9:.1f} billion parameters would take weeks without one"
        raise ConfigError(
            Problem("device", what, "check the driver with nvidia-smi, and that torch is a CUDA build", "no-gpu")
        )
    if device.type == "cuda" and dtype == "bf16" and not torch.cuda.is_bf16_supported(False):
        what = f"{torch.cuda.get_device_name()} has no bf16"
        raise ConfigError(
            Problem(Location(key="model.dtype"), what, "an RTX 30 series card or newer is needed", "unsupported-gpu")
        )


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Within the block the same step gives the same bits, on a GPU too.

    Left to itself, attention's backward adds up as results come: each time another gradient, by 1e-3 of its norm.
    Forward and backward have to agree on the kernel, so this is for whole steps.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # it would cost a pass over all that is allocated
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before[1]
        torch.use_deterministic_algorithms(before[0])


def device_limits(device: torch.device) -> DeviceLimits:
    """What a plan for `device` goes by: its total memory but for a reserve, never what happens to be free."""
    if device.type != "cuda":
        return DeviceLimits("cpu", main_memory_bytes(), None)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(properties.name, gpus.usable_bytes(properties.total_memory), gpus.find_gpu(properties.name))


def available_bytes(device: torch.device) -> int:
    """Nine tenths of a GPU's memory: what a plan may be predicted to take after one that was too large; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory * 0.9) if device.type == "cuda" else 0


@contextlib.contextmanager
def explained_out_of_memory(todo: str) -> Iterator[None]:
    """Turn the GPU's running out of memory within the block into one line that ends with `todo`.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        held = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        first = str(error).partition(". ")[0]
        raise ConfigError(
            Problem("memory", f"{first}; {held:.1f} GB were in use at most", todo, "out-of-memory")
        ) from error
