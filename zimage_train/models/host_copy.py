"""Weights that wait in main memory while others are in use in their place."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from zimage_train.models.loading import aligned_bytes, allocate_host_buffer, typed_views
from zimage_train.models.pinned_memory import round_up

CHUNK_BYTES = 1 << 30
"""Size of a buffer, unless a single tensor is larger. A power of two, since torch rounds pinned memory up to one."""


class HostCopy:
    """A copy of `tensors` in main memory, which can be exchanged with them.

    An exchange keeps both contents bit for bit, and needs room for one more tensor where `tensors` are.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        is_pinned = any(tensor.is_cuda for tensor in tensors)
        for chunk in _chunks(tensors):
            offsets = [0, *accumulate(map(aligned_bytes, chunk))]
            views = typed_views(allocate_host_buffer(offsets[-1], is_pinned), chunk, offsets)
            for tensor, view in zip(chunk, views, strict=True):
                view.copy_(tensor, non_blocking=True)
                self._pairs.append((tensor, view))
        self.num_bytes = self.bytes_for(tensors)
        _synchronize(is_pinned)

    @staticmethod
    def bytes_for(tensors: Sequence[Tensor]) -> int:
        """Return the main memory that a copy of `tensors` takes, with the rounding of pinned memory."""
        return sum(round_up(sum(map(aligned_bytes, chunk))) for chunk in _chunks(tensors))

    @torch.no_grad()
    def exchange(self) -> None:
        """Give the tensors the content of the copy, and the copy theirs."""
        for tensor, waiting in self._pairs:
            # All three copies are queued on one stream, so each reads what the one before has written.
            held = tensor.clone()
            tensor.copy_(waiting, non_blocking=True)
            waiting.copy_(held, non_blocking=True)
        _synchronize(any(tensor.is_cuda for tensor, _ in self._pairs))


def _chunks(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split `tensors`, in their order, so that each part fits a buffer."""
    chunks: list[list[Tensor]] = []
    filled = CHUNK_BYTES
    for tensor in tensors:
        size = aligned_bytes(tensor)
        if filled + size > CHUNK_BYTES:
            chunks.append([])
            filled = 0
        chunks[-1].append(tensor)
        filled += size
    return chunks


def _synchronize(is_cuda: bool) -> None:
    """Wait until the copies are done: main memory may be read and written by the CPU afterwards."""
    if is_cuda:
        torch.cuda.synchronize()
