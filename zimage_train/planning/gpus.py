"""Graphics cards by their data sheets: what a plan for one is made with where no run on it was measured (torch-free).

`tflops` is dense bf16 with fp32 sums; what GeForce cards reach there is half of what their boxes say. H100 and H200
have 790 at most in real products, whatever the sheet says, so 878 of which the planner takes nine tenths.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

from zimage_train.errors import ConfigError, Problem


@dataclass(frozen=True)
class GpuSpec:
    """One card: memory in GB (1e9 bytes), arithmetic, memory bandwidth and PCIe (one way, pinned) in GB/s."""

    name: str
    memory_gb: float
    tflops: float
    gb_per_second: float
    pcie_gb_per_second: float


def _gib(gib: float) -> float:
    return round(gib * 1.073741824, 1)


GPU_SPECS = {
    card.name: card
    for card in (
        GpuSpec("3060", _gib(12), 25.6, 360, 24),
        GpuSpec("3080", _gib(10), 59.5, 760, 24),
        GpuSpec("3090", _gib(24), 71, 936, 24),
        GpuSpec("4060", _gib(8), 30.2, 272, 12),
        GpuSpec("4060ti", _gib(16), 44.1, 288, 12),
        GpuSpec("4070", _gib(12), 58.3, 504, 24),
        GpuSpec("4070tisuper", _gib(16), 88.2, 672, 24),
        GpuSpec("4080", _gib(16), 97.5, 717, 24),
        GpuSpec("4090", _gib(24), 165, 1008, 24),
        GpuSpec("5060ti", _gib(16), 47.4, 448, 24),
        GpuSpec("5070", _gib(12), 61.7, 672, 48),
        GpuSpec("5070ti", _gib(16), 87.9, 896, 48),
        GpuSpec("5080", _gib(16), 112.6, 960, 48),
        GpuSpec("5090", _gib(32), 209.5, 1792, 48),
        GpuSpec("a4000", _gib(16), 76.7, 448, 24),
        GpuSpec("a5000", _gib(24), 111, 768, 24),
        GpuSpec("a6000", _gib(48), 154.8, 768, 24),
        GpuSpec("l4", _gib(24), 121, 300, 24),
        GpuSpec("l40s", _gib(48), 362, 864, 24),
        GpuSpec("6000ada", _gib(48), 364, 960, 24),
        GpuSpec("a100", _gib(80), 312, 2039, 24),
        GpuSpec("h100", _gib(80), 878, 3350, 48),
        GpuSpec("h200", _gib(141), 878, 4800, 48),
        GpuSpec("b200", _gib(180), 2250, 8000, 48),
    )
}
RESERVED, RESERVED_WITH_DESKTOP = 0.5e9, 1.2e9
"""Bytes; on Windows too much is no error but slow, so more is left."""
TYPICAL_GPU = GPU_SPECS["4090"]
"""By whose proportions one plan is preferred to another where the card is not known."""


@dataclass(frozen=True)
class DeviceLimits:
    """What a plan is made for: `card` is None where its speed is not known."""

    name: str
    limit_bytes: float
    card: GpuSpec | None

    @property
    def key(self) -> str:
        """By what measured runs know it."""
        return self.card.name if self.card else self.name


def usable_bytes(total: float) -> float:
    """What of a card's memory a plan may take: the rest is for the desktop and the driver."""
    return total - (RESERVED_WITH_DESKTOP if sys.platform == "win32" else RESERVED)


def get_gpu(name: str) -> GpuSpec:
    """The card that someone means by `name`: `4090`, `rtx-4090`, `NVIDIA GeForce RTX 4090`.

    Raises:
        ConfigError: it is not in the list.
    """
    card = find_gpu(name)
    if card is None:
        raise ConfigError(
            Problem("--gpu", f"{name!r} is not known", f"give one of {', '.join(GPU_SPECS)}", "unknown-gpu")
        )
    return card


def find_gpu(name: str) -> GpuSpec | None:
    """The card that `name` means, with as much memory as `name` says; None: it is not in the list.

    Makers put form and memory behind the name (`NVIDIA A100-SXM4-80GB`); whatever else stands there, such as Laptop,
    makes it another card.
    """
    text = "".join(re.sub(r"[^a-z0-9]+", " ", name.lower()).split())
    for card in GPU_SPECS.values():
        match = re.fullmatch(rf"(?:nvidia|geforce|rtx|quadro|tesla)*{card.name}{BEHIND}", text)
        if match is not None:
            return card if match["gib"] is None else _with_memory(card, int(match["gib"]))
    return None


FORM = r"(?:sxm\d?|pcie|nvl|hbm\d?e?|generation|gpu)*?"
BEHIND = rf"{FORM}(?:(?P<gib>\d{{1,3}})gb)?{FORM}"


def _with_memory(card: GpuSpec, gib: int) -> GpuSpec:
    """`card`, if its memory is about so large, or its sibling with so much."""
    if abs(_gib(gib) / card.memory_gb - 1) < 0.1:
        return card
    return replace(card, name=f"{card.name} {gib}gb", memory_gb=_gib(gib))


@dataclass(frozen=True)
class DetectedGpu:
    """The NVIDIA card of this machine: what it calls itself, and its memory in bytes."""

    name: str
    memory_bytes: float


def detect_gpu() -> DetectedGpu | None:
    """The first NVIDIA card of this machine, by its driver; None: there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        name, _, memory = output.splitlines()[0].rpartition(",")
        return DetectedGpu(name.strip(), float(memory) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
