"""The LoRA files that the page offers: those of the runs, those that it has made, and those in the open folders."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zimage_train.errors import ConfigError, DataError, Problem
from zimage_train.ui import run_state
from zimage_train.ui.workspace import RUN_NAME, Workspace

MADE = "lora-files"
"""Folder, in that of the runs, of files that the page has made or was given."""
SEARCH_SECONDS, SEARCH_DEPTH, MAX_FILES = 1.5, 5, 500
"""Limits of the search in the open folders, one of which may be a home directory."""
MAX_BYTES = 3_000_000_000
"""A larger file is a model, not a LoRA."""
SKIPPED = {"node_modules", "site-packages", "checkpoints", "cache", "transformer", "text_encoder", "vae"}
"""Folders of files that are no LoRAs."""


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file, and how the page calls it."""

    path: Path
    label: str


def list_loras(workspace: Workspace) -> list[LoraChoice]:
    """Return the LoRA files of the workspace: of runs, the last that changed first, then others."""
    choices: list[LoraChoice] = []
    for state in run_state.list_runs(workspace.runs):
        for path in loras_of_run(state.folder):
            choices.append(LoraChoice(path, f"{state.name}: {path.relative_to(state.folder / 'lora')}"))
    for path in sorted((workspace.runs / MADE).glob("*.safetensors")):
        choices.append(LoraChoice(path, path.name))
    known = {choice.path for choice in choices}
    deadline = time.monotonic() + SEARCH_SECONDS
    for folder in workspace.folders:
        for path in _files_below(folder, deadline):
            if path not in known and not path.is_relative_to(workspace.runs) and len(choices) < MAX_FILES:
                known.add(path)
                choices.append(LoraChoice(path, f"{folder.name or folder}/{path.relative_to(folder)}"))
    return choices


def loras_of_run(folder: Path) -> list[Path]:
    """Return the LoRAs of a run: the finished one first, then those of its steps from the last on, then averages."""
    lora = folder / "lora"
    finished = lora / f"{folder.name}.safetensors"
    steps = sorted((path for path in lora.glob("*.safetensors") if path != finished), reverse=True)
    averages = sorted((lora / "ema").glob("*.safetensors"), reverse=True)
    return [*([finished] if finished.exists() else []), *steps, *averages]


def newest_lora(folder: Path, is_average: bool = False) -> Path | None:
    """Return the finished LoRA of a run, or that of its last step; None before the first save.

    Args:
        is_average: whether to return the average over steps in its place, where the run has one.
    """
    paths = loras_of_run(folder)
    averages = [path for path in paths if path.parent.name == "ema"]
    if is_average and averages:
        finished = [path for path in averages if path.stem == folder.name]
        return (finished or averages)[0]
    return paths[0] if paths else None


def find_lora(workspace: Workspace, name: str) -> Path:
    """Return the LoRA that `name` stands for: a run, for its newest LoRA, or a file in the folders of the page.

    Raises:
        ConfigError: the path is outside.
        DataError: there is no such file, or the run has saved no LoRA yet.
    """
    if RUN_NAME.fullmatch(name) and run_state.is_run(workspace.run(name)):
        newest = newest_lora(workspace.run(name))
        if newest is None:
            raise DataError(Problem(f"run {name}", "has saved no LoRA yet", "wait for its first save", "missing-file"))
        return newest
    if not name:
        raise ConfigError(Problem("LoRA", "is empty", "choose a file", "bad-argument"))
    path = Path(name).expanduser()
    found = workspace.contain(path if path.is_absolute() else workspace.runs / path)
    if not found.exists():
        raise DataError(Problem(name, "does not exist", "choose another LoRA", "missing-file"))
    return found


def _files_below(folder: Path, deadline: float) -> Iterator[Path]:
    """Yield the files below `folder` that may be LoRAs, as far as the limits of a search allow."""
    depth = len(folder.parts)
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if time.monotonic() > deadline:
            return
        is_deep = len(here.parts) - depth >= SEARCH_DEPTH
        folders[:] = [] if is_deep else sorted(name for name in folders if name[0] != "." and name not in SKIPPED)
        for name in sorted(names):
            path = here / name
            if name.endswith(".safetensors") and path.is_file() and path.stat().st_size < MAX_BYTES:
                yield path
