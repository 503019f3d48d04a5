"""CPU offloading of transformer blocks: frozen weights stay in CPU memory and are copied to the device block by block.

The weights are frozen, so blocks are copied to the device and never back. Each offloaded block is one packed buffer
(pinned on CUDA) and therefore one copy. Two slots on the device form a ring: one holds the block that computes, the
other receives the block that is predicted to run next, so that copy and compute overlap. Blocks are visited upwards in
the forward pass and downwards in the backward; a wrong prediction costs a copy that does not overlap, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from zimage_train.models.loading import aligned_bytes, allocate_host_buffer, set_parameter, typed_views
from zimage_train.models.pinned_memory import DEVICE_SLOTS, arena_sizes


@dataclass(frozen=True)
class RingState:
    """The blocks that the slots hold, and the block that ran last."""

    resident: tuple[int | None, ...]
    last: int | None


def streamed_blocks(count: int, number: int) -> list[int]:
    """Return the indices of the `number` of `count` blocks that are offloaded, spread evenly."""
    return [(2 * index + 1) * count // (2 * number) for index in range(number)]


class BlockOffloader:
    """Keeps the weights of `blocks` in CPU memory and copies each block to `device` shortly before it runs.

    All blocks must have the same parameters, and are expected to run in the given order. To change a weight, write into
    its `cpu_buffer` and call `invalidate` afterwards.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        layouts = []
        for block in blocks:
            layouts.append([(name, param.shape, param.dtype) for name, param in block.named_parameters()])
        assert all(layout == layouts[0] for layout in layouts), "offloaded blocks must have the same parameters"
        names = [name for name, _, _ in layouts[0]]
        like = list(blocks[0].parameters())
        offsets = [0, *accumulate(aligned_bytes(param) for param in like)]
        block_bytes = offsets[-1]
        is_cuda = device.type == "cuda"

        # Several blocks share a buffer, because the pinned allocator rounds each buffer up to a power of two.
        buffers = []
        self._host_blocks: list[Tensor] = []
        for number in arena_sizes(len(blocks), block_bytes):
            buffer = allocate_host_buffer(number * block_bytes, is_cuda)
            buffers.append(buffer)
            self._host_blocks.extend(buffer.split(block_bytes))
        self.is_pinned = all(buffer.is_pinned() for buffer in buffers) if is_cuda else True

        self._slots = [torch.empty(block_bytes, dtype=torch.uint8, device=device) for _ in range(DEVICE_SLOTS)]
        self._slot_views = [typed_views(slot, like, offsets) for slot in self._slots]
        self._resident: list[int | None] = [None] * DEVICE_SLOTS
        """Index of the block in each slot."""
        self._last: int | None = None
        """Index of the block that ran last; while its forward runs, its own index."""
        self._copy_stream = torch.cuda.Stream(device) if is_cuda else None
        self._ready = self._new_events()
        """Recorded on the copy stream when the copy into a slot is complete."""
        self._arriving: set[int] = set()
        """Slots into which a copy was started that no block has waited for yet."""

        self._parameters: list[list[nn.Parameter]] = []
        self._indices = {id(block): index for index, block in enumerate(blocks)}
        self._cpu_buffers: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            # The parameters have no storage of their own: `_enter` points them into the slot that holds their block.
            parameters = [nn.Parameter(view, requires_grad=False) for view in self._slot_views[0]]
            host_views = typed_views(self._host_blocks[index], like, offsets)
            for name, parameter, host_view in zip(names, parameters, host_views, strict=True):
                set_parameter(block, name, parameter)
                self._cpu_buffers[id(parameter)] = host_view
            self._parameters.append(parameters)
            block.register_forward_pre_hook(partial(self._before_forward, index))

    def cpu_buffer(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the tensor in CPU memory that holds `parameter`, or None if its block is not offloaded."""
        return self._cpu_buffers.get(id(parameter))

    def invalidate(self) -> None:
        """Forget what the slots hold, because the weights in CPU memory have changed."""
        self._resident = [None] * DEVICE_SLOTS

    def rewind(self) -> None:
        """Put the first blocks into the slots in their order, as a training step leaves them.

        Every step begins so, and therefore finds each block in the same slot.
        """
        for index in range(min(DEVICE_SLOTS, len(self._host_blocks))):
            if self._resident[index] != index:
                self._copy(index, index)
        self._last = None
        self.join()
        self._ready = self._new_events()  # a CUDA graph must not wait for an event from before it

    def join(self) -> None:
        """Let the current stream wait for all copies."""
        for slot in sorted(self._arriving):
            self._wait(slot)

    def state(self) -> RingState:
        return RingState(tuple(self._resident), self._last)

    def assume(self, state: RingState) -> None:
        """Take it that the slots are in `state`, after a CUDA graph has been recorded or replayed."""
        self._resident, self._last = list(state.resident), state.last
        self._ready, self._arriving = self._new_events(), set()

    def enter(self, block: nn.Module, is_backward: bool) -> None:
        """Make `block` usable on the current stream in a training step; a block that is not offloaded always is.

        The block that comes after it in the pass is copied meanwhile.
        """
        index = self._indices.get(id(block))
        if index is None:
            return
        following = index - 1 if is_backward else index + 1
        # At the top, the pass turns round, and both blocks that come next are in the slots already.
        self._enter(index, following if following in range(len(self._parameters)) else None)

    def _before_forward(self, index: int, block: nn.Module, inputs: object) -> None:
        self._enter(index, self._next_block(index))

    def _enter(self, index: int, following: int | None) -> None:
        """Make block `index` usable on the current stream, and start copying the block `following`."""
        slot = self._resident.index(index) if index in self._resident else self._fetch(index)
        self._wait(slot)
        for parameter, view in zip(self._parameters[index], self._slot_views[slot], strict=True):
            parameter.data = view
        # Set before the prefetch: `_fetch` never overwrites the slot of `_last`, which is now the block about to run.
        self._last = index
        if following is not None and following not in self._resident:
            self._fetch(following)

    def _next_block(self, index: int) -> int | None:
        """Predict which block runs after `index`, or None where both candidates are on the device already.

        Checkpointing runs the blocks' forward again during the backward, in descending order and with gradients
        enabled. So an index that does not rise means that the backward is under way.
        """
        top = len(self._parameters) - 1
        is_training = torch.is_grad_enabled()
        if is_training and self._last is not None and 0 < index <= self._last:
            return index - 1
        if index < top:
            return index + 1
        # At the top, training turns round: the backward needs the top block and the block below, and both slots hold
        # just these. Sampling goes on with block 0 of the next step.
        return None if is_training else 0

    def _fetch(self, index: int) -> int:
        """Start copying block `index` into the slot that is not in use by the last block; return the slot."""
        slot = next(slot for slot, resident in enumerate(self._resident) if resident is None or resident != self._last)
        self._copy(index, slot)
        return slot

    def _copy(self, index: int, slot: int) -> None:
        self._resident[slot] = index
        if self._copy_stream is None:
            self._slots[slot].copy_(self._host_blocks[index])
            return
        # Kernels that read the slot's former block may still be queued: overwrite it only after them.
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            self._slots[slot].copy_(self._host_blocks[index], non_blocking=True)
            self._ready[slot].record(self._copy_stream)
        self._arriving.add(slot)

    def _wait(self, slot: int) -> None:
        """Let the current stream wait for the copy into `slot`; the CPU does not wait."""
        if self._copy_stream is not None:
            torch.cuda.current_stream().wait_event(self._ready[slot])
        self._arriving.discard(slot)

    def _new_events(self) -> list[torch.cuda.Event]:
        return [torch.cuda.Event() for _ in range(DEVICE_SLOTS)] if self._copy_stream is not None else []
