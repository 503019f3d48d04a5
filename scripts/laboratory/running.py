"""Runs of the trainer, each in a process of its own; a stopped run goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml


def lora_of(config: dict[str, Any]) -> Path:
    """The file that a run ends with."""
    return Path(config["output_dir"]) / config["name"] / "lora" / f"{config['name']}.safetensors"


def train(config: dict[str, Any]) -> None:
    """Trains a run to its end, unless its LoRA is there and newer than the LoRA that it begins with.

    What it says goes to a file beside it.

    Raises:
        RuntimeError: it fails.
    """
    runs = Path(config["output_dir"])
    runs.mkdir(parents=True, exist_ok=True)
    path, log = runs / f"{config['name']}.yaml", runs / f"{config['name']}.txt"
    text = yaml.safe_dump(config, sort_keys=False)
    if lora_of(config).exists() and path.read_text() == text and not is_outdated(config):
        return
    path.write_text(text)
    began = time.monotonic()
    with log.open("w") as told:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "zimage_train", "train", str(path)]
        done = subprocess.run(command, stdout=told, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{path} ended with {done.returncode}; see {log}")
    print(f"{config['name']}: {time.monotonic() - began:.0f} s", flush=True)


def is_outdated(config: dict[str, Any]) -> bool:
    """Whether the LoRA that the run began with was trained again since."""
    first = config["lora"].get("init_from")
    return first is not None and Path(first).stat().st_mtime > lora_of(config).stat().st_mtime


def in_parallel(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Does all of `jobs`, so many at once; the first error ends it after those that are under way."""
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
