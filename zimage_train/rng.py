"""Randomness as a function of a key, never of history.

Every draw in this package comes from `generator(seed, *path)` or is ordered by `number(seed, *path)`. So a
checkpoint holds no random state, and batch size, accumulation, processes and previews change no sample's noise.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KeyPart = str | int | float | bool | None


def keyed_int(seed: int, *path: KeyPart) -> int:
    """Return 63 well-mixed bits for `(seed, *path)`: equal in every process, on every machine."""
    return int.from_bytes(blake2b(repr((seed, *path)).encode(), digest_size=8).digest()) >> 1


def keyed_generator(seed: int, *path: KeyPart) -> torch.Generator:
    """Return a fresh CPU generator for `(seed, *path)`; CPU, so that a GPU run draws the same numbers."""
    import torch

    return torch.Generator().manual_seed(keyed_int(seed, *path))
