"""A run that goes on elsewhere: in another folder, with other processes, with a checkpoint of an earlier version."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config import strict_yaml
from zimage_train.config.load import read_config, validate_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.io import tensorfile
from zimage_train.report.metrics import read_records
from zimage_train.training import checkpoint

from helpers import facts, final, folder, losses, numbers, stop_after
from mini_config import mini_values

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zimage_train", "train"]
FORMATS = Path(__file__).parents[1] / "golden" / "checkpoints"
STEPS = 4


def test_a_copied_folder_goes_on(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With run, images and model in other folders, a run goes on bit for bit."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(mini.IMAGES, here / "photos")
    shutil.copytree(mini.TURBO, here / "model")

    def config_in(place: Path, name: str = "run") -> Config:
        data = [{"folder": str(place / "photos"), "resolution": [64], "trigger": "zorb"}]
        model = {"path": str(place / "model")}
        return make_config(name=name, output_dir=str(place / "runs"), data=data, model=model)

    whole = config_in(here, "whole")
    run_training(whole, fresh=False)
    with monkeypatch.context() as patch, pytest.raises(Exception, match="after step 2"):
        stop_after(patch, 2)
        run_training(config_in(here), fresh=False)
    shutil.copytree(here, there)
    shutil.rmtree(here / "model")
    run_training(config_in(there), fresh=False)
    assert facts(config_in(there))["starts"] == [0, 2]
    assert numbers(config_in(there)) == numbers(whole) and losses(config_in(there)) == losses(whole)


def settings(root: Path, cache: Path, steps: int, accumulation: int) -> dict[str, Any]:
    train = {"steps": steps, "batch_size": 2, "grad_accumulation": accumulation}
    return mini_values(root, cache, name="run", train=train)


def train_alone(root: Path, cache: Path, steps: int, accumulation: int) -> Config:
    config, problems = validate_config(settings(root, cache, steps, accumulation), str)
    assert config is not None, problems
    run_training(config, fresh=False)
    return config


def train_by_two(root: Path, cache: Path, steps: int, accumulation: int) -> subprocess.CompletedProcess[str]:
    root.mkdir(exist_ok=True)
    path = root / "two.yaml"
    path.write_text(strict_yaml.dump(settings(root, cache, steps, accumulation)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *TWO, str(path)], capture_output=True, text=True, check=False, timeout=300, env=environment
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Config:
    """A process that accumulates two micro-batches in each step."""
    return train_alone(tmp_path_factory.mktemp("whole"), shared_cache, STEPS, 2)


def records(config: Config) -> list[dict[str, Any]]:
    return read_records(folder(config) / "metrics.jsonl")


@pytest.mark.parametrize("first", ["two", "one"])
def test_other_number_of_processes(tmp_path: Path, shared_cache: Path, whole: Config, first: str):
    """One process that accumulates two micro-batches takes over from two, and two from one: the same samples and noise.

    Only the order of a sum of gradients may differ, so losses are the same to 1e-5.
    """
    if first == "two":
        done = train_by_two(tmp_path, shared_cache, 2, 1)
        assert done.returncode == 0, done.stderr[-2000:]
        config = train_alone(tmp_path, shared_cache, STEPS, 2)
    else:
        config = train_alone(tmp_path, shared_cache, 2, 2)
        done = train_by_two(tmp_path, shared_cache, STEPS, 1)
        assert done.returncode == 0, done.stderr[-2000:]
    assert facts(config)["starts"] == [0, 2]
    assert losses(config) == pytest.approx(losses(whole), rel=1e-5)
    for mine, theirs in zip(records(config), records(whole), strict=True):
        assert set(mine["sigma"]) <= set(theirs["sigma"]) and set(mine["samples"]) <= set(theirs["samples"])


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_other_number_of_micro_batches(tmp_path: Path, shared_cache: Path, first: int, then: int):
    """Where a step would have more or fewer micro-batches, the run is refused, with both numbers."""
    train_alone(tmp_path, shared_cache, 2, first)
    with pytest.raises(ConfigError, match=rf"micro-batches of a step \(.*\): - {first}  \+ {then}") as error:
        train_alone(tmp_path, shared_cache, STEPS, then)
    assert error.value.exit_code == 2


def test_fewer_processes_are_refused(tmp_path: Path, shared_cache: Path):
    """A run of two processes is not continued by one that would train half of each step."""
    assert train_by_two(tmp_path, shared_cache, 2, 1).returncode == 0
    with pytest.raises(ConfigError, match=r"micro-batches of a step \(.*\): - 2  \+ 1"):
        train_alone(tmp_path, shared_cache, STEPS, 1)


def with_older_identity(path: Path) -> None:
    """Rewrite a checkpoint as it was before micro-batches were counted over all processes."""
    found = checkpoint.load(path)
    old = found.metadata["identity"]["settings"]
    counted = next(key for key in old if key.startswith("micro-batches"))
    old["train.grad_accumulation"] = old.pop(counted)
    tensorfile.save_with_digest(path, found.tensors, {"state": json.dumps(found.metadata)})


def test_identity_of_an_earlier_version(tmp_path: Path, shared_cache: Path, whole: Config):
    """A checkpoint that names train.grad_accumulation itself is continued."""
    config = train_alone(tmp_path, shared_cache, 2, 2)
    with_older_identity(folder(config) / "checkpoints" / "step-000002.safetensors")
    config = train_alone(tmp_path, shared_cache, STEPS, 2)
    assert facts(config)["starts"] == [0, 2] and final(config) == final(whole)


def kept_formats() -> list[Path]:
    return sorted(FORMATS.glob("format*"))


@pytest.mark.parametrize("kept", kept_formats(), ids=lambda path: path.name)
def test_kept_checkpoints_go_on(tmp_path: Path, shared_cache: Path, kept: Path):
    """A checkpoint of each format that was ever written goes on; on the machine that wrote it, bit for bit.

    Another processor adds in another order, which a few steps let grow to some 1e-4.
    """
    values = strict_yaml.parse((kept / "config.yaml").read_text()).value
    values |= {"output_dir": str(tmp_path / "runs"), "cache": {"folder": str(shared_cache)}}
    values["model"] |= {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1)}
    values["data"][0]["folder"] = str(mini.IMAGES)
    (tmp_path / "c.yaml").write_text(strict_yaml.dump(values))
    config = read_config(tmp_path / "c.yaml")
    checkpoints = folder(config) / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(kept / "step-000002.safetensors", checkpoints)
    run_training(config, fresh=False)
    assert facts(config)["starts"] == [2]
    assert losses(config) == pytest.approx(json.loads((kept / "losses.json").read_text()), rel=2e-3)


def test_the_present_format_is_kept():
    assert f"format{checkpoint.FORMAT}-arithmetic{checkpoint.ARITHMETIC}" in [path.name for path in kept_formats()]
