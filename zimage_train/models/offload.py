"""Blocks whose frozen weights wait in main memory and come to the device one after the other, never back.

Each such block is one packed buffer (pinned, on a GPU) and one copy. A ring of two slots on the device holds the block
that computes and the one that comes next, so that copying and computing overlap: up through the forward pass, down
through the backward, and on from where either turns. A guess that was wrong costs time and nothing else.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from zimage_train.models.loading import set_parameter
from zimage_train.models.pinned_memory import arena_sizes

ALIGNMENT = 256
"""Bytes; every tensor in a buffer begins at a multiple."""
SLOTS = 2


def streamed_blocks(count: int, number: int) -> list[int]:
    """Which `number` of `count` blocks are streamed: evenly spread."""
    return [(2 * index + 1) * count // (2 * number) for index in range(number)]


def _main_memory(nbytes: int, pinned: bool) -> Tensor:
    """Room in main memory; where the system refuses to pin that much (WSL, containers), plain and slower to copy."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8)


class BlockOffloader:
    """Streams `blocks` of one layout, in this order, to `device`; their parameters point into its slots.

    What shall be in the blocks is written into `home` of each parameter, followed by `changed`.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        names = [[name for name, _ in block.named_parameters()] for block in blocks]
        like = list(blocks[0].parameters())
        layouts = [[(name, one.shape, one.dtype) for name, one in block.named_parameters()] for block in blocks]
        assert all(layout == layouts[0] for layout in layouts), "the ring's slots have one layout"
        sizes = [-(-one.numel() * one.element_size() // ALIGNMENT) * ALIGNMENT for one in like]
        offsets = [0, *accumulate(sizes)]
        is_cuda = device.type == "cuda"

        def views(buffer: Tensor) -> list[Tensor]:
            places = zip(like, offsets, strict=False)
            return [
                buffer[offset : offset + one.numel() * one.element_size()].view(one.dtype).view(one.shape)
                for one, offset in places
            ]

        shared = arena_sizes(len(blocks), offsets[-1])
        buffers = [_main_memory(number * offsets[-1], is_cuda) for number in shared]
        self.is_pinned = all(buffer.is_pinned() for buffer in buffers) if is_cuda else True
        self._hosts = [host for buffer in buffers for host in buffer.split(offsets[-1])]
        self._slots = [torch.empty(offsets[-1], dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._views = [views(slot) for slot in self._slots]
        self._held: list[int | None] = [None] * SLOTS
        self._last: int | None = None
        self._copies = torch.cuda.Stream(device) if is_cuda else None
        self._ready = [torch.cuda.Event() for _ in range(SLOTS)] if is_cuda else []
        self._parameters: list[list[nn.Parameter]] = []
        self._homes: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            parameters = [nn.Parameter(view, requires_grad=False) for view in self._views[0]]
            for name, parameter, home in zip(names[index], parameters, views(self._hosts[index]), strict=True):
                set_parameter(block, name, parameter)
                self._homes[id(parameter)] = home
            self._parameters.append(parameters)
            block.register_forward_pre_hook(partial(self._before, index))

    def cpu_buffer(self, parameter: nn.Parameter) -> Tensor | None:
        """Where `parameter` is kept in main memory; None: it is not of a streamed block."""
        return self._homes.get(id(parameter))

    def invalidate(self) -> None:
        """Forget what the slots hold: the weights at home are others now."""
        self._held = [None] * SLOTS

    def _before(self, index: int, block: nn.Module, inputs: object) -> None:
        self._enter(index)

    def _enter(self, index: int) -> None:
        slot = self._held.index(index) if index in self._held else self._fetch(index)
        if self._copies is not None:
            torch.cuda.current_stream().wait_event(self._ready[slot])
        for parameter, view in zip(self._parameters[index], self._views[slot], strict=True):
            parameter.data = view
        ahead = self._expected(index)
        self._last = index
        if ahead is not None and ahead not in self._held:
            self._fetch(ahead)

    def _expected(self, index: int) -> int | None:
        """Which block comes after `index`; None: one that is here."""
        top, grad = len(self._parameters) - 1, torch.is_grad_enabled()
        if grad and self._last is not None and 0 < index <= self._last:
            return index - 1
        if index < top:
            return index + 1
        return None if grad else 0

    def _fetch(self, index: int) -> int:
        """Copy a block into the slot that does not hold the one that computes now; return the slot."""
        slot = next(slot for slot, held in enumerate(self._held) if held is None or held != self._last)
        self._held[slot] = index
        if self._copies is None:
            self._slots[slot].copy_(self._hosts[index])
            return slot
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self._slots[slot].copy_(self._hosts[index], non_blocking=True)
            self._ready[slot].record(self._copies)
        return slot
