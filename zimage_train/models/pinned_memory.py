"""Sizes of the buffers of offloaded blocks, on the device and in pinned CPU memory (torch-free).

torch rounds each pinned buffer up to a power of two.
"""

DEVICE_SLOTS = 2
"""Blocks that the device has room for while blocks are streamed: the computing block, and the block being copied."""


def arena_sizes(count: int, block_bytes: int) -> list[int]:
    """Return how many of `count` blocks go into each buffer, chosen so that rounding wastes little.

    A buffer for each block of 362 MB would take 537 MB; in shared buffers 23 blocks, which are 8.3 GB, take 8.6 GB.
    """
    sizes: list[int] = []
    while count > 0:
        # The fewest bytes per block; of equals, the most blocks.
        best = min(range(1, count + 1), key=lambda blocks: (round_up(blocks * block_bytes) / blocks, -blocks))
        sizes.append(best)
        count -= best
    return sizes


def round_up(nbytes: int) -> int:
    """Return the smallest power of two that is not below `nbytes`."""
    return 1 << max(nbytes - 1, 0).bit_length()


def pinned_bytes(count: int, block_bytes: int) -> int:
    """Return the bytes that `count` blocks take in the buffers of `arena_sizes`."""
    return sum(round_up(blocks * block_bytes) for blocks in arena_sizes(count, block_bytes))
