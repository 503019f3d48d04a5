"""The GPUs, disk and memory of this machine."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

FIELDS = ("index", "name", "temperature.gpu", "utilization.gpu", "memory.used", "memory.total")
MIB = 1024**2


@dataclass(frozen=True)
class GpuState:
    """A GPU at this moment."""

    index: str
    name: str
    temperature: float | None
    """Degrees Celsius."""
    load: float | None
    """Percent."""
    used_bytes: float | None
    total_bytes: float | None


@dataclass(frozen=True)
class MachineState:
    """The machine at this moment."""

    gpus: list[GpuState]
    free_disk_bytes: int
    """On the volume of the runs."""
    free_memory_bytes: int


def read_machine(runs: Path) -> MachineState:
    """Return the state of the machine that has the folder of the runs."""
    place = next(path for path in (runs, *runs.absolute().parents) if path.exists())
    return MachineState(list_gpus(), shutil.disk_usage(place).free, psutil.virtual_memory().available)


def list_gpus() -> list[GpuState]:
    """Return the NVIDIA GPUs by nvidia-smi; empty where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[GpuState] = []
    for line in done.stdout.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(FIELDS):
            used, total = _number(values[4]), _number(values[5])
            found.append(
                GpuState(
                    values[0],
                    values[1],
                    _number(values[2]),
                    _number(values[3]),
                    None if used is None else used * MIB,
                    None if total is None else total * MIB,
                )
            )
    return found


def _number(text: str) -> float | None:
    """Return a number that nvidia-smi prints, or None where it prints [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None
