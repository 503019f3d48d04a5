"""Memory and speed of graphics cards by their data sheets, and detection of the card of this machine (torch-free).

`tflops` is dense bf16 with fp32 accumulation, for which GeForce cards have half the rate that is advertised. H100 and
H200 reach 790 in large products, whatever the data sheet says; their entry is 878, nine tenths of which that is. How
much of it a step reaches is in flops.py.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

from zimage_train.errors import ConfigError, Problem


@dataclass(frozen=True)
class GpuSpec:
    """The data sheet of a card; GB are 1e9 bytes."""

    name: str
    memory_gb: float
    tflops: float
    gb_per_second: float
    """Bandwidth of its memory."""
    pcie_gb_per_second: float
    """Bandwidth of copies from pinned main memory, in a single direction."""

    @property
    def label(self) -> str:
        """Return its name as a shop has it, and its memory: `RTX 4070 Ti Super, 16 GB`."""
        match = re.fullmatch(r"(a?\d{4})(ti)?(super)?(ada)?", self.name)
        words = ["RTX", *(word.title() for word in match.groups() if word)] if match else [self.name.upper()]
        return f"{' '.join(words)}, {self.memory_gb / 1.073741824:.0f} GB"


def _gib(gib: float) -> float:
    """Return `gib` (2^30 bytes) in GB."""
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
FP8_CAPABILITY = (8, 9)
"""Compute capability from which a card multiplies in fp8: Ada, Hopper and later."""
RESERVED_BYTES = 0.5e9
"""Memory left to the driver and other programs; an estimate, which no run has measured."""
RESERVED_BYTES_WINDOWS = 1.2e9
"""The same on Windows, which draws its desktop on the card. A plan that is too large raises no error there: the driver
moves memory to main memory, and every step becomes slow. So more is left free."""
TYPICAL_GPU = GPU_SPECS["4090"]
"""The card for which plans are compared if the true card is unknown."""
FORM_FACTOR = r"(?:sxm\d?|pcie|nvl|hbm\d?e?|generation|gpu)*?"
NAME_SUFFIX = rf"{FORM_FACTOR}(?:(?P<gib>\d{{1,3}})gb)?{FORM_FACTOR}"
"""Pattern of what may follow the name of a card without making it another card."""


@dataclass(frozen=True)
class DeviceLimits:
    """A device to plan for, and the bytes that a plan may use of it."""

    name: str
    limit_bytes: float
    card: GpuSpec | None
    """None where the speed of the device is not known."""

    @property
    def key(self) -> str:
        """Return the name under which measured runs are recorded; see `calibration.device_key`."""
        return self.card.name if self.card else self.name


def usable_bytes(total: float) -> float:
    """Return the bytes that a plan may use of a card with `total`; the rest is left to the driver and the desktop."""
    return total - (RESERVED_BYTES_WINDOWS if sys.platform == "win32" else RESERVED_BYTES)


def get_gpu(name: str) -> GpuSpec:
    """Return the card that `name` means, such as `4090`, `rtx-4090` or `NVIDIA GeForce RTX 4090`.

    Raises:
        ConfigError: no such card is in the list.
    """
    card = find_gpu(name)
    if card is None:
        raise ConfigError(
            Problem("--gpu", f"{name!r} is not known", f"give one of {', '.join(GPU_SPECS)}", "unknown-gpu")
        )
    return card


def find_gpu(name: str) -> GpuSpec | None:
    """Return the card that `name` means, with the memory that `name` states, or None if it is not in the list.

    Drivers add form factor and memory to the name (`NVIDIA A100-SXM4-80GB`). Any other addition, such as Laptop or D,
    makes it another card with other speeds.
    """
    text = "".join(re.sub(r"[^a-z0-9]+", " ", name.lower()).split())
    for card in GPU_SPECS.values():
        match = re.fullmatch(rf"(?:nvidia|geforce|rtx|quadro|tesla)*{card.name}{NAME_SUFFIX}", text)
        if match is not None:
            return card if match["gib"] is None else _with_memory(card, int(match["gib"]))
    return None


def _with_memory(card: GpuSpec, gib: int) -> GpuSpec:
    """Return `card`, or its variant with `gib` GiB if that is not what it has."""
    if abs(_gib(gib) / card.memory_gb - 1) < 0.1:
        return card
    return replace(card, name=f"{card.name} {gib}gb", memory_gb=_gib(gib))


@dataclass(frozen=True)
class DetectedGpu:
    """The NVIDIA card of this machine, as its driver reports it."""

    name: str
    memory_bytes: float


def detect_gpu() -> DetectedGpu | None:
    """Return the first NVIDIA card that nvidia-smi lists, or None if there is none."""
    # Asked of nvidia-smi and not of torch, whose import takes seconds: `check` must stay fast.
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        name, _, memory = output.splitlines()[0].rpartition(",")
        return DetectedGpu(name.strip(), float(memory) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
