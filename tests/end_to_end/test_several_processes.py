"""Several processes: each holds the frozen model by its own plan, and together they take the steps of one process."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zimage_train.commands.train import run_training
from zimage_train.config import strict_yaml
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config

from helpers import facts, losses
from mini_config import mini_values

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
STEPS = 3
SMALL_CARD = 6_000_000
"""Bytes that the miniature in int8 exceeds, unless blocks are streamed."""

WATCHED = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
from zimage_train.commands import train
from zimage_train.config.load import read_config
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.planning import devices
from zimage_train.training import checkpoint

rank, log = int(os.environ["RANK"]), Path(sys.argv[2])

def watched(kind, original, name_of):
    def call(*args, **options):
        with log.open("a") as file:
            file.write(json.dumps([rank, kind, name_of(*args)]) + "\\n")
        return original(*args, **options)
    return call

limits = json.loads(sys.argv[3])
if limits:
    of_device = devices.device_limits
    devices.device_limits = lambda device: replace(of_device(device), limit_bytes=limits[rank])
TensorCache.write = watched("cached", TensorCache.write, lambda cache, key, *rest: str(key))
checkpoint.save = watched("saved", checkpoint.save, lambda folder, step, *rest: str(step))
build = train.build_state
train.build_state = watched(
    "planned", build, lambda context, plan, *rest: [plan.placement.quantization, plan.placement.streamed]
)
train.run_training(read_config(Path(sys.argv[1])), fresh=False)
"""


def values_of(root: Path, cache: Path, accumulation: int, **changes: Any) -> dict[str, Any]:
    train = {"steps": STEPS, "batch_size": 1, "grad_accumulation": accumulation}
    return mini_values(root, cache, name="run", train=train, **changes)


def launched(launcher: list[str], root: Path, values: dict[str, Any], limits: list[int]) -> list[list[Any]]:
    """Train with two processes; return what they did, as [rank, kind, what]."""
    root.mkdir(parents=True, exist_ok=True)
    config, driver, log = root / "config.yaml", root / "driver.py", root / "log.jsonl"
    config.write_text(strict_yaml.dump(values))
    driver.write_text(WATCHED)
    command = [sys.executable, *launcher, str(driver), str(config), str(log), json.dumps(limits)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line) for line in log.read_text().splitlines()]


def config_of(values: dict[str, Any]) -> Config:
    config, problems = validate_config(values, str)
    assert config is not None, problems
    return config


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_each_process_by_its_own_plan(tmp_path: Path, launcher: list[str]):
    """A card that is too small streams int8 weights, the other holds them; the steps are those of one process.

    Each latent and each embedding is encoded by one process alone, and only the main process saves.
    """
    model = {"quantize": "int8"}
    alone = config_of(values_of(tmp_path / "alone", tmp_path / "cache-alone", 2, model=model))
    run_training(alone, fresh=False)
    assert facts(alone)["plan"]["streamed"] == 0, "with all memory, nothing is streamed"
    values = values_of(tmp_path / "runs", tmp_path / "cache", 1, model=model)
    did = launched(launcher, tmp_path / "two", values, [10**10, SMALL_CARD])
    plans = {rank: what for rank, kind, what in did if kind == "planned"}
    assert plans[0] == ["int8", 0] and plans[1][0] == "int8" and plans[1][1] > 0
    cached = Counter(what for _, kind, what in did if kind == "cached")
    assert set(cached.values()) == {1} and {rank for rank, kind, _ in did if kind == "cached"} == {0, 1}
    assert [(rank, what) for rank, kind, what in did if kind == "saved"] == [(0, str(STEPS))]
    assert losses(config_of(values)) == pytest.approx(losses(alone), rel=1e-5)
