"""Runs of the kinds of adapters whose layers run as modules, and what the tools do with their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import pixels
from safetensors.torch import load_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.diffusion.request import preview_requests
from zimage_train.errors import ConfigError
from zimage_train.lora import headers, lora_file, verify
from zimage_train.planning.preflight import check_run

from helpers import folder, losses, run_in_two_starts
from lora_commands import lora_command

pytestmark = pytest.mark.slow

LOHA: dict[str, Any] = {"type": "loha", "rank": 4, "alpha": 2.0}
DORA: dict[str, Any] = {"type": "dora", "rank": 4, "alpha": 2.0}
OFT: dict[str, Any] = {"type": "oft", "rank": 8}
KINDS = pytest.mark.parametrize("lora", [LOHA, DORA, OFT], ids=lambda lora: lora["type"])
PROMPT = "a red zorb on a blue background"


@pytest.fixture
def make_kind(make_config):
    def make(lora: dict[str, Any], **changes: Any) -> Config:
        # An OFT is refused beside the training adapter.
        alone = {"adapter": None} if lora["type"] == "oft" else {}
        return make_config(lora=lora, optimizer={"lr": 4e-3}, **changes | {"model": alone | changes.get("model", {})})

    return make


def draw(output: Path, model: Path, *loras: str, seed: int = 5) -> np.ndarray:
    """What `sample` draws with `loras`."""
    arguments = [word for lora in loras for word in ("--lora", lora)]
    sizes = ["--prompt", PROMPT, "--seed", str(seed), "--width", "64", "--height", "64", "--dtype", "fp32"]
    where = [str(model), "--extras", str(mini.TURBO)]
    done = CliRunner().invoke(app, ["sample", *where, *arguments, *sizes, "--output", str(output)])
    assert done.exit_code == 0, done.output
    return pixels(output / f"sample-{seed}.png")


@KINDS
@pytest.mark.parametrize(
    "more",
    [{}, {"model": {"quantize": "int8"}}, {"memory": {"offload": 0.5}}],
    ids=["plain", "int8", "streamed"],
)
def test_run_resumes_to_the_bit(make_kind, monkeypatch, capsys, lora: dict[str, Any], more: dict[str, Any]):
    """A run that is stopped ends with the same bits, its average too, and is known to be complete after it."""
    more = more | {"train": {"steps": 4}, "ema": {"decay": 0.9}}
    whole, stopped = make_kind(lora, name="whole", **more), make_kind(lora, **more)
    run_training(whole, fresh=False)
    run_in_two_starts(stopped, monkeypatch)
    assert losses(stopped) == losses(whole)
    paths = [folder(config) / "lora" / "ema" / f"{config.name}.safetensors" for config in (whole, stopped)]
    paths += [folder(config) / "lora" / f"{config.name}.safetensors" for config in (whole, stopped)]
    averages, other_averages, ends, other_ends = map(load_file, paths)
    for tensors, others in ((averages, other_averages), (ends, other_ends)):
        assert tensors.keys() == others.keys() and all((tensors[key] == others[key]).all() for key in tensors)
    assert any((averages[key] != ends[key]).any() for key in ends)
    assert json.loads((folder(whole) / "run.json").read_text())["lora"]["type"] == lora["type"]
    capsys.readouterr()
    run_training(stopped, fresh=False)
    assert "tiny is complete" in capsys.readouterr().out


@KINDS
def test_tools_take_the_file(make_kind, tmp_path: Path, lora: dict[str, Any]):
    """The last preview is what `sample` draws with the file, and a baked model draws the same without it."""
    sample = {"every": 30, "first": False, "width": 64, "height": 64, "prompts": [PROMPT]}
    config = make_kind(lora, train={"steps": 30}, sample=sample)
    run_training(config, fresh=False)
    path = folder(config) / "lora" / "tiny.safetensors"
    code, said = lora_command("verify", path, "--model", mini.TURBO)
    assert code == 0 and "ComfyUI loads 42/42, diffusers" in said and "not this kind" in said
    code, said = lora_command("inspect", path)
    assert code == 0 and "read by  ComfyUI\n" in said
    seed = preview_requests(config)[0].seed
    alone, without = draw(tmp_path / "alone", mini.TURBO, str(path), seed=seed), draw(tmp_path / "without", mini.TURBO)
    assert np.abs(alone - pixels(folder(config) / "samples" / "000030-00.png")).max() <= 1
    assert np.abs(alone - without).max() > 8
    weights = ["--dtype", "fp32", "--to", "diffusers", "-o", tmp_path / "baked"]
    code, said = lora_command("bake", mini.TURBO, "--lora", path, *weights)
    assert code == 0, said
    assert np.abs(draw(tmp_path / "drawn", tmp_path / "baked", seed=seed) - alone).max() <= 1
    code, said = lora_command("merge", f"{path}=1", f"{path}=1", "-o", tmp_path / "m.safetensors")
    assert code == 4 and f"is a {config.lora.label} (42 modules" in said


def test_a_loha_becomes_a_lora(make_kind, tmp_path: Path):
    config = make_kind(LOHA, train={"steps": 30})
    run_training(config, fresh=False)
    path = folder(config) / "lora" / "tiny.safetensors"
    code, said = lora_command("resize", path, "--rank", 16, "-o", tmp_path / "lora.safetensors", "--dtype", "fp32")
    assert code == 0 and "LoHa -> rank 16: keeps 100.00%" in said  # the square of its rank
    code, said = lora_command("diff", path, tmp_path / "lora.safetensors")
    assert code == 0 and "|B| / |A| = 1, cosine 1.000" in said


@KINDS
def test_run_begins_with_the_file(make_config, make_kind, lora: dict[str, Any]):
    first = make_kind(lora, name="first", train={"steps": 4})
    run_training(first, fresh=False)
    path = folder(first) / "lora" / "first.safetensors"
    still = {"train": {"steps": 1}, "optimizer": {"lr": 1e-12, "weight_decay": 0.0}, "model": {"adapter": None}}
    again = {key: value for key, value in lora.items() if key != "alpha"} | {"init_from": str(path)}
    second = make_config(name="second", lora=again, **still)
    run_training(second, fresh=False)
    before = lora_file.read_deltas(path, headers.READ)
    after = lora_file.read_deltas(folder(second) / "lora" / "second.safetensors", headers.READ)
    assert before.keys() == after.keys() and len(before) == 42
    assert max(verify.relative_error(before[module], after[module]) for module in before) < 1e-5
    other = {4: 8, 8: 4}[lora["rank"]]
    todo = "lora.rank: 8" if lora["type"] == "oft" else "lora.rank to what it was trained"
    with pytest.raises(ConfigError, match=rf"has .*{lora['rank']}.*, and this run .*{other}.*; set {todo}"):
        check_run(make_config(lora=again | {"rank": other}, **still))
