"""Detection of slow steps, which mostly mean that the driver moves GPU memory into main memory."""

from collections import deque
from collections.abc import Hashable
from statistics import median

import torch

SLOW_FACTOR = 3.0
"""A step is slow if it takes more than this multiple of the median time."""
MIN_SAMPLES = 5
"""Number of steps of the same resolutions that must have been timed before a step can count as slow."""
SHORTEST_SECONDS = 1.0
"""Shorter steps never count as slow: other programs easily disturb them."""
WINDOW = 50
"""Number of recent steps of the same resolutions from which the median is taken."""
HINT = (
    "on Windows turn off NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy; "
    "close other programs that use the card, or set memory.budget_gb lower"
)


class SlowStepDetector:
    """Compares each step with recent steps of the same resolutions, which decide how long a step takes."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, deque[float]] = {}
        self._warned: set[str] = set()

    def update(self, resolutions: Hashable, seconds: float, reserved: float | None, total: float | None) -> str | None:
        """Record a step; return a warning if it was slow or if `reserved` bytes exceed the card's `total`, or None.

        Each of the two warnings is returned once in a run.
        """
        earlier = self._seconds.setdefault(resolutions, deque(maxlen=WINDOW))
        usual = median(earlier) if len(earlier) >= MIN_SAMPLES else None
        earlier.append(seconds)
        if reserved is not None and total is not None and reserved > total:
            what = f"{reserved / 1e9:.1f} GB are taken of a card with {total / 1e9:.1f} GB: it spills into main memory"
            return self._once("spill", what)
        if usual is not None and seconds > max(SLOW_FACTOR * usual, SHORTEST_SECONDS):
            return self._once("slow", f"a step took {seconds:.1f} s where steps like it take {usual:.1f} s")
        return None

    def _once(self, code: str, what: str) -> str | None:
        if code in self._warned:
            return None
        self._warned.add(code)
        return f"{what}; if it stays so: {HINT}"


def reserved_bytes(device: torch.device) -> tuple[float | None, float | None]:
    """Return the bytes that torch's allocator has reserved and those of the card; None and None without a GPU."""
    if device.type != "cuda":
        return None, None
    return float(torch.cuda.memory_reserved(device)), float(torch.cuda.get_device_properties(device).total_memory)
