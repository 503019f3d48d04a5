"""A run that is asked to save or to draw does so after the step under way, and trains on as if it had not been."""

from pathlib import Path

import pytest

from zimage_train.commands import train
from zimage_train.commands.train import run_training
from zimage_train.training import loop, requests
from zimage_train.training.run_dir import run_dir_of

from helpers import PREVIEWED, folder, numbers

pytestmark = pytest.mark.slow
PREVIEWS = PREVIEWED | {"every": 4, "first": False}


def ask_in_steps(monkeypatch: pytest.MonkeyPatch, root: Path, asked: dict[int, requests.RequestName]) -> None:
    """Write what a run is asked for while it trains these steps."""
    inner = loop.log_step

    def log_step(state, record, batches, metrics) -> None:
        inner(state, record, batches, metrics)
        if record["step"] in asked:
            (root / f"{asked[record['step']]}.now").touch()

    monkeypatch.setattr(loop, "log_step", log_step)


def test_asked_or_not_the_lora_is_the_same(make_config, monkeypatch: pytest.MonkeyPatch):
    plain = make_config(name="plain", sample=PREVIEWS)
    run_training(plain, fresh=False)
    config = make_config(name="asked", sample=PREVIEWS)
    ask_in_steps(monkeypatch, folder(config), {1: "save", 2: "preview"})
    run_training(config, fresh=False)
    assert numbers(config) == numbers(plain)
    saved = [path.name for path in (folder(config) / "lora").glob("*-0*.safetensors")]
    assert saved == ["asked-000001.safetensors"]
    drawn = {path.name[:6] for path in (folder(config) / "samples").glob("0*.png")}
    assert drawn == {"000002", "000004"}
    assert not list(folder(config).glob("*.now"))


def test_asked_of_an_earlier_start(make_config):
    """What was asked of a run that had ended is not done by the next start."""
    config = make_config(sample=PREVIEWS)
    requests.ask(run_dir_of(config), "save")
    run_training(config, fresh=False)
    assert not list((folder(config) / "lora").glob("*-0*.safetensors"))


def test_asked_while_it_loads(make_config, monkeypatch: pytest.MonkeyPatch):
    """What is asked before the first step is done after it."""
    config, build_state = make_config(), train.build_state

    def asked_meanwhile(*args):
        requests.ask(run_dir_of(config), "save")
        return build_state(*args)

    monkeypatch.setattr(train, "build_state", asked_meanwhile)
    run_training(config, fresh=False)
    assert [path.name for path in (folder(config) / "lora").glob("*-0*.safetensors")] == ["tiny-000001.safetensors"]


def test_previews_of_a_run_without(make_config, monkeypatch: pytest.MonkeyPatch):
    """It is said that there are none."""
    config = make_config()
    ask_in_steps(monkeypatch, folder(config), {2: "preview"})
    run_training(config, fresh=False)
    assert "warning: previews were asked for, but sample.prompts is empty" in (folder(config) / "log.txt").read_text()
