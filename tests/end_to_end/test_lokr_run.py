"""A LoKr from training to the pictures of other programs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import pixels, stock
from safetensors.torch import load_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.diffusion.request import preview_requests
from zimage_train.errors import ConfigError, WeightsError
from zimage_train.lora import lora_file, verify
from zimage_train.planning.preflight import check_run

from helpers import folder, losses, run_in_two_starts
from lora_commands import lora_command

WHOLE: dict[str, Any] = {"type": "lokr", "factor": 4, "rank": None}
LOW_RANK: dict[str, Any] = {"type": "lokr", "factor": 4, "rank": 3, "alpha": 1.5}

PROMPT = "a red zorb on a blue background"
BOTH = pytest.mark.parametrize("lora", [WHOLE, LOW_RANK], ids=["whole", "low rank"])


@pytest.fixture
def make_lokr(make_config):
    def make(lora: dict[str, Any], **changes: Any) -> Config:
        return make_config(lora=lora, optimizer={"lr": 4e-3}, **changes)

    return make


def draw(output: Path, *loras: str, seed: int = 5) -> np.ndarray:
    """What `sample` draws with `loras`."""
    arguments = [word for lora in loras for word in ("--lora", lora)]
    sizes = ["--prompt", PROMPT, "--seed", str(seed), "--width", "64", "--height", "64", "--dtype", "fp32"]
    done = CliRunner().invoke(app, ["sample", str(mini.TURBO), *arguments, *sizes, "--output", str(output)])
    assert done.exit_code == 0, done.output
    return pixels(output / f"sample-{seed}.png")


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@BOTH
def test_preview_equals_the_stock_pipeline(make_lokr, tmp_path: Path, lora: dict[str, Any]):
    """The last preview is the image that diffusers' pipeline draws with the exported file."""
    sample = {"every": 30, "width": 96, "height": 64, "prompts": [PROMPT]}
    config = make_lokr(lora, train={"steps": 30}, sample=sample)
    run_training(config, fresh=False)
    request = preview_requests(config)[0]
    numbers = (request.seed, request.width, request.height, request.steps, request.guidance)
    expected = stock(folder(config) / "lora" / "tiny.safetensors", tmp_path / "stock.png", PROMPT, "", *numbers)
    samples = folder(config) / "samples"
    assert np.abs(pixels(samples / "000030-00.png") - expected).max() <= 1
    assert np.abs(pixels(samples / "000000-00.png") - expected).max() > 20  # else the comparison says nothing


@pytest.mark.slow
@BOTH
def test_run_resumes_to_the_bit(make_lokr, monkeypatch, capsys, lora: dict[str, Any]):
    """A run that is stopped ends with the same bits, its average too, and is known to be complete after it."""
    more: dict[str, Any] = {"train": {"steps": 4}, "ema": {"decay": 0.9}}
    whole, stopped = make_lokr(lora, name="whole", **more), make_lokr(lora, **more)
    run_training(whole, fresh=False)
    run_in_two_starts(stopped, monkeypatch)
    assert losses(stopped) == losses(whole)
    paths = [folder(config) / "lora" / "ema" / f"{config.name}.safetensors" for config in (whole, stopped)]
    paths += [folder(config) / "lora" / f"{config.name}.safetensors" for config in (whole, stopped)]
    averages, other_averages, ends, other_ends = map(load_file, paths)
    for tensors, others in ((averages, other_averages), (ends, other_ends)):
        assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert any(not torch.equal(averages[key], ends[key]) for key in ends)
    capsys.readouterr()
    run_training(stopped, fresh=False)
    assert "tiny is complete" in capsys.readouterr().out


@pytest.mark.slow
@BOTH
def test_tools_take_the_file(make_lokr, tmp_path: Path, lora: dict[str, Any]):
    """A LoKr is baked, stacked with LoRAs, made a LoRA, and begun from, with the change that it has."""
    config = make_lokr(lora, train={"steps": 30})
    run_training(config, fresh=False)
    path = folder(config) / "lora" / "tiny.safetensors"
    assert "loads 42/42" in command("lora", "verify", path, "--model", mini.TURBO)
    alone, without = draw(tmp_path / "alone", str(path)), draw(tmp_path / "without")
    assert np.abs(alone - without).max() > 8
    weights = ["--dtype", "fp32", "--to", "diffusers", "-o", tmp_path / "baked"]
    code, said = lora_command("bake", mini.TURBO, "--lora", f"{path}=0.5", *weights)
    assert code == 0, said
    deltas, before = lora_file.read_deltas(path), tensors_of(mini.TURBO / "transformer")
    for name, tensor in tensors_of(tmp_path / "baked").items():
        module, change = name.removesuffix(".weight"), tensor.double() - before[name].double()
        wanted = 0.5 * deltas[module].delta().double() if module in deltas else torch.zeros_like(change)
        assert torch.allclose(change, wanted, atol=1e-6), name
    said = command("lora", "resize", path, "--rank", "96", "-o", tmp_path / "lora.safetensors", "--dtype", "fp32")
    assert "LoKr -> rank 96: keeps 100.00%" in said
    assert np.abs(draw(tmp_path / "lora", str(tmp_path / "lora.safetensors")) - alone).max() <= 1
    halves = draw(tmp_path / "halves", f"{path}=0.5", f"{tmp_path / 'lora.safetensors'}=0.5")
    assert np.abs(halves - alone).max() <= 1
    code, said = lora_command("diff", path, tmp_path / "lora.safetensors")
    assert code == 0 and "|B| / |A| = 1, cosine 1.000" in said
    code, said = lora_command("merge", f"{path}=1", f"{path}=1", "-o", tmp_path / "m.safetensors")
    assert code == 4 and "is a LoKr (42 modules" in said and "zimage-train lora resize FILE" in said


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.slow
def test_lokr_beside_a_lora_in_previews(make_lokr, make_config, tmp_path: Path):
    """A LoKr of `sample.extra_loras` is in the previews, `compare` draws with it, and `publish` names the kind."""
    lokr = make_lokr(WHOLE, name="lokr", train={"steps": 30})
    run_training(lokr, fresh=False)
    path = folder(lokr) / "lora" / "lokr.safetensors"
    sample = {"every": 2, "first": False, "width": 64, "height": 64, "prompts": [PROMPT]}
    config = make_config(train={"steps": 2}, sample=sample | {"extra_loras": [str(path)]})
    run_training(config, fresh=False)
    preview = folder(config) / "samples" / "000002-00.png"
    own, seed = folder(config) / "lora" / "tiny.safetensors", preview_requests(config)[0].seed
    assert np.abs(draw(tmp_path / "both", str(own), str(path), seed=seed) - pixels(preview)).max() == 0
    assert np.abs(draw(tmp_path / "own", str(own), seed=seed) - pixels(preview)).max() > 8
    sizes = ["--prompt", PROMPT, "--seed", str(seed), "--width", "64", "--height", "64", "--dtype", "fp32"]
    command("compare", path, "--model", mini.TURBO, *sizes, "--output", tmp_path / "grid")
    drawn = pixels(tmp_path / "grid" / "pictures" / "001-lokr-1.png")
    assert np.array_equal(drawn, draw(tmp_path / "alone", str(path), seed=seed))
    command("publish", folder(lokr), "-o", tmp_path / "published")
    assert "| adapter | LoKr of factor 4 |" in (tmp_path / "published" / "README.md").read_text()


@pytest.mark.slow
@BOTH
def test_run_begins_with_the_lokr(make_config, make_lokr, lora: dict[str, Any]):
    first = make_lokr(lora, name="first", train={"steps": 4})
    run_training(first, fresh=False)
    path = folder(first) / "lora" / "first.safetensors"
    still = {"train": {"steps": 1}, "optimizer": {"lr": 1e-12, "weight_decay": 0.0}}
    again = {key: value for key, value in lora.items() if key != "alpha"} | {"init_from": str(path)}
    second = make_config(name="second", lora=again, **still)
    run_training(second, fresh=False)
    before = lora_file.read_deltas(path)
    after = lora_file.read_deltas(folder(second) / "lora" / "second.safetensors")
    assert before.keys() == after.keys() and len(before) == 42
    assert max(verify.relative_error(before[module], after[module]) for module in before) < 1e-5
    with pytest.raises(ConfigError, match=r"has w1 4x4, .*, and this run w1 8x8, .*; set lora.factor and lora.rank"):
        check_run(make_config(lora=again | {"factor": 8}, **still))
    with pytest.raises(WeightsError, match=r"is a LoKr .* and this takes a LoRA"):
        check_run(make_config(lora={"init_from": str(path)}, **still))
