"""A folder of images with captions, and what the program finds in it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset.scan import FolderScan, scan_entry


def image(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (80, 64)) -> Path:
    """A small image; a different colour is a different content, unlike any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(colour).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def scanned(root: Path, **settings: Any) -> FolderScan:
    return scan_entry(DataEntry.model_validate({"folder": str(root), **settings}), "data.0")


def problems(result: FolderScan) -> list[str]:
    return [str(problem) for error in result.errors for problem in error.problems]


def prompts(result: FolderScan) -> dict[str, str]:
    return {one.path.name: one.prompts[0] for one in result.images}
