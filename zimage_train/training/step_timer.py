"""Notices when a step suddenly takes much longer than steps like it: mostly a card that spills into main memory."""

from collections import deque
from collections.abc import Hashable
from statistics import median

import torch

SLOW_FACTOR = 3.0
"""Times the usual, from which on a step is slow."""
MIN_SAMPLES = 5
"""Steps of one kind that must have been seen."""
SHORTEST_SECONDS = 1.0
"""Quicker steps are not looked at: anything may disturb them."""
WINDOW = 50
HINT = (
    "on Windows turn off NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy; "
    "close other programs that use the card, or set memory.budget_gb lower"
)


class SlowStepDetector:
    """Seconds of the last steps, by what kind of step they were."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, deque[float]] = {}
        self._said: set[str] = set()

    def update(self, kind: Hashable, seconds: float, reserved: float | None, total: float | None) -> str | None:
        """A warning, once of each sort: memory beyond the card (`reserved` and `total` in bytes), or a slow step."""
        known = self._seconds.setdefault(kind, deque(maxlen=WINDOW))
        usual = median(known) if len(known) >= MIN_SAMPLES else None
        known.append(seconds)
        if reserved is not None and total is not None and reserved > total:
            what = f"{reserved / 1e9:.1f} GB are taken of a card with {total / 1e9:.1f} GB: it spills into main memory"
            return self._once("spill", what)
        if usual is not None and seconds > max(SLOW_FACTOR * usual, SHORTEST_SECONDS):
            return self._once("slow", f"a step took {seconds:.1f} s where steps like it take {usual:.1f} s")
        return None

    def _once(self, sort: str, what: str) -> str | None:
        if sort in self._said:
            return None
        self._said.add(sort)
        return f"{what}; if it stays so: {HINT}"


def reserved_bytes(device: torch.device) -> tuple[float | None, float | None]:
    """What the allocator holds of the GPU, and what the GPU has; None and None without one."""
    if device.type != "cuda":
        return None, None
    return float(torch.cuda.memory_reserved(device)), float(torch.cuda.get_device_properties(device).total_memory)
