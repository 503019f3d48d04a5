"""TensorBoard and Weights & Biases show what metrics.jsonl and the samples folder hold, and cost no run anything."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zimage_train.commands.train import run_training
from zimage_train.errors import ConfigError
from zimage_train.report import trackers
from zimage_train.report.metrics import read_records

from helpers import PREVIEWED, facts, folder, losses


def shown(config) -> EventAccumulator:
    found = EventAccumulator(str(folder(config) / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


@pytest.mark.slow
def test_tensorboard_has_all_steps(make_config):
    """TensorBoard has the numbers of every step, and the images."""
    config = make_config(log={"tensorboard": True}, sample=PREVIEWED, train={"steps": 2})
    run_training(config, fresh=False)
    run_training(make_config(log={"tensorboard": True}, sample=PREVIEWED, train={"steps": 4}), fresh=False)
    found = shown(config)
    for name in set(trackers.LOGGED_NUMBERS) - {"preservation"}:
        records = read_records(folder(config) / "metrics.jsonl")
        values = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in found.Scalars(f"train/{name}")]
        assert [(record["step"], record[name]) for record in records] == values
    images = found.Images("previews/a red circle")
    assert [event.step for event in images] == [0, 2, 2, 4]  # step 2 is shown by both starts
    assert (images[0].width, images[0].height) == (64, 64)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


BLOCK, HEADER = 32768, 7  # of the record format that wandb writes: a record that crosses a block is cut by a header


def logged(config) -> bytes:
    """Everything that wandb wrote for its server, without the headers that begin each block."""
    files = [path.read_bytes() for path in sorted((folder(config) / "wandb").glob("offline-run-*/*.wandb"))]
    return b"".join(file[at + HEADER : at + BLOCK] for file in files for at in range(0, len(file), BLOCK))


@pytest.mark.slow
def test_wandb_offline_has_all_steps(make_config, offline, capsys):
    """W&B offline has the numbers of every step, under a single ID."""
    config = make_config(log={"wandb": "my project"}, sample=PREVIEWED, train={"steps": 2})
    run_training(config, fresh=False)
    run_id = (folder(config) / "wandb" / "id").read_text().strip()
    run_training(make_config(log={"wandb": "my project"}, sample=PREVIEWED, train={"steps": 4}), fresh=False)
    wanted = [json.dumps(loss).encode() for loss in losses(config)]
    until = time.monotonic() + 30  # a process of wandb's own writes the file, and may end after finish()
    while (missing := [one for one in wanted if one not in logged(config)]) and time.monotonic() < until:
        time.sleep(0.1)
    content = logged(config)
    assert len(wanted) == 4 and missing == []
    assert b"train/loss" in content and b"my project" in content
    files = list((folder(config) / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2 and facts(config)["starts"] == [0, 2]
    images = list((folder(config) / "wandb").rglob("*.png"))
    assert len(images) >= 2 * 3
    assert f"run {run_id}" in capsys.readouterr().out


def test_wandb_missing(make_config, monkeypatch):
    """Without wandb the run says what to do before it loads anything."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("zimage_train.training.build.load_frozen", pytest.fail)
    with pytest.raises(ConfigError, match=r"log.wandb: wandb is not installed; pip install wandb"):
        run_training(make_config(log={"wandb": "x"}), fresh=False)


def test_wandb_without_a_login(make_config, monkeypatch):
    """Without a login the run says what to do."""

    class Error(Exception):
        pass

    def init(**options):
        raise Error("api_key not configured (no-tty)\nmore")

    fake = SimpleNamespace(Error=Error, init=init, Settings=lambda **options: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"log.wandb: api_key not configured \(no-tty\); run wandb login, or"):
        run_training(make_config(log={"wandb": "x"}), fresh=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["numbers", "images", "close"])
def test_failing_tracker_is_left_out(make_config, monkeypatch, capsys, method: str):
    """A tracker that fails is left out, and the run continues."""
    called: list[int] = []

    def fail(self, *args):
        called.append(1)
        raise OSError("no space left")

    monkeypatch.setattr(trackers.TensorBoard, method, fail)
    run_training(make_config(log={"tensorboard": True}, sample=PREVIEWED), fresh=False)
    assert called == [1]
    assert "warning: TensorBoard failed (OSError: no space left); continuing without it" in capsys.readouterr().out
    assert len(losses(make_config())) == 4


@pytest.mark.slow
def test_damaged_run_id(make_config, offline, tmp_path: Path):
    """A damaged run ID is made anew."""
    config = make_config(log={"wandb": "x"}, train={"steps": 1})
    run_training(config, fresh=False)
    (folder(config) / "wandb" / "id").write_bytes(b"\xff../../x")
    run_training(make_config(log={"wandb": "x"}, train={"steps": 2}), fresh=False)
    assert (folder(config) / "wandb" / "id").read_text().strip().isalnum()
