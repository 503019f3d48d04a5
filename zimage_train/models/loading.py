"""Streaming tensors from safetensors files into modules: one at a time, strict, without a second copy in memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zimage_train.io.safetensors_format import TensorInfo
from zimage_train.models import arch
from zimage_train.models.locate import native_names

NamedTensors = Iterable[tuple[str, Tensor]]
StoreFn = Callable[[str, Tensor], None]
ALIGNMENT = 256
"""Every tensor in a buffer starts at a multiple of this many bytes."""


def stream_tensors(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for all of `tensors` from the mapped files, file by file."""
    for path in sorted({info.file for info in tensors.values()}):
        with safe_open(path, framework="pt") as file:
            for name in sorted(name for name, info in tensors.items() if info.file == path):
                yield name, file.get_tensor(name)


def stream_native(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a single-file checkpoint under diffusers' names, with fused q, k and v split."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            targets = native_names(name)
            tensor = file.get_tensor(name) if targets else None
            for new_name, third in targets:
                assert tensor is not None
                yield new_name, tensor if third is None else tensor.chunk(3, dim=0)[third]


def store_tensors(
    expected: dict[str, tuple[int, ...]], tensors: NamedTensors, store: StoreFn, where: str, what: str
) -> None:
    """Call `store` with each of `tensors`, which must have exactly the names and shapes `expected` of a `what`.

    Raises:
        WeightsError: names or shapes differ; lists all differences, after the tensors that fit have been stored.
    """
    actual: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        actual[name] = tuple(tensor.shape)
        if expected.get(name) == actual[name]:
            store(name, tensor)
    arch.require_same_shapes(where, actual, expected, what)


def load_parameters(
    module: nn.Module, tensors: NamedTensors, where: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Load `tensors` into `module`, which is on the meta device, as frozen parameters in `dtype` on `device`.

    Raises:
        WeightsError: the names or shapes are not exactly those of the module.
    """

    def store(name: str, tensor: Tensor) -> None:
        # A copy in any case: the tensor is a view into the mapped file, which must not stay open for it.
        copied = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
        set_parameter(module, name, nn.Parameter(copied, requires_grad=False))

    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    store_tensors(expected, tensors, store, where, type(module).__name__)


def allocate_parameters(module: nn.Module, device: torch.device) -> None:
    """Replace the parameters of `module` that are on the meta device by uninitialised parameters on `device`.

    All of them lie in one buffer. Each in memory of its own would leave gaps that no activation fits.
    """
    missing = {name: parameter for name, parameter in module.named_parameters() if parameter.device.type == "meta"}
    offsets = [0, *accumulate(map(aligned_bytes, missing.values()))]
    buffer = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
    views = typed_views(buffer, list(missing.values()), offsets)
    for name, view in zip(missing, views, strict=True):
        set_parameter(module, name, nn.Parameter(view, requires_grad=False))


def allocate_host_buffer(nbytes: int, pinned: bool) -> Tensor:
    """Allocate CPU memory; pageable, and slower to copy, where the system refuses to pin it (WSL, containers)."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8)


def aligned_bytes(tensor: Tensor) -> int:
    """Return the bytes that `tensor` takes in a buffer."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def typed_views(buffer: Tensor, like: Sequence[Tensor], offsets: Sequence[int]) -> list[Tensor]:
    """Return views into the bytes of `buffer` with the shapes and dtypes of `like`, beginning at `offsets`."""
    views = []
    for tensor, offset in zip(like, offsets, strict=False):
        num_bytes = tensor.numel() * tensor.element_size()
        views.append(buffer[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape))
    return views


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter with the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)
