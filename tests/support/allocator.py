"""A model of PyTorch's CUDACachingAllocator: which requests get memory from the driver, and how much stays unused.

After c10/cuda/CUDACachingAllocator.cpp of torch 2.13, for a single device and stream, without expandable segments:
requests are rounded up to 512 bytes; those of up to 1 MiB come from segments of 2 MiB, those below 10 MiB from segments
of 20 MiB, larger ones from segments of their own size in steps of 2 MiB; the smallest free block that is large enough
is used, and split if enough of it remains; free neighbours are merged; and before an error, free segments are released.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 1 << 20
ROUNDING = 512
SMALL, SMALL_SEGMENT, LARGE_SEGMENT = MIB, 2 * MIB, 20 * MIB
OWN_SEGMENT = 10 * MIB
"""Requests from here on get a segment of their own, of a multiple of `SMALL_SEGMENT`."""


class OutOfMemoryError(Exception):
    """A request cannot be met within the limit."""


@dataclass(eq=False)
class Block:
    """A part of a segment; `before` and `after` are its neighbours there."""

    address: int
    size: int
    is_small: bool
    is_used: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass
class Allocator:
    """Allocates blocks within `limit` bytes of reserved memory."""

    limit: float = float("inf")
    reserved: int = 0
    allocated: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    _next_address: int = 0
    _free: dict[bool, list[tuple[int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})
    """Free blocks of small and of large segments, by size and address."""

    def malloc(self, num_bytes: int) -> Block:
        size = max(_rounded(num_bytes, ROUNDING), ROUNDING)
        is_small = size <= SMALL
        block = self._take_free(is_small, size)
        if block is None:
            block = self._new_segment(is_small, size)
        least_rest = ROUNDING if is_small else SMALL + 1
        if block.size - size >= least_rest:
            rest = Block(block.address + size, block.size - size, is_small, False, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._add_free(rest)
        block.is_used = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        block.is_used = False
        before, after = block.before, block.after
        if before is not None and not before.is_used:
            self._remove_free(before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and not after.is_used:
            self._remove_free(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        self._add_free(block)

    def release(self) -> None:
        """Return every segment to the driver that is free as a whole, as `empty_cache` does."""
        for blocks in self._free.values():
            for entry in list(blocks):
                block = entry[2]
                if block.before is None and block.after is None:
                    blocks.remove(entry)
                    self.reserved -= block.size

    def _take_free(self, is_small: bool, size: int) -> Block | None:
        blocks = self._free[is_small]
        index = bisect_left(blocks, (size, -1))
        return blocks.pop(index)[2] if index < len(blocks) else None

    def _new_segment(self, is_small: bool, size: int) -> Block:
        segment = SMALL_SEGMENT if is_small else LARGE_SEGMENT
        if size >= OWN_SEGMENT:
            segment = _rounded(size, SMALL_SEGMENT)
        if self.reserved + segment > self.limit:
            self.release()
        if self.reserved + segment > self.limit:
            raise OutOfMemoryError(f"{size / 1e6:.1f} MB beside {self.reserved / 1e9:.3f} GB reserved")
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._next_address += 1 << 50  # segments are never neighbours
        return Block(self._next_address, segment, is_small)

    def _add_free(self, block: Block) -> None:
        insort(self._free[block.is_small], (block.size, block.address, block))

    def _remove_free(self, block: Block) -> None:
        blocks = self._free[block.is_small]
        blocks.pop(bisect_left(blocks, (block.size, block.address)))


def _rounded(num_bytes: int, step: int) -> int:
    return -(-num_bytes // step) * step
