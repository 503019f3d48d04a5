"""LoRA files, read by ComfyUI's and AI Toolkit's own code in processes of their own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_train.errors import ConfigError, Problem, ZImageTrainError
from zimage_train.io import atomic, tensorfile
from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import headers, lora_file
from zimage_train.lora.deltas import Factors, Lora
from zimage_train.measure import load_in_aitoolkit, load_in_comfyui
from zimage_train.measure.proofs.claims import Claim, not_tried
from zimage_train.measure.proofs.processes import LONGEST_SECONDS, environment
from zimage_train.models import native_keys
from zimage_train.models.arch import TransformerShape

COMPUTED_ALIKE = 1e-6
"""Relative error of a change that both compute in fp32 from the same factors."""
NUM_DIRECTIONS = 8
"""Columns that changes are multiplied with. Changes that differ have other products with random columns, but for a
chance of zero, and all changes together fill 24 GB."""


INTERPRETERS = (
    *("venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe", ".venv/Scripts/python.exe"),
    "../python_embeded/python.exe",
)
"""Where checkouts have the interpreter of their own environment; the last is that of ComfyUI's portable version."""


RUN_PROGRAM = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs a program without its folder among those that modules are imported from, as `-P` does since Python 3.11."""


@dataclass(frozen=True)
class Project:
    """A project whose code loads LoRAs of Z-Image."""

    name: str
    option: str
    """The option that gives its folder."""
    marker: str
    """A file of its source."""
    program: str
    """The program that loads a LoRA with its code."""
    remark: str = ""
    """What to know about the keys that it reads."""


COMFYUI = Project("ComfyUI", "--comfyui", "comfy/lora.py", load_in_comfyui.__file__)
AI_TOOLKIT = Project(
    "AI Toolkit",
    "--aitoolkit",
    "toolkit/lora_special.py",
    load_in_aitoolkit.__file__,
    "; it takes alpha as the rank, and never reads it",
)


def require_project(project: Project, folder: Path) -> None:
    """Require that `folder` holds the source of `project`.

    Raises:
        ConfigError: it does not.
    """
    if not folder.is_dir():
        raise ConfigError(Problem(project.option, f"{folder} does not exist", "check the path", "missing-file"))
    if not (folder / project.marker).is_file():
        message = f"is not the source of {project.name}: it has no {project.marker}"
        raise ConfigError(Problem(project.option, message, "give the folder of its checkout", "missing-file"))


def loader_claims(project: Project, folder: Path, lora: Path, shape: TransformerShape) -> Iterator[Claim]:
    """Yield claims on the LoRA file `lora`, as the code of `project` in `folder` loads it into a model of `shape`.

    Raises:
        ZImageTrainError: the project is not there, or it cannot be imported, or its loader fails.
    """
    reads = f"{project.name}'s own loader reads every key of a LoRA"
    changes = f"{project.name}'s own loader gives every module the change that is stored"
    require_project(project, folder)
    deltas = lora_file.read_deltas(lora, headers.READ)
    stored = {module: delta for module, delta in deltas.items() if isinstance(delta, Factors)}
    if len(stored) < len(deltas):
        for promise in (reads, changes):
            yield not_tried(promise, "only plain LoRAs are compared")
        return
    lora_file.require_modules(lora, stored, shape.linears)
    directions = _directions(shape)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tensorfile.save(place / "directions.safetensors", directions, {})
        atomic.write_json(place / "request.json", _request(shape, stored))
        outcome, changed = _run(project, folder, lora, place)
        program = f"{project.name} {outcome['version']}"
        if "refused" in outcome:
            for promise in (reads, changes):
                yield not_tried(promise, f"{program} {outcome['refused']}")
            return
        found = _split_fused(changed)
    unread = outcome["unread"]
    note = f"{program}, {len(read_header(lora).tensors)} keys{project.remark}"
    note += f"; such as {unread[0]}" if unread else ""
    yield Claim(reads, len(unread), "keys that are not read", 0, "equality", note)
    note = f"{program}, {len(stored)} modules, each in {NUM_DIRECTIONS} random directions"
    yield Claim(changes, _worst_error(stored, found, directions), "of the change", COMPUTED_ALIKE, "equality", note)


def _request(shape: TransformerShape, lora: Lora) -> dict[str, Any]:
    """Return what the programs read: the model under ComfyUI's names and as diffusers' config, and the LoRA's rank."""
    weights: dict[str, tuple[int, ...]] = {}
    for name, size in shape.parameters.items():
        native, third = native_keys.to_native(name)
        weights[native] = size if third is None else (3 * size[0], *size[1:])
    rank = max(factors.rank for factors in lora.values())
    return {"weights": weights, "config": shape.config(), "rank": rank}


def _directions(shape: TransformerShape) -> dict[str, Tensor]:
    """Return number of inputs -> random columns (in, n) in fp64."""
    draw = torch.Generator().manual_seed(0)
    numbers = sorted({inputs for _, inputs in shape.linears.values()})
    return {str(n): torch.randn(n, NUM_DIRECTIONS, dtype=torch.float64, generator=draw) for n in numbers}


def _run(project: Project, folder: Path, lora: Path, place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the outcome of the program of `project`, and the changes by its names.

    Raises:
        ZImageTrainError: the project cannot be imported, or its loader fails.
    """
    command = [
        python_of(folder),
        "-c",
        RUN_PROGRAM,
        project.program,
        *map(str, (folder.resolve(), lora.resolve(), place)),
    ]
    # No GPU is needed, and its memory may be in use; nothing is written into the folder of the project.
    settings = {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command,
        cwd=place,
        env=environment() | settings,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=LONGEST_SECONDS,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        hint = "update it, if it is older than Z-Image; otherwise report this line and its version"
        raise ZImageTrainError(Problem(project.option, f"its loader failed: {lines[-1]}", hint, "command-failed"))
    changed, metadata = tensorfile.load(place / "outcome.safetensors")
    outcome = json.loads(metadata["outcome"])
    if "missing" in outcome:
        message = f"{project.name} cannot be imported ({outcome['missing']})"
        hint = "install what its requirements.txt names, into an environment `venv` in its folder"
        raise ZImageTrainError(Problem(project.option, message, hint, "missing-package"))
    return outcome, changed


def python_of(folder: Path) -> str:
    """Return the interpreter of a checkout's own environment, which has what it requires, or else this one."""
    for place in INTERPRETERS:
        if (folder / place).is_file():
            return str((folder / place).absolute())
    return sys.executable


def _split_fused(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the changes under diffusers' names, which are those of the file."""
    split: dict[str, Tensor] = {}
    for native, change in changes.items():
        names = [name for name, _ in native_keys.from_native(native)]
        split |= dict(zip(names, change.chunk(len(names)), strict=True))
    return split


def _worst_error(stored: Lora, changes: dict[str, Tensor], directions: dict[str, Tensor]) -> float:
    """Return the largest relative error of a module; infinite if other modules are changed than the file stores."""
    found = {module: change for module, change in changes.items() if module in stored or change.any()}
    if found.keys() != stored.keys():
        return float("inf")
    errors: list[float] = []
    for module, factors in stored.items():
        expected = factors.scale * (factors.b.double() @ (factors.a.double() @ directions[str(factors.shape[1])]))
        norm, error = float(expected.norm()), float((found[module] - expected).norm())
        errors.append(error / norm if norm > 0 else error)
    return float(torch.tensor(errors).max())  # which is NaN if one is, other than that of max()
