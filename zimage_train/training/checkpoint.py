"""Checkpoints: one sealed safetensors file each, one rename each. Newest valid first; the damaged are set aside.

A checkpoint holds the LoRA masters and the optimizer, and no random state, loader or schedule: those are functions of
the step.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zimage_train.errors import DivergedError, Problem, WeightsError
from zimage_train.io import atomic, tensorfile

FORMAT = 2
NAME = re.compile(r"step-(\d{6,})\.safetensors")
KEEP = 2


class OtherFormatError(WeightsError):
    """A whole checkpoint of another version of this program: nothing is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> list[Path]:
    """Write the checkpoint of `step`, then remove all but the newest two; returns those that cannot be removed.

    Raises:
        DivergedError: a tensor is not finite; nothing is written.
        DiskError: it cannot be written; the older ones are still there.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise DivergedError(Problem(f"step {step}", f"{bad[0]} is not finite", "lower optimizer.lr; nothing was saved"))
    path = folder / f"step-{step:06d}.safetensors"
    state = {"format": FORMAT, "step": step, **numbers}
    tensorfile.save_with_digest(path, tensors, {"state": json.dumps(state)})
    return [old for _, old in steps_in(folder)[KEEP:] if not atomic.remove(old)]


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every checkpoint by name, newest step first; times of change do not matter."""
    if not folder.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_file()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def load_newest(folder: Path, warn: Any) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged newer ones are renamed to `.corrupt` and reported by `warn(text)`.

    Raises:
        WeightsError: there are checkpoints, or were before they were set aside, and none of them is whole.
        OtherFormat: the newest is of another version; it stays where it is.
    """
    candidates = steps_in(folder)
    for _, path in candidates:
        try:
            return load(path)
        except OtherFormatError:
            raise
        except WeightsError as error:
            aside = atomic.rename_as_backup(path, ".corrupt")
            warn(f"{path}: {error.problems[0].message}; set aside as {aside.name}")
    damaged = sorted(folder.glob("*.corrupt*")) if folder.is_dir() else []
    if damaged:
        what = f"no checkpoint is whole ({', '.join(path.name for path in damaged)})"
        raise WeightsError(Problem(str(folder), what, "begin again with --fresh"))
    return None


def load(path: Path) -> Checkpoint:
    """Read and check one checkpoint.

    Raises:
        WeightsError: damaged, or of another format.
    """
    tensors, metadata = tensorfile.load_with_digest(path)
    try:
        numbers = json.loads(metadata["state"])
        step, version = numbers["step"], numbers["format"]
    except (KeyError, ValueError, TypeError):
        raise WeightsError(Problem(str(path), "is not a checkpoint of zimage-train", "remove it")) from None
    if version != FORMAT:
        what = f"has format {version}, this version reads {FORMAT}"
        todo = "continue with the version that wrote it, or begin again with --fresh"
        raise OtherFormatError(Problem(str(path), what, todo))
    return Checkpoint(path, step, tensors, numbers)
