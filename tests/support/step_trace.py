"""The allocations of training steps of the full model, recorded on the meta device and replayed in a model of CUDA's.

The format of the events is that of tests/planning/traces: a positive number allocates that many bytes, and a negative
number -k frees the k-th latest allocation.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from allocator import Allocator, Block
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zimage_train.measure.counting import (
    ATTENTION_BACKWARD,
    CAPTION_TOKENS,
    attention_scratch,
    flash_attention,
    our_model,
)
from zimage_train.models import linear, region_ops
from zimage_train.models.arch import TransformerShape
from zimage_train.models.linear import FrozenLinear
from zimage_train.models.transformer import velocity


class Events(TorchDispatchMode):
    """Records allocations and frees of the storages that operations return."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: list[int] = []
        self._made = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear.frozen_linear:
            with self:
                return linear.frozen_linear_kernels(*args)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        if func is ATTENTION_BACKWARD:
            for num_bytes in attention_scratch(args[1]):
                self._allocate(num_bytes)
            self.events += [-2, -1]
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or storage.nbytes() == 0:
            return
        self._known.add(storage._cdata)
        number = self._allocate(storage.nbytes())
        weakref.finalize(storage, self._free, storage._cdata, number)

    def _allocate(self, num_bytes: int) -> int:
        self.events.append(num_bytes)
        self._made += 1
        return self._made - 1

    def _free(self, key: int, number: int) -> None:
        self._known.discard(key)
        self.events.append(number - self._made)


@dataclass(frozen=True)
class StepTrace:
    """Allocations of the steps of a model, one list of events each, and what is allocated before."""

    steps: list[list[int]]
    weight_bytes: int
    """All frozen weights, and what they are unpacked into."""
    trained: int
    """Parameters of the LoRA."""


@contextmanager
def _without_garbage_collector() -> Iterator[None]:
    gc.disable()  # so that the order is that of reference counts
    try:
        yield
    finally:
        gc.enable()


def trace_steps(
    mode: Any, side: int, kind: Any = None, layers: int = 30, ops: ModuleType | None = region_ops
) -> StepTrace:
    """Return the allocations of the first step of a size, and of a later one; without `ops`, of blocks as modules."""
    counted = our_model(replace(TransformerShape(), n_layers=layers), mode, kind, ops=ops)
    model = counted.model
    quantized = [layer for layer in model.modules() if isinstance(layer, FrozenLinear) and layer.scratch is not None]
    scratch = [layer.scratch for layer in quantized[:1]]
    grads = [parameter.grad for parameter in counted.parameters if parameter.grad is not None]
    steps = []
    with torch.device("meta"), flash_attention(), _without_garbage_collector():
        x, sigma = torch.empty(1, 16, side // 8, side // 8), torch.empty(1)
        prompt = torch.empty(CAPTION_TOKENS, 2560, dtype=model.dtype)
        for _ in range(2):
            with Events([*model.parameters(), *counted.parameters, *scratch, *grads, x, sigma, prompt]) as events:
                loss = velocity(model, x, sigma, [prompt]).square().mean()
                loss.backward()
                del loss
            steps.append(events.events)
    kept = [*(parameter for parameter in model.parameters() if not parameter.requires_grad), *scratch]
    return StepTrace(steps, sum(tensor.nbytes for tensor in kept), counted.parameters[0].numel())


def replay(events: Sequence[int], allocator: Allocator) -> None:
    """Allocate and free as a step does; what is left at its end is freed."""
    live: dict[int, Block] = {}
    made = 0
    for event in events:
        if event > 0:
            live[made] = allocator.malloc(event)
            made += 1
        else:
            allocator.free(live.pop(made + event))
    for block in live.values():
        allocator.free(block)
