"""Random numbers as a function of a key, independent of what was drawn before.

Every draw in this package comes from `keyed_generator(seed, *path)`, or is made or ordered by `keyed_int(seed, *path)`.
So a checkpoint holds no random state, and the noise of a sample does not depend on the batch size, gradient
accumulation, the number of processes or previews.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KeyPart = str | int | float | bool | None


def keyed_int(seed: int, *path: KeyPart) -> int:
    """Return an integer of 63 hashed bits for `(seed, *path)`, the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr((seed, *path)).encode(), digest_size=8).digest()) >> 1


def keyed_generator(seed: int, *path: KeyPart) -> torch.Generator:
    """Return a new generator for `(seed, *path)`, on the CPU so that the numbers do not depend on the device."""
    import torch

    return torch.Generator().manual_seed(keyed_int(seed, *path))
