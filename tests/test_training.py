"""The main job on the miniature: what a run leaves, resume at every step, previews that change nothing, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from zimage_train import files, mini
from zimage_train.app import timesteps
from zimage_train.app.train import train
from zimage_train.config import yaml_reader
from zimage_train.config.reading import read_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, DiskError, DivergedError, Stopped, WeightsError
from zimage_train.report import pictures
from zimage_train.report.metrics import read
from zimage_train.training import loop, objectives, publish
from zimage_train.training.run import due


def folder(config: Config) -> Path:
    return Path(config.output) / config.name


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in read(folder(config) / "metrics.jsonl")]


def final(config: Config) -> bytes:
    return (folder(config) / "lora" / f"{config.name}.safetensors").read_bytes()


def facts(config: Config) -> dict:
    return json.loads((folder(config) / "run.json").read_text())


PREVIEWED = {"every": 2, "width": 64, "height": 64, "prompts": ["a red zorb on a blue background", "a red circle"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Config:
    """One finished run with everything on, for the tests that only look."""
    from conftest import mini_values

    values = mini_values(
        tmp_path_factory.mktemp("finished"),
        shared_cache,
        train={"steps": 5, "accumulate": 2},
        sample=PREVIEWED,
        save={"every": 2, "keep": 8},
        log={"tensorboard": True},
    )
    config = Config.model_validate(values)
    train(config, fresh=False)
    return config


def test_the_run_folder_is_the_documented_one(finished: Config):
    found = {path.relative_to(folder(finished)).as_posix() for path in folder(finished).rglob("*") if path.is_file()}
    events = {name for name in found if name.startswith("tensorboard/events.out.tfevents")}
    assert len(events) == 1
    pictures = {f"samples/{step:06d}-{index:02d}.png" for step in (0, 2, 4, 5) for index in (0, 1)}
    assert found - events == pictures | {
        "config.yaml",
        "run.json",
        "run.lock",
        "metrics.jsonl",
        "events.jsonl",
        "log.txt",
        "report.html",
        "checkpoints/step-000004.safetensors",
        "checkpoints/step-000005.safetensors",
        "lora/tiny-000002.safetensors",
        "lora/tiny-000004.safetensors",
        "lora/tiny.safetensors",
        "samples/grid.png",
    }


def test_metrics_have_one_record_a_step_with_what_was_used(finished: Config):
    records = read(folder(finished) / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert record.keys() == {"step", "loss", "lr", "grad_norm", "sigma", "samples", "seconds", "gb"}
        assert 2 <= len(record["sigma"]) == len(record["samples"]) <= 4  # the last batch of a size may be smaller
        assert record["lr"] == 1e-3
        assert record["loss"] > 0 and record["grad_norm"] > 0


def test_run_json_proves_the_settings(finished: Config):
    found = facts(finished)
    assert found["lora"] == {"rank": 4, "matched": "42/42", "groups": {"attention": 24, "feed_forward": 18}}
    assert found["adapter"]["matched"] == "48/48"
    assert found["starts"] == [0]
    assert found["dataset"]["pictures"] == 16
    assert found["versions"]["torch"] == torch.__version__


def test_the_effective_config_is_whole_and_loadable(finished: Config):
    path = folder(finished) / "config.yaml"
    assert read_config(path) == finished
    assert yaml_reader.parse(path.read_text()).value == finished.model_dump()


def test_the_export_says_what_it_is_and_nothing_of_where_it_was_made(finished: Config):
    with safe_open(folder(finished) / "lora" / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "Z-Image/lora"
    assert metadata["ss_base_model_version"] == "zimage"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.trigger_phrase"] == "zorb"
    assert metadata["zimage_train.adapter"] == "adapter.safetensors"
    assert str(Path(finished.output)) not in json.dumps(metadata)


def test_previews_have_the_asked_size_and_carry_their_recipe(finished: Config):
    with Image.open(folder(finished) / "samples" / "000005-01.png") as image:
        assert image.size == (64, 64)
        assert "Seed: 43" in image.info["parameters"] and "CFG 1" in image.info["parameters"]


def test_the_report_is_one_page_without_links_elsewhere(finished: Config):
    page = (folder(finished) / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == 8
    for text in ("matched 42/42", "matched 48/48", "a red zorb on a blue background", "steps: 5"):
        assert text in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_user_text_is_escaped_in_the_report(make_config):
    config = make_config(train={"steps": 1}, sample=PREVIEWED | {"prompts": ["<script>alert(1)</script> zorb"]})
    train(config, fresh=False)
    page = (folder(config) / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_a_finished_run_says_so_and_touches_nothing(finished: Config, capsys: pytest.CaptureFixture):
    before = {
        path: path.stat().st_mtime_ns
        for path in folder(finished).rglob("*")
        if path.name not in ("run.lock", "log.txt")
    }
    train(finished, fresh=False)
    assert "complete" in capsys.readouterr().out
    assert {
        p: p.stat().st_mtime_ns for p in folder(finished).rglob("*") if p.name not in ("run.lock", "log.txt")
    } == before


def test_the_written_config_means_the_same_in_another_folder(make_config, tmp_path: Path, monkeypatch):
    values = {"folder": "pictures", "resolution": [64], "trigger": "zorb"}
    shutil.copytree(mini.PICTURES, tmp_path / "here" / "pictures")
    shutil.copytree(mini.TURBO, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(output="out", data=[values], model={"path": "model"}, train={"steps": 1})
    train(config, fresh=False)
    monkeypatch.chdir(tmp_path)
    again = read_config(tmp_path / "here" / "out" / "tiny" / "config.yaml", ["train.steps=2"])
    train(again, fresh=False)
    assert facts(again)["starts"] == [0, 1]
    assert not (tmp_path / "out").exists()


# Resume


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the run to stop while it is in `step`, as SIGTERM would."""
    original = loop.prefetch

    def prefetch(run):
        for at, loaded in original(run):
            if at == step:
                run.stop.signal_number = 15
            yield at, loaded

    monkeypatch.setattr(loop, "prefetch", prefetch)


OPTIMIZERS = [("adamw", 12), ("adamw8bit", 3), ("prodigy", 3)]


@pytest.mark.parametrize(("optimizer", "steps"), OPTIMIZERS)
def test_cut_at_every_step_the_end_is_the_same_byte_for_byte(make_config, monkeypatch, optimizer: str, steps: int):
    options = {
        "optimizer": {"name": optimizer, "lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "train": {"steps": steps, "batch_size": 3},
        "data": [{"folder": str(mini.PICTURES), "resolution": [64], "trigger": "zorb", "caption_dropout": 0.3}],
        "lora": {"dropout": 0.1, "rank": 48},
    }
    whole = make_config(name="whole", **options)
    train(whole, fresh=False)
    for cut in range(1, steps):
        config = make_config(name="whole", output=str(Path(whole.output) / f"cut{cut}"), **options)
        with monkeypatch.context() as patch:
            stop_after(patch, cut)
            with pytest.raises(Stopped) as stopped:
                train(config, fresh=False)
            assert stopped.value.exit_code == 143
        train(config, fresh=False)
        assert final(config) == final(whole), cut
        assert losses(config) == losses(whole), cut
        assert facts(config)["starts"] == [0, cut]


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_result(make_config, monkeypatch, capsys):
    options = {"train": {"steps": 5}, "save": {"every": 1}}
    whole = make_config(name="tiny", **options)
    train(whole, fresh=False)
    config = make_config(output=str(Path(whole.output) / "b"), **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 4)
        train(config, fresh=False)
    newest = folder(config) / "checkpoints" / "step-000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    train(config, fresh=False)
    assert "set aside" in capsys.readouterr().out
    assert final(config) == final(whole)
    assert facts(config)["starts"] == [0, 3]


def test_a_crash_right_after_the_checkpoint_loses_neither_export_nor_preview(make_config, monkeypatch):
    config = make_config(train={"steps": 4}, save={"every": 2}, sample=PREVIEWED)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "export", lambda run, step: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, fresh=False)
    train(config, fresh=False)
    assert (folder(config) / "lora" / "tiny-000002.safetensors").exists()
    assert (folder(config) / "samples" / "000002-00.png").exists()
    assert facts(config)["starts"] == [0, 2]


def test_what_a_killed_process_left_half_written_is_removed(make_config):
    config = make_config(train={"steps": 1})
    (folder(config) / "checkpoints").mkdir(parents=True)
    leftover = folder(config) / "checkpoints" / f".step-000001.safetensors.{files._host()}-999999999.tmp"
    leftover.write_bytes(b"half")
    train(config, fresh=False)
    assert not leftover.exists()


def test_more_steps_continue_a_finished_run(make_config):
    train(make_config(train={"steps": 2}), fresh=False)
    longer = make_config(train={"steps": 4})
    train(longer, fresh=False)
    assert facts(longer)["starts"] == [0, 2]
    whole = make_config(train={"steps": 4}, output=str(Path(longer.output) / "b"))
    train(whole, fresh=False)
    assert final(longer) == final(whole)
    with pytest.raises(ConfigError, match="at step 4 already"):
        train(make_config(train={"steps": 3}), fresh=False)


def test_a_moved_run_folder_still_continues(make_config, monkeypatch, tmp_path: Path):
    config = make_config(train={"steps": 4})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        train(config, fresh=False)
    shutil.move(config.output, tmp_path / "elsewhere")
    moved = make_config(train={"steps": 4}, output=str(tmp_path / "elsewhere"))
    train(moved, fresh=False)
    assert facts(moved)["starts"] == [0, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": {"lr": 5e-4}}, r"optimizer\.lr: - 0\.001  \+ 0\.0005"),
        ({"lora": {"rank": 8}}, r"lora\.rank: - 4  \+ 8"),
        ({"seed": 8}, "seed: - 7"),
        ({"model": {"adapter": None}}, "adapter: changed"),
    ],
)
def test_a_changed_config_is_refused_with_its_difference(make_config, change: dict, named: str):
    train(make_config(train={"steps": 2}), fresh=False)
    changed = make_config(**{"train": {"steps": 4}, **change})
    with pytest.raises(ConfigError, match=named) as error:
        train(changed, fresh=False)
    assert error.value.exit_code == 2


def test_changed_data_is_refused_by_content_and_not_by_place(make_config, tmp_path: Path):
    def with_folder(name: str, steps: int) -> Config:
        data = [{"folder": str(tmp_path / name), "resolution": [64], "trigger": "zorb"}]
        return make_config(data=data, train={"steps": steps})

    shutil.copytree(mini.PICTURES, tmp_path / "a")
    train(with_folder("a", 2), fresh=False)
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    train(with_folder("same", 3), fresh=False)
    shutil.copytree(tmp_path / "a", tmp_path / "other")
    (tmp_path / "other" / "zorb_01.txt").write_text("another caption")
    (tmp_path / "other" / "zorb_02.png").unlink()
    with pytest.raises(ConfigError, match=r"zorb_01\.png.*: changed(.|\n)*zorb_02\.png.*: is gone"):
        train(with_folder("other", 4), fresh=False)


def test_fresh_moves_the_old_run_aside(make_config):
    config = make_config(train={"steps": 2})
    train(config, fresh=False)
    changed = make_config(train={"steps": 2}, seed=99)
    train(changed, fresh=True)
    assert facts(changed)["starts"] == [0]
    assert (folder(config).with_name("tiny.old") / "lora" / "tiny.safetensors").exists()


# What must not change training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_previews_change_no_bit_of_training(make_config, tmp_path: Path, dtype: str):
    without = make_config(name="run", output=str(tmp_path / "without"), train={"steps": 5}, model={"dtype": dtype})
    with_previews = make_config(name="run", train={"steps": 5}, sample=PREVIEWED | {"every": 1}, model={"dtype": dtype})
    train(without, fresh=False)
    train(with_previews, fresh=False)
    assert losses(without) == losses(with_previews)
    assert final(without) == final(with_previews)


def test_a_samples_noise_and_sigma_do_not_depend_on_how_batches_are_made(make_config):
    def sigmas(name: str, **options) -> dict[str, set[float]]:
        config = make_config(name=name, train={"steps": 16, **options})
        train(config, fresh=False)
        found: dict[str, set[float]] = {}
        for record in read(folder(config) / "metrics.jsonl"):
            for sample, sigma in zip(record["samples"], record["sigma"], strict=True):
                found.setdefault(sample, set()).add(sigma)
        return found

    # 16 pictures: 16 steps of one are an epoch; with larger steps the same samples of the first epoch are among them.
    single = sigmas("a", batch_size=1)
    assert len(single) == 16
    for other in (sigmas("b", batch_size=4), sigmas("c", batch_size=2, accumulate=3)):
        assert all(single[sample] <= other[sample] for sample in single)


def test_sigmas_of_a_run_follow_the_density_that_timesteps_prints(make_config):
    config = make_config(
        train={"steps": 12, "batch_size": 16},
        timesteps={"type": "sigmoid", "bias": "high_noise"},
        data=[{"folder": str(mini.PICTURES), "resolution": [64], "trigger": "zorb", "repeats": 12}],
    )
    train(config, fresh=False)
    drawn = sorted(sigma for record in read(folder(config) / "metrics.jsonl") for sigma in record["sigma"])
    printed = timesteps.describe(config)
    assert len(drawn) > 100
    assert sum(drawn) / len(drawn) == pytest.approx(printed["sigma_mean"], abs=0.05)
    for share, expected in printed["sigma_quantiles"].items():
        below = sum(sigma <= expected for sigma in drawn) / len(drawn)
        assert below == pytest.approx(float(share), abs=0.12)
    assert len(printed["weights"]) == 1001 and printed["weights"][500] == [0.5, 1.0]


def test_differential_guidance_multiplies_the_first_unclipped_gradient(make_config):
    norms = []
    for scale in (None, 3.0):
        config = make_config(name=f"s{scale}", train={"steps": 1}, guidance={"differential": scale})
        train(config, fresh=False)
        norms.append(read(folder(config) / "metrics.jsonl")[0]["grad_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)


def test_the_logged_rate_is_the_one_of_the_schedule(make_config):
    config = make_config(train={"steps": 6}, schedule={"warmup_steps": 4})
    train(config, fresh=False)
    assert [r["lr"] for r in read(folder(config) / "metrics.jsonl")] == pytest.approx(
        [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3]
    )


def test_caption_dropout_of_one_trains_on_the_empty_prompt_alone(make_config, monkeypatch):
    used: set[int] = set()
    original = objectives.make_batch

    def spy(config, samples, latents, embeds):
        used.update(one.shape[0] for one in embeds)
        return original(config, samples, latents, embeds)

    monkeypatch.setattr("zimage_train.training.run.make_batch", spy)
    data = [{"folder": str(mini.PICTURES), "resolution": [64], "trigger": "zorb", "caption_dropout": 1.0}]
    train(make_config(data=data), fresh=False)
    assert used == {8}  # the template around nothing: never zeros, never no tokens


# What goes wrong


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[int]:
    """Make the loss of `steps` not a number."""
    fired: list[int] = []
    original = loop.sft_loss
    seen = {"step": 0}

    def spoiled(model, batch, differential):
        seen["step"] += 1
        result = original(model, batch, differential)
        if seen["step"] in steps:
            fired.append(seen["step"])
            return objectives.Loss(result.objective * float("nan"), result.plain * float("nan"))
        return result

    monkeypatch.setattr(loop, "sft_loss", spoiled)
    return fired


def test_a_step_that_is_not_finite_is_skipped_and_named(make_config, monkeypatch, capsys):
    config = make_config(train={"steps": 4})
    fired = poison(monkeypatch, {2})
    train(config, fresh=False)
    assert fired == [2]
    records = read(folder(config) / "metrics.jsonl")
    assert [record["loss"] is None for record in records] == [False, True, False, False]
    assert "step 2 skipped" in capsys.readouterr().out


def test_five_in_a_row_end_the_run(make_config, monkeypatch):
    config = make_config(train={"steps": 9}, save={"every": 1})
    fired = poison(monkeypatch, {3, 4, 5, 6, 7})
    with pytest.raises(DivergedError, match="5 times in a row") as error:
        train(config, fresh=False)
    assert fired == [3, 4, 5, 6, 7]
    assert error.value.exit_code == 5


def test_a_failing_preview_costs_no_step(make_config, monkeypatch, capsys):
    config = make_config(train={"steps": 3}, sample=PREVIEWED | {"every": 1})
    monkeypatch.setattr(publish, "render", lambda *args: (_ for _ in ()).throw(RuntimeError("no memory")))
    train(config, fresh=False)
    assert "preview at step 0 failed" in capsys.readouterr().out
    assert len(losses(config)) == 3


def test_an_export_that_others_would_read_wrongly_is_not_left_there(make_config, monkeypatch):
    from zimage_train.lora import loaders

    config = make_config(train={"steps": 1})
    monkeypatch.setattr(loaders, "as_diffusers", lambda path: {})
    with pytest.raises(WeightsError, match="diffusers would load 0 of 42"):
        train(config, fresh=False)
    assert not (folder(config) / "lora" / "tiny.safetensors").exists()


def test_only_the_last_exports_are_kept(make_config):
    config = make_config(train={"steps": 6}, save={"every": 1, "keep": 2})
    train(config, fresh=False)
    names = sorted(path.name for path in (folder(config) / "lora").iterdir())
    assert names == ["tiny-000004.safetensors", "tiny-000005.safetensors", "tiny.safetensors"]


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(2, 5, [2, 4, 5]), (10, 3, [3]), (None, 3, []), (1, 3, [1, 2, 3])]
)
def test_what_is_due_when(every: int | None, steps: int, expected: list[int]):
    assert [step for step in range(1, steps + 1) if due(every, step, steps)] == expected


def test_checkpointing_is_chosen_by_the_budget_of_each_start_and_changes_no_loss(make_config):
    small = make_config(memory={"budget_gb": 0.02}, train={"steps": 1})
    train(small, fresh=False)
    assert facts(small)["plan"]["checkpointing"] is True
    later = make_config(memory={"budget_gb": 50.0}, train={"steps": 2})
    train(later, fresh=False)
    assert facts(later)["plan"]["checkpointing"] is False
    large = make_config(name="large", memory={"budget_gb": 50.0}, train={"steps": 2})
    train(large, fresh=False)
    assert facts(large)["plan"]["checkpointing"] is False
    assert losses(large) == losses(later)


# What a stranger did to a run folder


def test_a_run_without_any_finite_step_is_no_success(make_config, monkeypatch):
    fired = poison(monkeypatch, {1, 2})
    with pytest.raises(DivergedError, match="2 times in a row"):
        train(make_config(train={"steps": 2}), fresh=False)
    assert fired == [1, 2]


def test_skips_in_a_row_are_counted_across_starts(make_config, monkeypatch):
    fired = poison(monkeypatch, {2, 3, 4, 5, 6})
    train(make_config(train={"steps": 4}), fresh=False)
    with pytest.raises(DivergedError, match=r"step 6: .* 5 times in a row"):
        train(make_config(train={"steps": 9}), fresh=False)
    assert fired == [2, 3, 4, 5, 6]


def test_training_weights_that_cannot_be_put_back_after_a_preview_end_the_run(make_config, tmp_path, monkeypatch):
    model = tmp_path / "turbo"
    shutil.copytree(mini.TURBO, model)
    config = make_config(
        model={"path": str(model)}, train={"steps": 4}, save={"every": 1}, sample=PREVIEWED | {"first": False}
    )
    original, moved = publish.render, []

    def vanish(*args):
        def tick(done: int, total: int) -> None:
            if not moved:
                moved.append((model / "transformer").rename(model / "elsewhere"))

        return original(*args[:-1], tick)

    monkeypatch.setattr(publish, "render", vanish)
    with pytest.raises(WeightsError, match="the adapter cannot be merged back after a preview"):
        train(config, fresh=False)
    assert moved and [record["step"] for record in read(folder(config) / "metrics.jsonl")] == [1, 2]
    moved[0].rename(model / "transformer")
    train(config, fresh=False)
    whole = make_config(name="whole", train={"steps": 4}, save={"every": 1})
    train(whole, fresh=False)
    assert losses(config) == losses(whole)


@pytest.mark.parametrize("lost", ["grid.png", "000004-01.png", "000000-00.png"])
def test_killed_within_the_last_preview_the_same_command_makes_up_for_it(make_config, lost: str):
    config = make_config(sample=PREVIEWED)
    train(config, fresh=False)
    before = {path.name: path.read_bytes() for path in (folder(config) / "samples").iterdir()}
    events = (folder(config) / "events.jsonl").read_text().splitlines()
    kept = [line for line in events if '"done"' not in line and '"step": 4, "event": "preview"' not in line]
    (folder(config) / "events.jsonl").write_text("\n".join(kept) + "\n")
    (folder(config) / "samples" / lost).unlink()
    train(config, fresh=False)
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
    train(config, fresh=False)
    assert facts(config)["starts"] == [0, 4]  # the third start found nothing to do


@pytest.mark.parametrize("lost", [["run.json"], ["config.yaml"], ["run.json", "config.yaml", "events.jsonl"]])
def test_a_run_is_known_by_its_checkpoint_whatever_else_is_lost(make_config, lost: list[str]):
    train(make_config(train={"steps": 1}), fresh=False)
    for name in lost:
        (folder(make_config()) / name).unlink()
    with pytest.raises(ConfigError, match=r"lora.dropout: - 0.0  \+ 0.2"):
        train(make_config(train={"steps": 2}, lora={"dropout": 0.2}), fresh=False)
    train(make_config(train={"steps": 2}), fresh=False)
    assert len(losses(make_config())) == 2


@pytest.mark.parametrize(
    "content", ['{"starts": 5, "plan": 3}', '{"starts": ["x", 1], "lora": 7}', "[]", "{", "", "\x00"]
)
def test_a_malformed_run_json_is_written_anew(make_config, content: str):
    train(make_config(train={"steps": 1}), fresh=False)
    (folder(make_config()) / "run.json").write_text(content)
    train(make_config(train={"steps": 2}), fresh=False)
    assert facts(make_config())["starts"][-1] == 1 and facts(make_config())["lora"]["matched"] == "42/42"


def test_a_list_that_changed_is_shown_on_one_line(make_config):
    train(make_config(train={"steps": 1}), fresh=False)
    with pytest.raises(ConfigError) as error:
        train(make_config(train={"steps": 2}, lora={"targets": ["attention"]}), fresh=False)
    assert 'lora.targets: - ["attention", "feed_forward"]  + ["attention"]' in str(error.value)


def test_allow_continues_with_a_changed_rate_and_says_so(make_config, capsys):
    train(make_config(train={"steps": 2}), fresh=False)
    changed = make_config(train={"steps": 4}, optimizer={"lr": 5e-4})
    with pytest.raises(
        ConfigError, match=r"optimizer.lr: - 0.001  \+ 0.0005[\s\S]*or go on with it: --allow optimizer.lr"
    ):
        train(changed, fresh=False)
    train(changed, fresh=False, allow=("optimizer.lr",))
    assert [record["lr"] for record in read(folder(changed) / "metrics.jsonl")] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert "warning: allowed: optimizer.lr: - 0.001  + 0.0005" in (folder(changed) / "log.txt").read_text()
    train(make_config(train={"steps": 5}, optimizer={"lr": 5e-4}), fresh=False)  # from now on it is the run's own


def test_allow_covers_pictures_and_nothing_that_it_does_not_name(make_config, tmp_path):
    shutil.copytree(mini.PICTURES, tmp_path / "photos")
    data = [{"folder": str(tmp_path / "photos"), "resolution": [64], "trigger": "zorb"}]
    train(make_config(train={"steps": 2}, data=data), fresh=False)
    (tmp_path / "photos" / "zorb_01.png").unlink()
    later = {"train": {"steps": 4}, "data": data}
    with pytest.raises(ConfigError, match=r"zorb_01.png.*: is gone"):
        train(make_config(**later), fresh=False, allow=("timesteps",))
    with pytest.raises(ConfigError, match=r"^optimizer.lr: [^\n]*\n[^\n]*belongs"):
        train(make_config(**later, optimizer={"lr": 5e-4}), fresh=False, allow=("data",))
    train(make_config(**later), fresh=False, allow=("data",))
    assert len(losses(make_config())) == 4


@pytest.mark.parametrize("key", ["lora.rank", "optimizer.name", "model", ""])
def test_what_cannot_change_within_a_run_cannot_be_allowed(make_config, key: str):
    with pytest.raises(ConfigError, match=r"cannot change within a run; one of optimizer\.lr, "):
        train(make_config(), fresh=False, allow=(key,))


def test_steps_below_those_of_the_run_are_refused_and_nothing_is_written(make_config):
    train(make_config(train={"steps": 3}), fresh=False)
    before = {path: path.read_bytes() for path in folder(make_config()).rglob("*.json*")}
    config_text = (folder(make_config()) / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"train.steps: is 2, and the run is at step 3 already"):
        train(make_config(train={"steps": 2}), fresh=False)
    assert {path: path.read_bytes() for path in before} == before
    assert (folder(make_config()) / "config.yaml").read_bytes() == config_text


def test_no_start_begins_anew_where_checkpoints_were(make_config):
    config = make_config(train={"steps": 2}, save={"every": 1})
    train(config, fresh=False)
    later = make_config(train={"steps": 3}, save={"every": 1})
    for path in (folder(config) / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"no checkpoint is whole.*--fresh"):
            train(later, fresh=False)
    shutil.rmtree(folder(config) / "checkpoints")
    with pytest.raises(WeightsError, match="checkpoints are gone; the last one was of step 2"):
        train(later, fresh=False)
    train(later, fresh=True)
    assert facts(later)["starts"] == [0]


def test_before_the_first_checkpoint_anything_may_change_and_no_old_picture_is_taken_for_new(make_config, monkeypatch):
    config = make_config(sample=PREVIEWED)
    monkeypatch.setattr(loop, "prefetch", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config, fresh=False)
    monkeypatch.undo()
    picture = folder(config) / "samples" / "000000-00.png"
    before = picture.stat().st_mtime_ns
    train(make_config(sample=PREVIEWED, lora={"rank": 2}), fresh=False)
    assert picture.stat().st_mtime_ns != before


def test_after_a_change_of_prompts_every_picture_stands_under_its_own(make_config):
    train(make_config(sample=PREVIEWED, train={"steps": 2}), fresh=False)
    changed = PREVIEWED | {"prompts": ["a green square", "a red circle"]}
    train(make_config(sample=changed, train={"steps": 4}), fresh=False)
    shown = pictures.table(folder(make_config()) / "samples")
    assert shown.prompts == ["a red zorb on a blue background", "a green square", "a red circle"]
    # Step 2 was done again with the new prompts before step 3, so its first picture is the new one.
    assert {step: [path is not None for path in row] for step, row in shown.rows.items()} == {
        0: [True, False, True],
        2: [False, True, True],
        4: [False, True, True],
    }


def test_a_metrics_file_cut_within_a_character_or_replaced_by_a_folder_is_no_traceback(make_config):
    train(make_config(train={"steps": 1}), fresh=False)
    metrics = folder(make_config()) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + '{"step": 2, "samples": ["ü'.encode()[:-1])
    train(make_config(train={"steps": 2}), fresh=False)
    assert [record["step"] for record in read(metrics)] == [1, 2]
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(DiskError, match=r"metrics.jsonl: cannot be read"):
        train(make_config(train={"steps": 3}), fresh=False)


def test_what_check_says_stands_in_the_log_too(finished: Config):
    assert "warning: optimizer.lr is 0.001" in (folder(finished) / "log.txt").read_text()


def test_running_out_of_gpu_memory_is_one_line_with_advice(make_config, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(loop, "sft_loss", full)
    with pytest.raises(ConfigError, match=r"memory: CUDA out of memory; .* in use at most; set memory.checkpointing"):
        train(make_config(), fresh=False)


def test_without_a_gpu_the_published_model_is_refused_before_it_is_fetched(make_config, monkeypatch):
    monkeypatch.setattr("zimage_train.app.train.download", pytest.fail)
    with pytest.raises(ConfigError, match=r"device: no GPU was found, and 6.2 billion parameters"):
        train(make_config(model={"path": None, "adapter": None}), fresh=False)
