"""Detection of slow steps, which mostly mean that the driver moves GPU memory into main memory."""

from collections import deque
from collections.abc import Hashable
from statistics import median

import torch

SLOW_FACTOR = 3.0
"""Multiple of the median time from which on a step counts as slow."""
MIN_SAMPLES = 5
"""Steps of the same resolutions that are timed before one can count as slow."""
SHORTEST_SECONDS = 1.0
"""Faster steps never count as slow: anything may disturb them."""
WINDOW = 50
HINT = (
    "on Windows turn off NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy; "
    "close other programs that use the card, or set memory.budget_gb lower"
)


class SlowStepDetector:
    """Keeps the seconds of recent steps by their resolutions, since those decide how long a step takes."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, deque[float]] = {}
        self._warned: set[str] = set()

    def update(self, resolutions: Hashable, seconds: float, reserved: float | None, total: float | None) -> str | None:
        """Return a warning of a slow step or of `reserved` bytes beyond the card's `total`, each once, or None."""
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
