"""The check of fused blocks before step 1, with plain regions in place of the kernels of a GPU."""

from pathlib import Path

import pytest
import torch

from zimage_train.commands.train import run_training
from zimage_train.errors import ConfigError
from zimage_train.lora import fused_block
from zimage_train.models import region_ops, regions
from zimage_train.training import checkpoint

from helpers import facts, folder, losses


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(region_ops, "has_kernels", lambda device: True)


def break_swiglu(monkeypatch: pytest.MonkeyPatch, swiglu) -> None:
    """Replace an operation of fused blocks."""
    monkeypatch.setattr(region_ops, "swiglu", swiglu)
    assert fused_block.region_ops is region_ops


def trained(config) -> tuple[bytes, str]:
    run_training(config, fresh=False)
    log = (folder(config) / "log.txt").read_text()
    return Path(folder(config) / "lora" / f"{config.name}.safetensors").read_bytes(), log


def test_blocks_that_agree_are_used(make_config):
    config = make_config(train={"steps": 2})
    _, log = trained(config)
    found = facts(config)["fused_blocks"]
    assert found["failure"] is None and 0 <= found["distance"] < 1e-5
    assert "fused blocks are off" not in log


def raising(u: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor) -> None:
    raise RuntimeError("no kernel image is available\nand more")


def wrong(u: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor) -> None:
    regions.swiglu(u, v, out=out)
    out.mul_(1.1)


def not_a_number(u: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor) -> None:
    out.fill_(torch.nan)


@pytest.mark.parametrize(
    ("swiglu", "said"),
    [
        (raising, "RuntimeError: no kernel image is available"),
        (wrong, "differ from diffusers' blocks by 0."),
        (not_a_number, "differ from diffusers' blocks by nan"),
    ],
)
def test_blocks_that_fail_are_off(make_config, monkeypatch, swiglu, said: str):
    """If fused blocks fail or differ, the run says so and trains with diffusers' blocks."""
    break_swiglu(monkeypatch, swiglu)
    config = make_config(train={"steps": 2})
    _, log = trained(config)
    assert "NaN" not in (folder(config) / "run.json").read_text()
    assert said in facts(config)["fused_blocks"]["failure"]
    assert "fused blocks are off in this run, which is slower and takes more memory: " in log and said in log
    records = (folder(config) / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 2 and all('"loss": null' not in line for line in records)


def test_memory_may_run_out(make_config, monkeypatch):
    """Running out of memory is no failure of the kernels."""

    def exhausted(u: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    break_swiglu(monkeypatch, exhausted)
    config = make_config(train={"steps": 2})
    with pytest.raises(ConfigError, match="CUDA out of memory"):
        run_training(config, fresh=False)
    assert "fused blocks are off" not in (folder(config) / "log.txt").read_text()


def saved_path(config) -> str:
    newest = checkpoint.steps_in(folder(config) / "checkpoints")[0][1]
    return checkpoint.load(newest).metadata["path"]


def test_run_keeps_its_path(make_config, monkeypatch):
    """A run is continued with what computed its blocks, or refused, or goes on with another if that is allowed."""
    run_training(make_config(train={"steps": 2}), fresh=False)
    assert saved_path(make_config()) == "triton on cpu"
    longer = make_config(train={"steps": 4})
    monkeypatch.setattr(region_ops, "has_kernels", lambda device: False)
    with pytest.raises(ConfigError) as error:
        run_training(longer, fresh=False)
    (problem,) = error.value.problems
    assert problem.code == "other-path" and error.value.exit_code == 2
    assert "began with blocks computed by triton on cpu, and this machine computes them by plain on cpu" in str(problem)
    assert "--allow path" in problem.hint
    assert len(losses(longer)) == 2
    run_training(longer, fresh=False, allow=("path",))
    assert len(losses(longer)) == 4 and saved_path(longer) == "plain on cpu"


def test_run_that_fell_back_stays(make_config, monkeypatch):
    """A run that began with diffusers' blocks goes on with them, also where fused blocks work."""
    whole = make_config(name="whole", train={"steps": 4}, lora={"rank": 4})
    with monkeypatch.context() as patch:
        break_swiglu(patch, wrong)
        run_training(whole, fresh=False)
        run_training(make_config(train={"steps": 2}), fresh=False)
    assert saved_path(make_config()) == "modules on cpu"
    longer = make_config(train={"steps": 4})
    run_training(longer, fresh=False)
    assert saved_path(longer) == "modules on cpu" and losses(longer) == losses(whole)


def test_kernels_that_fail_later(make_config, monkeypatch):
    """Where the kernels of a run fail, it is not continued with others, unless that is allowed."""
    run_training(make_config(train={"steps": 2}), fresh=False)
    break_swiglu(monkeypatch, raising)
    longer = make_config(train={"steps": 4})
    with pytest.raises(ConfigError, match="fused blocks fail here: RuntimeError: no kernel image"):
        run_training(longer, fresh=False)
    assert len(losses(longer)) == 2
    run_training(longer, fresh=False, allow=("path",))
    assert len(losses(longer)) == 4 and saved_path(longer) == "modules on cpu"
