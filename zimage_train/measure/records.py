"""What was measured, in one form: the claim, the value, its bound, what was predicted, and on which machine."""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Measurement:
    """A number and what it was measured for."""

    claim: str
    value: float
    unit: str
    bound: float | None = None
    """The largest value with which the claim holds; None: the number is only reported."""
    predicted: float | None = None

    @property
    def holds(self) -> bool:
        return self.bound is None or self.value <= self.bound


def report(measurements: list[Measurement], device: torch.device) -> dict[str, Any]:
    """Return `measurements` with the machine and the versions, for a JSON file."""
    rows = []
    for measurement in measurements:
        row = {name: value for name, value in asdict(measurement).items() if value is not None}
        if measurement.bound is not None:
            row["holds"] = measurement.holds
        rows.append(row)
    return {"machine": machine(device), "versions": versions(), "measurements": rows}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what computes: the card with its memory and driver's CUDA, or the processor with its threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory_gb = round(properties.total_memory / 1e9, 2)
        return {"card": properties.name, "memory_gb": memory_gb, "multiprocessors": properties.multi_processor_count}
    return {"processor": platform.machine(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide how fast a step is, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
