"""The forward and backward of a micro-batch, replayed as a CUDA graph where its shape has come before.

A step is thousands of kernels, and Python takes longer to launch one than most of them take to run. A graph holds the
kernels of a step with their arguments and launches them all at once. The arguments are addresses: the inputs are copied
to where they were when the graph was recorded, and everything else that a step uses stays where it is, since weights,
factors and gradients are only ever written in place. A replay gives the bits of the step from Python, which the dry run
checks, so it does not matter which of the two a step is.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.lora.layers import AdapterLayers
from zimage_train.models.offload import RingState
from zimage_train.planning.planner import MemoryPlan
from zimage_train.training.batches import Batch, map_tensors, named_tensors
from zimage_train.training.device_plan import apply_recompute_plan
from zimage_train.training.loss import losses

MAX_GRAPHS = 32
"""Graphs that are kept: one for each size of images with each length of captions in 32 tokens. They share the memory
of their results; each has some megabytes of its own for its kernels' arguments."""


class Recorder(Protocol):
    """Records the kernels that a function launches."""

    def memory(self) -> AbstractContextManager[None]:
        """Allocate from the memory of the graphs within the block, which must leave nothing allocated there."""
        ...

    def allocated_bytes(self) -> int:
        """Return the bytes that are allocated in all memory of the device."""
        ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record `run` without doing its work, and return a function that does it."""
        ...

    def forget(self) -> None:
        """Give up the memory of the graphs, of which none may be replayed any more."""
        ...


class CudaRecorder:
    """Records CUDA graphs on the current stream, which must not be the default stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.MemPool()

    def memory(self) -> AbstractContextManager[None]:
        return torch.cuda.use_mem_pool(self._pool)

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # In other threads, such as that which reads the next batch, the capture forbids nothing.
        pool: Any = self._pool.id
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with capture:
            run()
        return graph.replay

    def forget(self) -> None:
        self._pool = torch.cuda.MemPool()


def make_recorder(config: Config, frozen: FrozenTransformer, device: torch.device) -> Recorder | None:
    """Return a recorder for a run on `device`, or None where its steps cannot be recorded."""
    if device.type != "cuda" or config.lora.draws_masks:  # each step draws other masks
        return None
    if frozen.offloader is not None and not frozen.offloader.is_pinned:
        return None
    return CudaRecorder()


@dataclass(frozen=True)
class _Inputs:
    batch: Batch
    share: Tensor
    """(): the factor of the losses."""


@dataclass(frozen=True)
class _Graph:
    inputs: _Inputs
    """What the graph reads; they live outside the memory that replays write to."""
    replay: Callable[[], None]
    ring_after: RingState | None
    """The blocks in the slots after a replay."""


class StepRunner:
    """Runs micro-batches forward and backward; what it returns is valid until the next call."""

    def __init__(
        self,
        config: Config,
        frozen: FrozenTransformer,
        lora: AdapterLayers,
        plan: MemoryPlan,
        recorder: Recorder | None,
    ) -> None:
        preserves = config.preserve.kind is not None or config.slider.anchor is not None
        self.loss_names = ("loss", "preservation") if preserves else ("loss",)
        self._config, self._frozen, self._lora, self._recorder = config, frozen, lora, recorder
        self._device, self._grads = lora.flat.whole.device, lora.flat.grads
        self._values = torch.zeros(len(self.loss_names), device=self._device)
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        """By the shapes of the inputs, the one that was used last at the end."""
        self._seen: set[tuple[object, ...]] = set()
        """Shapes whose kernels are loaded and compiled, which cannot be done while a graph is recorded."""
        self.use_plan(plan)

    def use_plan(self, plan: MemoryPlan) -> None:
        """Run the blocks from now on as `plan` says."""
        apply_recompute_plan(self._frozen, self._lora, plan, self._config.lora.draws_masks)
        self._plan = plan
        self._seen.clear()
        self.forget()
        self._set_room_aside()

    @property
    def records(self) -> bool:
        """Return whether steps are recorded."""
        return self._recorder is not None

    def __call__(self, batch: Batch, share: float) -> Tensor:
        """Add the gradients of the losses of `batch` times `share`, and return these (names,), by `loss_names`."""
        inputs = _Inputs(batch, torch.tensor(share))
        self._rewind()
        if self._recorder is None:
            self._run(self._moved(inputs))
            return self._values
        key = _shapes(inputs)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._replay(self._graphs[key], inputs)
        elif key in self._seen:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._record(inputs, self._recorder)
            self._replay(self._graphs[key], inputs)
        else:
            self._run_beside_graphs(inputs, self._recorder)
            self._seen.add(key)
        return self._values

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Give up the memory of steps within the block if previews and validations do not fit beside it."""
        if self._plan.previews_fit_beside:
            yield
            return
        self.forget()
        try:
            yield
        finally:
            self._set_room_aside()

    def forget(self) -> None:
        """Forget all graphs, and give their memory back; the next step of each shape is recorded anew."""
        self._graphs.clear()
        if self._recorder is not None:
            self._recorder.forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _set_room_aside(self) -> None:
        """Let the allocator take the memory of the largest step in one piece, and free it for the steps."""
        if self._device.type != "cuda":
            return
        torch.cuda.empty_cache()  # of what was freed by other work
        memory = contextlib.nullcontext() if self._recorder is None else self._recorder.memory()
        with memory, contextlib.suppress(torch.OutOfMemoryError):  # the dry run tells whether steps fit all the same
            torch.empty(self._plan.room_bytes, dtype=torch.uint8, device=self._device)

    def _run_beside_graphs(self, inputs: _Inputs, recorder: Recorder) -> None:
        """Run a step in the memory of the graphs, so that it needs none of its own.

        What it leaves allocated there would be overwritten by the next replay. If there is anything, as a table that a
        library makes on first use, the graphs are forgotten.
        """
        before = recorder.allocated_bytes()
        with recorder.memory():
            self._run(self._moved(inputs))
        if recorder.allocated_bytes() != before:
            self.forget()
            self._set_room_aside()

    def check(self, batch: Batch) -> str | None:
        """Compare a step from Python with its replay; if they differ, record none in this run and return the reason.

        Gradients are zero before and after.
        """
        if self._recorder is None:
            return None
        inputs = _Inputs(batch, torch.tensor(1.0))
        self._rewind()
        self._run_beside_graphs(inputs, self._recorder)
        expected = (self._values.clone(), self._grads.clone())
        self._grads.zero_()
        try:
            self._rewind()
            self._replay(self._record(inputs, self._recorder), inputs)
            is_equal = _same_bits(self._values, expected[0]) and _same_bits(self._grads, expected[1])
            if not self._config.train.reproducible:  # a second step from Python has other bits, too
                is_equal = _is_near(self._values, expected[0]) and _is_near(self._grads, expected[1])
            failure = None if is_equal else "a replay gave other bits"
        except Exception as error:  # noqa: BLE001  a capture may fail in any way, and the run can do without it
            failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        self._grads.zero_()
        if failure is not None:
            self.forget()
            self._recorder = None
            self._set_room_aside()
        return failure

    def _moved(self, inputs: _Inputs) -> _Inputs:
        return map_tensors(inputs, lambda tensor: tensor.to(self._device, non_blocking=True))

    def _rewind(self) -> None:
        if self._frozen.offloader is not None:
            self._frozen.offloader.rewind()

    def _run(self, inputs: _Inputs) -> None:
        """Launch the forward and the backward."""
        # In this thread, since a pool of memory serves one, and a second would have a workspace of cuBLAS of its own.
        # Closed at once if a backward fails: a part may have changed the weight of the LoRA.
        parts = contextlib.closing(losses(self._frozen.model, inputs.batch, self._config))
        self._values.zero_()
        with torch.autograd.set_multithreading_enabled(False), parts as losses_of_batch:
            for loss in losses_of_batch:
                (loss.objective * inputs.share).backward()
                self._values[self.loss_names.index(loss.name)].add_(loss.plain * inputs.share)
        if self._frozen.offloader is not None:
            self._frozen.offloader.join()

    def _record(self, inputs: _Inputs, recorder: Recorder) -> _Graph:
        own = map_tensors(inputs, lambda tensor: torch.empty_like(tensor, device=self._device).copy_(tensor))
        ring = self._frozen.offloader
        if ring is None:
            return _Graph(own, recorder.record(lambda: self._run(own)), None)
        before = ring.state()
        try:
            replay = recorder.record(lambda: self._run(own))
            return _Graph(own, replay, ring.state())
        finally:
            ring.assume(before)  # nothing has been copied, whether or not the recording failed

    def _replay(self, graph: _Graph, inputs: _Inputs) -> None:
        own, new = named_tensors(graph.inputs), named_tensors(inputs)
        for name, tensor in own.items():
            tensor.copy_(new[name], non_blocking=True)
        graph.replay()
        if self._frozen.offloader is not None and graph.ring_after is not None:
            self._frozen.offloader.assume(graph.ring_after)


def _shapes(inputs: _Inputs) -> tuple[object, ...]:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in named_tensors(inputs).items())


def _is_near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) <= 0.01 * float(other.norm())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))  # a NaN does not equal itself
