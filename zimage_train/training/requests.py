"""What a run is asked to do after the step under way, by empty files in its folder: `save.now` and `preview.now`.

The page writes them, and so does `touch` in a terminal. Neither changes the training.
"""

import os
from collections.abc import Set
from typing import Literal

from zimage_train.io import atomic
from zimage_train.training.run_dir import RunDir

RequestName = Literal["save", "preview"]
NAMES: tuple[RequestName, ...] = ("save", "preview")


def ask(folder: RunDir, name: RequestName) -> None:
    """Ask the run to save, or to draw its previews.

    Raises:
        DiskError: the file cannot be written.
    """
    atomic.write_text(folder.request(name), "")


def take(folder: RunDir) -> Set[RequestName]:
    """Return what was asked since the last call, and take note of it by removing the files."""
    asked: set[RequestName] = set()
    for name in NAMES:
        path = folder.request(name)
        # Not `Path.exists`, which raises where a network drive does not answer.
        if os.path.exists(path) and atomic.remove(path):  # noqa: PTH110
            asked.add(name)
    return asked
