"""Which card, and which versions of what computes on it."""

import contextlib
import os
import platform
import subprocess
from typing import Any

import torch

from gpu_parts.identity import version

PACKAGES = ("triton", "diffusers", "peft", "bitsandbytes", "transformers", "flash-attn", "flash-attn-4")


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Versions, and the card's properties where there is a GPU."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": {package: version(package) for package in PACKAGES},
        "cores": os.cpu_count(),
        "driver": driver(),
    }
    return found if dry else found | card()


def card() -> dict[str, Any]:
    """Memory, multiprocessors and capability, as torch has them."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "memory_gb": round(properties.total_memory / 1e9, 3),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "bf16": torch.cuda.is_bf16_supported(False),
    }


def driver() -> str | None:
    """Its version; None: nvidia-smi is not there, or does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return told.stdout.partition("\n")[0].strip()
    return None
