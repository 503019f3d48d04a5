"""Streaming tensors from safetensors files into modules: one at a time, strict, without a second copy in memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zimage_train.errors import Problem, WeightsError
from zimage_train.models import arch
from zimage_train.models.stored_weights import FLOAT8, StoredWeight, scale_counts

NamedTensors = Iterable[tuple[str, Tensor]]
StoreFn = Callable[[str, Tensor], None]
ALIGNMENT = 256
"""Every tensor in a buffer starts at a multiple of this many bytes."""


class WeightReader:
    """Reads weights from mapped files, which stay open until the end of its `with` block."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, weight: StoredWeight) -> Tensor:
        """Return a weight as it is stored; if that is in 8 bits, in fp32, multiplied by its scale.

        The product is not rounded to the precision of the model, so that whatever is added comes before that.

        Raises:
            WeightsError: its scale is negative or not finite.
        """
        if weight.third is None:
            stored = self._file(weight.info.file).get_tensor(weight.info.name)
        else:
            stored = self._file(weight.info.file).get_slice(weight.info.name)[weight.rows]
        if weight.scale is None:
            return stored.float() if weight.dtype in FLOAT8 else stored
        scale = self._file(weight.scale.file).get_tensor(weight.scale.name)
        return _scaled(stored, scale, weight)

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path]


def _scaled(stored: Tensor, scale: Tensor, weight: StoredWeight) -> Tensor:
    """Return the fp32 product of numbers, which are some rows of a tensor, and the scales of all of it.

    Raises:
        WeightsError: a scale is negative or not finite.
    """
    counts = scale_counts(weight.info.shape, tuple(scale.shape))
    assert counts is not None
    if not scale.float().isfinite().all() or (scale.float() < 0).any():
        what = f"{weight.info.name} has scales that are negative or not finite, such as {scale.float().min():g}"
        raise WeightsError(Problem(str(weight.info.file), what, "get the file again", "not-finite"))
    # A row of scales for each row of numbers: a third of a fused tensor may begin within a block.
    scales = scale.float().reshape(counts[0], -1).repeat_interleave(weight.info.shape[0] // counts[0], dim=0)
    scales = scales[weight.rows].unsqueeze(-1)
    blocks = stored.float().reshape(len(scales), scales.shape[1], -1)
    return (blocks * scales).reshape(stored.shape)


def stream_tensors(weights: Mapping[str, StoredWeight]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for all of `weights` from the mapped files, file by file."""
    for path in sorted({weight.info.file for weight in weights.values()}):
        here = {name: weight for name, weight in weights.items() if weight.info.file == path}
        with WeightReader() as reader:
            # Neighbours in the file follow each other, and so do the thirds of a fused tensor.
            for name in sorted(here, key=lambda name: (here[name].info.name, here[name].third or 0)):
                yield name, reader.read(here[name])


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
