"""Paths that Windows would not open, found before a run has worked for hours towards one of them."""

import socket
from collections.abc import Iterator
from pathlib import Path

from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Problem
from zimage_train.io import atomic, operating_system

DIGEST = "0" * 64
WANDB_IMAGE = "wandb/offline-run-20260101_000000-00000000/files/media/images/previews"
"""Weights & Biases adds the label of a preview, a step and a digest; see `_paths_in_run`."""


def require_short_paths(config: Config) -> None:
    """Refuse on Windows a run whose longest path has more characters than a program may open there.

    Raises:
        ConfigError: says how long it would be, and what to shorten by how much.
    """
    if not operating_system.is_windows():
        return
    root = (Path(config.output_dir) / config.name).absolute()
    cached = cache_dir(config).absolute() / "latents" / DIGEST[:2] / f"{DIGEST}.safetensors"
    lengths = {
        "output_dir or name": max(map(_length, _paths_in_run(config, root))),
        "cache.folder": _length(atomic.temporary_path(cached)),
    }
    most = operating_system.WINDOWS_PATH_LENGTH
    problems: list[Problem] = []
    for what, length in lengths.items():
        if length > most:
            message = f"a path of this run would have {length} characters, and Windows opens {most}"
            problems.append(Problem(what, message, f"shorten {what} by {length - most}"))
    if problems:
        raise ConfigError(*problems)


def _paths_in_run(config: Config, root: Path) -> Iterator[Path]:
    """Yield the longest path of each kind that a run writes below `root`."""
    step = f"{config.train.steps:06d}"
    for name in (config.name, f"{config.name}-{step}"):
        yield atomic.temporary_path(root / "lora" / "ema" / f"{name}.safetensors")
        yield atomic.temporary_path(root / "lora" / "ema" / f"{name}.comfyui.json")
    yield atomic.temporary_path(root / "checkpoints" / f"step-{step}.safetensors")
    yield atomic.temporary_path(root / "rehearsal.safetensors")
    yield atomic.temporary_path(root / "samples" / "also" / f"{step}-00.png")
    if config.log.tensorboard:
        yield root / "tensorboard" / f"events.out.tfevents.1700000000.{socket.gethostname()}.000000.0"
    if config.log.wandb is not None:
        yield root / f"{WANDB_IMAGE}/00_{step}_{DIGEST[:20]}.png"


def _length(path: Path) -> int:
    """The characters of a path as Windows counts them: rare ones count twice."""
    return len(str(path).encode("utf-16-le")) // 2
