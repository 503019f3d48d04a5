"""A run folder that something happened to: lost, damaged, changed or foreign files, and settings that changed."""

import shutil

import pytest

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.errors import ConfigError, Stopped, WeightsError
from zimage_train.planning.planner import MemoryPlan
from zimage_train.report import preview_images
from zimage_train.report.metrics import read_records
from zimage_train.training import loop, outputs

from helpers import PREVIEWED, facts, final, folder, losses, stop_after


@pytest.mark.slow
def test_weights_not_restored_end_the_run(make_config, tmp_path, monkeypatch):
    """If the training weights cannot be restored after a preview, the run ends."""
    model = tmp_path / "turbo"
    shutil.copytree(mini.TURBO, model)
    config = make_config(
        model={"path": str(model)}, train={"steps": 4}, save={"every": 1}, sample=PREVIEWED | {"first": False}
    )
    original, moved = outputs.sample_all, []

    def vanish(transformer, requests, embeds, progress):
        def move_away(done: int, total: int) -> None:
            if not moved:
                moved.append((model / "transformer").rename(model / "elsewhere"))

        return original(transformer, requests, embeds, move_away)

    monkeypatch.setattr(outputs, "sample_all", vanish)
    # Without main memory to spare, the training weights are read from the file again.
    monkeypatch.setattr(MemoryPlan, "spare_host_bytes", 0.0)
    with pytest.raises(WeightsError, match="the training weights cannot be restored after a preview"):
        run_training(config, fresh=False)
    assert moved and [record["step"] for record in read_records(folder(config) / "metrics.jsonl")] == [1, 2]
    moved[0].rename(model / "transformer")
    run_training(config, fresh=False)
    whole = make_config(name="whole", train={"steps": 4}, save={"every": 1})
    run_training(whole, fresh=False)
    assert losses(config) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["grid.png", "000004-01.png", "000000-00.png"])
def test_killed_within_the_last_preview(make_config, lost: str):
    """After a kill within the last preview, the same command draws what is missing."""
    config = make_config(sample=PREVIEWED)
    run_training(config, fresh=False)
    before = {path.name: path.read_bytes() for path in (folder(config) / "samples").iterdir()}
    events = (folder(config) / "events.jsonl").read_text().splitlines()
    kept = [line for line in events if '"done"' not in line and '"step": 4, "event": "preview"' not in line]
    (folder(config) / "events.jsonl").write_text("\n".join(kept) + "\n")
    (folder(config) / "samples" / lost).unlink()
    run_training(config, fresh=False)
    after = {path.name: path.read_bytes() for path in (folder(config) / "samples").iterdir()}
    found = (folder(config) / "events.jsonl").read_text().splitlines()
    is_of_the_past = lost.startswith("000000")  # it cannot be drawn again: its cell stays empty, and nothing is far
    if is_of_the_past:
        del before[lost], before["grid.png"], after["grid.png"]
    assert after == before
    if is_of_the_past:
        assert ["preview" in line for line in found] == ["preview" in line for line in events]
    else:
        assert found == events
    run_training(config, fresh=False)
    assert facts(config)["starts"] == [0, 4]  # the third start found nothing to do


@pytest.mark.slow
@pytest.mark.parametrize("lost", [["run.json"], ["config.yaml"], ["run.json", "config.yaml", "events.jsonl"]])
def test_checkpoint_identifies_the_run(make_config, lost: list[str]):
    """A run is recognized by its checkpoint, whatever else is lost."""
    run_training(make_config(train={"steps": 1}), fresh=False)
    for name in lost:
        (folder(make_config()) / name).unlink()
    with pytest.raises(ConfigError, match=r"lora.dropout: - 0.0  \+ 0.2"):
        run_training(make_config(train={"steps": 2}, lora={"dropout": 0.2}), fresh=False)
    run_training(make_config(train={"steps": 2}), fresh=False)
    assert len(losses(make_config())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", ['{"starts": 5, "plan": 3}', '{"starts": ["x", 1], "lora": 7}', "[]", "{", "", "\x00"]
)
def test_malformed_run_json(make_config, content: str):
    """A malformed `run.json` is written anew."""
    run_training(make_config(train={"steps": 1}), fresh=False)
    (folder(make_config()) / "run.json").write_text(content)
    run_training(make_config(train={"steps": 2}), fresh=False)
    assert facts(make_config())["starts"][-1] == 1 and facts(make_config())["lora"]["matched"] == "42/42"


def test_changed_list_is_on_one_line(make_config):
    """A list that changed is shown on a single line."""
    run_training(make_config(train={"steps": 1}), fresh=False)
    with pytest.raises(ConfigError) as error:
        run_training(make_config(train={"steps": 2}, lora={"targets": ["attention"]}), fresh=False)
    assert 'lora.targets: - ["attention", "feed_forward"]  + ["attention"]' in str(error.value)


@pytest.mark.slow
def test_allow_a_changed_rate(make_config, capsys):
    """`--allow` continues with a changed rate, and says so."""
    run_training(make_config(train={"steps": 2}), fresh=False)
    changed = make_config(train={"steps": 4}, optimizer={"lr": 5e-4})
    with pytest.raises(
        ConfigError, match=r"optimizer.lr: - 0.001  \+ 0.0005[\s\S]*or go on with it: --allow optimizer.lr"
    ):
        run_training(changed, fresh=False)
    run_training(changed, fresh=False, allow=("optimizer.lr",))
    assert [record["lr"] for record in read_records(folder(changed) / "metrics.jsonl")] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert "warning: allowed: optimizer.lr: - 0.001  + 0.0005" in (folder(changed) / "log.txt").read_text()
    run_training(
        make_config(train={"steps": 5}, optimizer={"lr": 5e-4}), fresh=False
    )  # from now on it is the run's own


def test_allow_covers_named_keys_only(make_config, tmp_path):
    """`--allow data` covers changed images, and nothing that it does not name."""
    shutil.copytree(mini.IMAGES, tmp_path / "photos")
    data = [{"folder": str(tmp_path / "photos"), "resolution": [64], "trigger": "zorb"}]
    run_training(make_config(train={"steps": 2}, data=data), fresh=False)
    (tmp_path / "photos" / "zorb_01.png").unlink()
    later = {"train": {"steps": 4}, "data": data}
    with pytest.raises(ConfigError, match=r"zorb_01.png.*: is gone"):
        run_training(make_config(**later), fresh=False, allow=("timesteps",))
    with pytest.raises(ConfigError, match=r"^optimizer.lr: [^\n]*\n[^\n]*belongs"):
        run_training(make_config(**later, optimizer={"lr": 5e-4}), fresh=False, allow=("data",))
    run_training(make_config(**later), fresh=False, allow=("data",))
    assert len(losses(make_config())) == 4


@pytest.mark.parametrize(
    "key", ["lora.rank", "optimizer.name", "model", "", "optimizer", "optimizer.lrr", "sched", "data.0", "schedule.x"]
)
def test_allow_refuses_fixed_settings(make_config, key: str):
    """Settings that cannot change within a run cannot be allowed."""
    with pytest.raises(ConfigError, match=r"cannot change within a run; one of optimizer\.lr, "):
        run_training(make_config(), fresh=False, allow=(key,))


def test_steps_below_those_of_the_run(make_config):
    """Fewer steps than the run has made are refused, and nothing is written."""
    run_training(make_config(train={"steps": 3}), fresh=False)
    before = {path: path.read_bytes() for path in folder(make_config()).rglob("*.json*")}
    config_text = (folder(make_config()) / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"train.steps: is 2, and the run is at step 3 already"):
        run_training(make_config(train={"steps": 2}), fresh=False)
    assert {path: path.read_bytes() for path in before} == before
    assert (folder(make_config()) / "config.yaml").read_bytes() == config_text


@pytest.mark.slow
def test_change_before_a_checkpoint(make_config, monkeypatch):
    """Before the first checkpoint anything may change, and old previews are drawn anew."""
    config = make_config(sample=PREVIEWED)
    monkeypatch.setattr(loop, "prefetch", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_training(config, fresh=False)
    monkeypatch.undo()
    image = folder(config) / "samples" / "000000-00.png"
    before = image.stat().st_mtime_ns
    run_training(make_config(sample=PREVIEWED, lora={"rank": 2}), fresh=False)
    assert image.stat().st_mtime_ns != before


@pytest.mark.slow
def test_changed_prompts_keep_their_images(make_config):
    """After a change of prompts, every image is under its own prompt."""
    run_training(make_config(sample=PREVIEWED, train={"steps": 2}), fresh=False)
    changed = PREVIEWED | {"prompts": ["a green square", "a red circle"]}
    run_training(make_config(sample=changed, train={"steps": 4}), fresh=False)
    shown = preview_images.preview_table(folder(make_config()) / "samples")
    assert shown.labels == ["a red zorb on a blue background", "a green square", "a red circle"]
    # Step 2 was done again with the new prompts before step 3, so its images are of the new prompts.
    assert {step: [path is not None for path in row] for step, row in shown.rows.items()} == {
        0: [True, False, True],
        2: [False, True, True],
        4: [False, True, True],
    }


@pytest.mark.slow
def test_decay_makes_more_steps_a_change(make_config, capsys):
    """With a decaying schedule, more steps are another run unless they are allowed."""
    decay = {"schedule": {"name": "cosine"}}
    run_training(make_config(train={"steps": 2}, **decay), fresh=False)
    with pytest.raises(
        ConfigError, match=r"schedule.steps \(train.steps, over which it decays\): - 2  \+ 4[\s\S]*--allow schedule"
    ):
        run_training(make_config(train={"steps": 4}, **decay), fresh=False)
    run_training(make_config(train={"steps": 4}, **decay), fresh=False, allow=("schedule",))
    assert "allowed: schedule.steps (train.steps, over which it decays): - 2  + 4" in capsys.readouterr().out
    run_training(make_config(name="flat", train={"steps": 2}), fresh=False)
    run_training(make_config(name="flat", train={"steps": 4}), fresh=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda config: (folder(config) / "lora" / "tiny.safetensors").write_bytes(b""),
        lambda config: (folder(config) / "lora" / "tiny.safetensors").unlink(),
        lambda config: (folder(config) / "samples" / "000004-00.png").write_bytes(b""),
        lambda config: (folder(config) / "report.html").unlink(),
    ],
)
def test_finished_run_that_lost_a_file(make_config, change):
    """A finished run that lost a file makes it again."""
    config = make_config(sample=PREVIEWED)
    run_training(config, fresh=False)
    before = final(config), (folder(config) / "samples" / "000004-00.png").read_bytes()
    change(config)
    run_training(config, fresh=False)
    assert (final(config), (folder(config) / "samples" / "000004-00.png").read_bytes()) == before
    assert (folder(config) / "report.html").exists()
    assert facts(config)["starts"] == [0, 4]


def test_finished_run_with_another_dtype(make_config, capsys):
    """A finished run exports again when the data type changed."""
    run_training(make_config(), fresh=False)
    large = len(final(make_config()))
    run_training(make_config(save={"dtype": "bf16"}), fresh=False)
    assert len(final(make_config())) < 0.6 * large
    capsys.readouterr()
    run_training(make_config(save={"dtype": "bf16"}), fresh=False)
    assert "is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_finished_run_with_other_prompts(make_config):
    """A finished run draws again when its prompts changed."""
    run_training(make_config(sample=PREVIEWED), fresh=False)
    changed = make_config(sample=PREVIEWED | {"prompts": ["a blue zorb"]})
    run_training(changed, fresh=False)
    recipe = preview_images.request_of(folder(changed) / "samples" / "000004-00.png")
    assert recipe.prompt == "a blue zorb"


@pytest.mark.slow
def test_previews_after_the_checkpoint(make_config, monkeypatch):
    """Previews of later steps than the checkpoint are removed at the start."""
    config = make_config(sample=PREVIEWED, save={"every": 2})
    run_training(config, fresh=False)
    flipped = folder(config) / "checkpoints" / "step-000004.safetensors"
    flipped.write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            run_training(config, fresh=False)
    assert list(preview_images.preview_table(folder(config) / "samples").rows) == [0, 2]


def test_exports_without_a_checkpoint(make_config):
    """Exported LoRAs without any checkpoint are not overwritten by a new training."""
    config = make_config(train={"steps": 2})
    run_training(config, fresh=False)
    shutil.rmtree(folder(config) / "checkpoints")
    (folder(config) / "events.jsonl").unlink()
    with pytest.raises(WeightsError, match=r"checkpoints are gone, and tiny.safetensors was exported from one"):
        run_training(config, fresh=False)
