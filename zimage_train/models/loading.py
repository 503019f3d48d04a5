"""Tensors out of safetensors files and into modules: one at a time, strictly, without a second copy."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zimage_train.io.safetensors_format import TensorInfo
from zimage_train.models import arch
from zimage_train.models.locate import native_names

NamedTensors = Iterable[tuple[str, Tensor]]
StoreFn = Callable[[str, Tensor], None]


def stream(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of `tensors` from its mapped file, file by file."""
    for path in sorted({info.file for info in tensors.values()}):
        with safe_open(path, framework="pt") as file:
            for name in sorted(name for name, info in tensors.items() if info.file == path):
                yield name, file.get_tensor(name)


def stream_native(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a single-file checkpoint under diffusers' names, fused ones in their thirds."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            targets = native_names(name)
            tensor = file.get_tensor(name) if targets else None
            for new_name, third in targets:
                assert tensor is not None
                yield new_name, tensor if third is None else tensor.chunk(3, dim=0)[third]


def fill(expected: dict[str, tuple[int, ...]], tensors: NamedTensors, store: StoreFn, where: str, what: str) -> None:
    """Hand each of `tensors` to `store`, which must be exactly those `expected` of a `what`.

    Raises:
        WeightsError: the names or shapes are others; all were looked at.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        found[name] = tuple(tensor.shape)
        if expected.get(name) == found[name]:
            store(name, tensor)
    arch.require_same_shapes(where, found, expected, what)


def load(module: nn.Module, tensors: NamedTensors, where: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put `tensors` into `module`, whose parameters have no storage yet, as frozen `dtype` on `device`.

    Raises:
        WeightsError: the names or shapes are not exactly those of the module.
    """

    def store(name: str, tensor: Tensor) -> None:
        placed = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
        set_parameter(module, name, nn.Parameter(placed, requires_grad=False))

    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    fill(expected, tensors, store, where, type(module).__name__)


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give every parameter of `module` that has no storage yet its own on `device`, filled with nothing."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type == "meta":
            set_parameter(module, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter at dotted `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
