"""CUDA graphs on a CPU: the operations of a function with the memory they read and wrote, to be repeated from there.

As in a CUDA graph, what Python knew when the function was recorded is known for ever, every tensor stays where it was,
and an operation that asks the device for a number is an error.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ASKS_DEVICE = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


@dataclass(frozen=True)
class Operation:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    """Tensors with memory of their own."""


class Recording(TorchDispatchMode):
    """Collects operations, and the contents that tensors from outside had before they were written to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in ASKS_DEVICE, f"{function} waits for the device"
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function._schema.is_mutable:
            for tensor in given:
                self._keep(tensor)
        found = function(*args, **kwargs)
        known = {storage(tensor) for tensor in given}
        results = []
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor) and storage(leaf) not in known:
                results.append(leaf)
                self._own.add(storage(leaf))
        # Aliases, since the memory of a parameter of a streamed block changes.
        own_args, own_kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self.operations.append(Operation(function, own_args, own_kwargs, [result.detach() for result in results]))
        return found

    def _keep(self, tensor: Tensor) -> None:
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if storage(tensor) not in self._own | self.before.keys():
            self.before[storage(tensor)] = (whole, whole.clone())

    def undo(self) -> None:
        for tensor, content in self.before.values():
            tensor.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        for operation in self.operations:
            for tensor in operation.results:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # so that nothing is left of an earlier replay
        for operation in self.operations:
            found = operation.function(*operation.args, **operation.kwargs)
            if not operation.results:
                continue
            given = pytree.tree_leaves((operation.args, operation.kwargs))
            known = {storage(leaf) for leaf in given if isinstance(leaf, Tensor)}
            new = [
                leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and storage(leaf) not in known
            ]
            for tensor, value in zip(operation.results, new, strict=True):
                tensor.copy_(value)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class OperationRecorder:
    """The `Recorder` of a CPU."""

    def __init__(self) -> None:
        self.records = self.replays = self.forgotten = self.eager = 0
        self.allocated = 0

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        self.eager += 1
        yield

    def allocated_bytes(self) -> int:
        return self.allocated

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.records += 1
        with Recording() as recording:
            run()
        recording.undo()

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay

    def forget(self) -> None:
        self.forgotten += 1
