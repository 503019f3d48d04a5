"""Length of the paths that a run writes, checked against the limit of Windows before the run starts (torch-free).

The names below repeat those of the modules that write the files; tests/planning/test_path_lengths.py compares the
prediction with a whole run.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Problem
from zimage_train.io import atomic, operating_system

DIGEST = "0" * 64
"""As long as a SHA-256 in hexadecimal."""
WANDB_IMAGE = "wandb/offline-run-20260101_000000-00000000/files/media/images/previews"
"""A folder as long as that in which Weights & Biases keeps previews; `_paths_in_run` adds the names of the files."""


def require_short_paths(config: Config) -> None:
    """Require on Windows that every path of the run can be opened there.

    Raises:
        ConfigError: says how long the longest path would be, and which setting to shorten by how much.
    """
    if not operating_system.is_windows():
        return
    root = (Path(config.output_dir) / config.name).absolute()
    cached = cache_dir(config).absolute() / "latents" / DIGEST[:2] / f"{DIGEST}.safetensors"
    # Files are written under a temporary name first, which is longer than the final name.
    lengths = {
        "output_dir or name": max(map(_length, _paths_in_run(config, root))),
        "cache.folder": _length(atomic.temporary_path(cached)),
    }
    max_length = operating_system.WINDOWS_PATH_LENGTH
    problems: list[Problem] = []
    for settings, length in lengths.items():
        if length > max_length:
            message = f"a path of this run would have {length} characters, and Windows opens {max_length}"
            hint = f"shorten {settings} by {length - max_length}"
            problems.append(Problem(settings, message, hint, "path-too-long"))
    if problems:
        raise ConfigError(*problems)


def _paths_in_run(config: Config, root: Path) -> Iterator[Path]:
    """Yield the longest path in each folder that a run writes below `root`."""
    step = f"{config.train.steps:06d}"
    for name in (config.name, f"{config.name}-{step}"):
        yield atomic.temporary_path(root / "lora" / "ema" / f"{name}.safetensors")
        yield atomic.temporary_path(root / "lora" / "ema" / f"{name}.workflow.json")
    yield atomic.temporary_path(root / "checkpoints" / f"step-{step}.safetensors")
    yield atomic.temporary_path(root / "rehearsal.safetensors")
    yield atomic.temporary_path(root / "samples" / "also" / f"{step}-00.png")
    if config.log.tensorboard:
        yield root / "tensorboard" / f"events.out.tfevents.1700000000.{socket.gethostname()}.000000.0"
    if config.log.wandb is not None:
        yield root / f"{WANDB_IMAGE}/00_{step}_{DIGEST[:20]}.png"


def _length(path: Path) -> int:
    """Return the length of `path` as Windows counts it, in UTF-16 units: characters beyond U+FFFF count twice."""
    return len(str(path).encode("utf-16-le")) // 2
