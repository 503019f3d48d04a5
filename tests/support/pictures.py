"""Pictures as numbers, and what diffusers' own pipeline draws with a LoRA, in another process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from zimage_train import measure, mini

STOCK = Path(measure.__file__).with_name("stock_pipeline.py")


def stock(lora: Path, output: Path, prompt: str, negative: str, *numbers: float) -> np.ndarray:
    command = [
        sys.executable,
        str(STOCK),
        str(mini.TURBO),
        str(lora),
        prompt,
        negative,
        *map(str, numbers),
        str(output),
    ]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return pixels(output)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
