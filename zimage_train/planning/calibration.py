"""What runs really took on this machine, and how far predictions were off: later ones are corrected (torch-free)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from zimage_train.io import atomic

MIN_STEPS = 10
"""A shorter run says nothing."""
WARM_UP = 3
"""Steps that are left out: kernels are chosen, caches filled."""
MAX_MEASUREMENTS = 20
"""Runs of one device."""


@dataclass(frozen=True)
class Measurement:
    """One run: times are relative to the prediction for `device`, a card or the CPU with a model of one size."""

    device: str
    steps: int
    seconds: float
    """Of a step, the median."""
    time_ratio: float
    memory_ratio: float | None
    """None: not measured, without a GPU."""


@dataclass(frozen=True)
class CalibrationFactor:
    """What several runs on one device say together."""

    runs: int
    time: float
    spread: float
    """Of the time: how far the outermost run is from the middle, as a share."""
    memory: float | None

    def in_words(self) -> str:
        """For people, behind a corrected figure."""
        memory = f", memory x{self.memory:.2f}" if self.memory is not None else ""
        many = f"{self.runs} runs here, which differ by up to {self.spread:.0%}" if self.runs > 1 else "one run here"
        return f"corrected by x{self.time:.2f} from {many}{memory}"


def device_key(device: str, parameters: int) -> str:
    """By what runs are told apart: a model of another size says nothing of this one."""
    return f"{device}, {parameters} parameters"


def measure(device: str, steps: list[tuple[float, float]], gb: float | None, predicted_gb: float) -> Measurement | None:
    """From (measured, predicted) seconds of the steps of a run, in order; None: too few."""
    known = steps[WARM_UP:]
    if len(steps) < MIN_STEPS:
        return None
    return Measurement(
        device=device,
        steps=len(steps),
        seconds=median(seconds for seconds, _ in known),
        time_ratio=median(seconds / predicted for seconds, predicted in known),
        memory_ratio=None if gb is None else gb / predicted_gb,
    )


def record_measurement(path: Path, measurement: Measurement) -> None:
    """Add a run to those that `path` knows.

    Raises:
        DiskError: it cannot be written.
    """
    known = _read(path)
    same = [one for one in known if one.device == measurement.device]
    others = [one for one in known if one.device != measurement.device]
    atomic.write_json(path, [asdict(one) for one in [*others, *same[-MAX_MEASUREMENTS + 1 :], measurement]])


def calibration_factor(path: Path, device: str) -> CalibrationFactor | None:
    """What the runs on `device` that `path` knows say; None: there were none."""
    found = [one for one in _read(path) if one.device == device]
    if not found:
        return None
    time = median(one.time_ratio for one in found)
    memory = [one.memory_ratio for one in found if one.memory_ratio is not None]
    return CalibrationFactor(
        runs=len(found),
        time=time,
        spread=max(abs(one.time_ratio / time - 1) for one in found),
        memory=median(memory) if memory else None,
    )


def _read(path: Path) -> list[Measurement]:
    """A file that is missing or damaged knows nothing: it is only a memo."""
    try:
        content: Any = json.loads(path.read_bytes())
        found = [Measurement(**one) for one in content]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return [one for one in found if _is_sound(one)]


def _is_sound(one: Measurement) -> bool:
    memory = 1.0 if one.memory_ratio is None else one.memory_ratio
    numbers = (one.time_ratio, one.seconds, memory)
    return isinstance(one.device, str) and all(isinstance(x, int | float) and 0 < x < 1e6 for x in numbers)
