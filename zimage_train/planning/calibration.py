"""Measured time and memory of runs on this machine, by which later predictions are corrected (torch-free)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json

MIN_STEPS = 10
"""A shorter run is not recorded."""
WARM_UP_STEPS = 3
"""Steps that are left out, because kernels are still being chosen and caches filled."""
MAX_MEASUREMENTS = 20
"""Number of latest runs that are kept for each device; older runs may have had another driver."""


@dataclass(frozen=True)
class Measurement:
    """Time and memory of a run, relative to their prediction. The field names are those of the calibration file."""

    device: str
    """See `device_key`."""
    steps: int
    seconds: float
    """Median time of a step."""
    time_ratio: float
    """Median over the steps of measured / predicted time. A mean would follow the few steps that wait for the disk."""
    memory_ratio: float | None
    """Measured over predicted peak of allocated memory; None without a GPU, where it is not measured."""


@dataclass(frozen=True)
class CalibrationFactor:
    """The factors by which runs on a device differ from their predictions: measured / predicted."""

    runs: int
    """Number of runs that they are taken from."""
    time: float
    spread: float
    """Largest relative deviation of a run from `time`."""
    memory: float | None
    """None if no run measured its memory."""

    def in_words(self, is_card_known: bool) -> str:
        """Return the text that follows a corrected figure.

        Args:
            is_card_known: whether the prediction was made for the card itself. Otherwise it was made for a typical one,
                and the factor of its time tells nobody anything.
        """
        runs = "one run here"
        if self.runs > 1:
            runs = f"{self.runs} runs here, which differ by up to {self.spread:.0%}"
        memory = f", memory x{self.memory:.2f}" if self.memory is not None else ""
        correction = f"corrected by x{self.time:.2f} " if is_card_known else ""
        return f"{correction}from {runs}{memory}"


def device_key(device: str, parameters: int) -> str:
    """Return the key of measurements that are comparable: of the same device and model size."""
    return f"{device}, {parameters} parameters"


def measure(device: str, steps: list[tuple[float, float]], gb: float | None, predicted_gb: float) -> Measurement | None:
    """Return the measurement of a run, or None if it is too short.

    `steps` holds (measured, predicted) seconds of each step in order; `gb` is the measured peak of allocated memory.
    """
    if len(steps) < MIN_STEPS:
        return None
    warm_steps = steps[WARM_UP_STEPS:]
    return Measurement(
        device=device,
        steps=len(steps),
        seconds=median(seconds for seconds, _ in warm_steps),
        time_ratio=median(seconds / predicted for seconds, predicted in warm_steps),
        memory_ratio=None if gb is None else gb / predicted_gb,
    )


def record_measurement(path: Path, measurement: Measurement) -> None:
    """Add `measurement` to the calibration file at `path`.

    Raises:
        DiskError: the file cannot be written.
    """
    recorded = _read(path)
    others = [run for run in recorded if run.device != measurement.device]
    same_device = [run for run in recorded if run.device == measurement.device]
    kept = [*others, *same_device[-MAX_MEASUREMENTS + 1 :], measurement]
    atomic.write_json(path, [asdict(run) for run in kept])


def calibration_factor(path: Path, device: str) -> CalibrationFactor | None:
    """Return the factors of the runs on `device` in the calibration file, or None if there are none."""
    runs = [run for run in _read(path) if run.device == device]
    if not runs:
        return None
    time = median(run.time_ratio for run in runs)
    memory_ratios = [run.memory_ratio for run in runs if run.memory_ratio is not None]
    return CalibrationFactor(
        runs=len(runs),
        time=time,
        spread=max(abs(run.time_ratio / time - 1) for run in runs),
        memory=median(memory_ratios) if memory_ratios else None,
    )


def _read(path: Path) -> list[Measurement]:
    """Return the sound measurements in the file. If it is missing or damaged there are none: nothing is corrected."""
    try:
        content: Any = parse_json(path.read_bytes())
        runs = [Measurement(**values) for values in content]
    except (OSError, ValueError, TypeError):
        return []
    return [run for run in runs if _is_sound(run)]


def _is_sound(run: Measurement) -> bool:
    """Return whether the values of `run`, which a user may have edited, are positive numbers of a plausible size."""
    memory = 1.0 if run.memory_ratio is None else run.memory_ratio
    numbers = (run.time_ratio, run.seconds, memory)
    return isinstance(run.device, str) and all(isinstance(value, int | float) and 0 < value < 1e6 for value in numbers)
