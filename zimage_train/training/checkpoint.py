"""Save and load checkpoints.

Each is a safetensors file with a digest of its own content, renamed into place once it is complete. It holds the
LoRA's fp32 weights, their moving average if any, and the optimizer's state. It holds no random, loader or
scheduler state: those are functions of the step.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zimage_train import __version__
from zimage_train.errors import DivergedError, Problem, WeightsError
from zimage_train.io import atomic, tensorfile
from zimage_train.io.json_text import parse_json

FORMAT = 3
"""Version of the names and layout of the tensors. 1 and 2 were used before the first release."""
ARITHMETIC = 2
"""Raised by every change after which the same step of the same run gives other bits, so that a run is not continued
with arithmetic that its first steps did not have."""
NAME = re.compile(r"step-(\d{6,})\.safetensors")
KEEP = 2
"""Number of checkpoints that are kept; the older checkpoint is for the case that the newest is damaged."""


class OtherVersionError(WeightsError):
    """An intact checkpoint has the format or the arithmetic of another version of this program."""


@dataclass(frozen=True)
class Checkpoint:
    """The state that a run continues from."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    """By name; the prefix `lora.`, `ema.` or `optim.` tells whose state it is."""
    metadata: dict[str, Any]
    """All that is no tensor: versions, step, the optimizer's numbers and the identity of the run."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix`."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> list[Path]:
    """Write the checkpoint of `step`, then remove all but the newest two; return the files that could not be removed.

    Raises:
        DivergedError: a tensor is not finite; nothing is written.
        DiskError: it cannot be written; the older checkpoints are still there.
    """
    not_finite = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if not_finite:
        raise DivergedError(
            Problem(
                f"step {step}", f"{not_finite[0]} is not finite", "lower optimizer.lr; nothing was saved", "not-finite"
            )
        )
    path = folder / f"step-{step:06d}.safetensors"
    state = {"format": FORMAT, "arithmetic": ARITHMETIC, "version": __version__, "step": step, **metadata}
    tensorfile.save_with_digest(path, tensors, {"state": json.dumps(state)})
    return [old for _, old in steps_in(folder)[KEEP:] if not atomic.remove(old)]


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of every checkpoint, newest first.

    The step comes from the name: copying a folder may change modification times.
    """
    if not folder.is_dir():
        return []
    steps = []
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match and path.is_file():
            steps.append((int(match[1]), path))
    return sorted(steps, reverse=True)


def load_newest(folder: Path, warn: Any) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if there never was any.

    Newer checkpoints that are damaged are renamed to `.corrupt` and reported by `warn(text)`.

    Raises:
        WeightsError: there are checkpoints, or were before they were renamed, and none of them is intact.
        OtherVersionError: the newest intact checkpoint has another format or arithmetic; it stays where it is.
    """
    candidates = steps_in(folder)
    for _, path in candidates:
        try:
            return load(path)
        except OtherVersionError:
            raise
        except WeightsError as error:
            backup = atomic.rename_as_backup(path, ".corrupt")
            warn(f"{path}: {error.problems[0].message}; set aside as {backup.name}")
    damaged = sorted(folder.glob("*.corrupt*")) if folder.is_dir() else []
    if damaged:
        what = f"no checkpoint is intact ({', '.join(path.name for path in damaged)})"
        raise WeightsError(Problem(str(folder), what, "begin again with --fresh", "damaged-checkpoints"))
    return None


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        WeightsError: it is damaged or no checkpoint.
        OtherVersionError: it has another format, or arithmetic with which the next steps would differ.
    """
    tensors, header = tensorfile.load_with_digest(path)
    try:
        metadata = parse_json(header["state"])
        step, versions = metadata["step"], (metadata["format"], metadata.get("arithmetic"))
    except (KeyError, ValueError, TypeError):
        what = "is not a checkpoint of zimage-train"
        raise WeightsError(Problem(str(path), what, "remove it", "not-a-checkpoint")) from None
    if versions != (FORMAT, ARITHMETIC):
        message, hint = _other_version(metadata)
        raise OtherVersionError(Problem(str(path), message, hint, "other-version"))
    return Checkpoint(path, step, tensors, metadata)


def _other_version(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """Return the message and the hint for a checkpoint of another format or arithmetic."""
    version = metadata.get("version", "0.1.0 before its release")
    if metadata["format"] != FORMAT:
        difference = f"format {metadata['format']}, and this version ({__version__}) reads format {FORMAT}"
    else:
        difference = f"arithmetic {metadata.get('arithmetic')}, and this version ({__version__}) has {ARITHMETIC}"
    todo = "continue with that version, or begin again with --fresh; its exported LoRA can be lora.init_from"
    return f"was written by zimage-train {version} with {difference}", todo
