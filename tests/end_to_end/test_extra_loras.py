"""`sample.extra_loras` and `--lora distillpatch`: LoRAs that are there for images alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load, load_file, save_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands import lora_args
from zimage_train.commands.sample import command_for
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, WeightsError, ZImageTrainError
from zimage_train.models import locate
from zimage_train.planning.preflight import check_run

from helpers import final, folder, losses

SAMPLE = {"every": 2, "first": False, "width": 64, "height": 64, "prompts": ["a red circle"]}
EXTRA = [f"{mini.ADAPTER_V1}=30", {"file": str(mini.ADAPTER_V1), "weight": -2.0}]
SETTINGS = {"train": {"steps": 4}, "optimizer": {"lr": 1e-2}}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def pair(make_config) -> tuple[Config, Config]:
    """The same run without and with extra LoRAs, finished."""
    plain = make_config(name="plain", sample=SAMPLE, **SETTINGS)
    extra = make_config(name="extra", sample=SAMPLE | {"extra_loras": EXTRA}, **SETTINGS)
    for config in (plain, extra):
        run_training(config, fresh=False)
    return plain, extra


@pytest.mark.slow
def test_extra_loras_change_previews_only(pair):
    """Extra LoRAs change the previews, and not the training."""
    plain, extra = pair
    assert losses(plain) == losses(extra) and len(losses(plain)) == 4
    before, after = load(final(plain)), load(final(extra))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    shown = [pixels(folder(config) / "samples" / "000004-00.png") for config in pair]
    assert np.abs(shown[0] - shown[1]).max() > 20
    assert "previews have" in (folder(extra) / "log.txt").read_text()


@pytest.mark.slow
def test_extra_loras_in_printed_command(pair, tmp_path: Path):
    """The printed command draws the preview again, with the extra LoRAs."""
    import shlex

    _, extra = pair
    words = shlex.split(command_for(extra, folder(extra) / "lora" / "extra.safetensors"))
    done = CliRunner().invoke(app, [*words[words.index("sample") :], "--output", str(tmp_path / "drawn")])
    assert done.exit_code == 0, done.output
    drawn = next((tmp_path / "drawn").glob("*.png"))
    assert np.array_equal(pixels(drawn), pixels(folder(extra) / "samples" / "000004-00.png"))


@pytest.mark.slow
def test_extra_loras_changed(pair):
    """Other extra LoRAs make the next start draw the last previews anew."""
    _, extra = pair
    path = folder(extra) / "samples" / "000004-00.png"
    before = pixels(path)
    again = extra.model_copy(update={"sample": extra.sample.model_copy(update={"extra_loras": []})})
    run_training(again, fresh=False)
    assert np.abs(before - pixels(path)).max() > 20


def test_extra_loras_are_checked_first(make_config, tmp_path: Path):
    """Extra LoRAs that are missing or do not match are refused before training."""
    lora = load_file(mini.ADAPTER_V1)
    key = next(iter(lora))
    save_file(
        {name.replace("layers.0.", "layers.90."): one for name, one in lora.items()}, tmp_path / "odd.safetensors"
    )
    assert "layers.0." in key
    config = make_config(sample=SAMPLE | {"extra_loras": ["gone.safetensors", str(tmp_path / "odd.safetensors")]})
    with pytest.raises(ZImageTrainError) as refused:
        check_run(config)
    assert "sample.extra_loras.0: gone.safetensors: does not exist" in str(refused.value)
    assert "odd.safetensors: matched" in str(refused.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, list[str]]]:
    """A hub whose DistillPatch is the miniature's adapter; what was asked of it."""
    asked = []
    save_file(load_file(mini.ADAPTER_V1), tmp_path / "model.safetensors")

    def fetch(*wanted):
        asked.append(wanted)
        return tmp_path

    monkeypatch.setattr(locate, "download", fetch)
    return asked


def test_distillpatch_is_its_hub_file(hub, tmp_path: Path):
    """`distillpatch` stands for its file on the hub."""
    command = ["sample", str(mini.TURBO), "--prompt", "a red circle", "--width", "64", "--height", "64"]
    command += ["--dtype", "fp32", "--lora", "distillpatch=0.5", "--output", str(tmp_path / "drawn")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "distillpatch: matched 48/48 modules, weight 0.5" in done.output
    assert hub == [("DiffSynth-Studio/Z-Image-Turbo-DistillPatch", None, ["model.safetensors"])]


def test_missing_lora_is_reported(tmp_path: Path):
    """A LoRA file that does not exist is reported as missing."""
    with pytest.raises(WeightsError, match=r"--lora: .*gone.safetensors: does not exist"):
        lora_args.read_weighted_lora(tmp_path / "gone.safetensors")
    with pytest.raises(ConfigError):
        lora_args.parse_weighted_lora("distillpatch=strong")


def test_check_says_that_it_is_not_here_yet(make_config):
    config = make_config(sample=SAMPLE | {"extra_loras": ["distillpatch"]})
    checked = check_run(config, locate.cached_only)
    expected = "sample.extra_loras.0: DiffSynth-Studio/Z-Image-Turbo-DistillPatch: not on this machine yet"
    assert any(note.text.startswith(expected) for note in checked.notes if note.code == "not-downloaded")
