"""The main job on the miniature: what a run leaves, resume at every step, previews that change nothing, refusals."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from zimage_train import mini
from zimage_train.commands import timesteps
from zimage_train.commands.train import run_training
from zimage_train.config import strict_yaml
from zimage_train.config.load import read_config
from zimage_train.config.schema import Config
from zimage_train.errors import Stopped, WeightsError
from zimage_train.report.metrics import read_records
from zimage_train.training import batches
from zimage_train.training.state import is_due

from helpers import PREVIEWED, facts, folder, losses, stop_after


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Config:
    """A finished run with everything on, for the tests that only look."""
    from mini_config import mini_values

    values = mini_values(
        tmp_path_factory.mktemp("finished"),
        shared_cache,
        train={"steps": 5, "grad_accumulation": 2},
        sample=PREVIEWED,
        save={"every": 2, "keep": 8},
        log={"tensorboard": True},
    )
    config = Config.model_validate(values)
    run_training(config, fresh=False)
    return config


KINDS = ("safetensors", "png", "comfyui.json", "workflow.json")


@pytest.mark.slow
def test_run_folder_is_as_documented(finished: Config):
    """The run folder has the documented files."""
    found = {path.relative_to(folder(finished)).as_posix() for path in folder(finished).rglob("*") if path.is_file()}
    events = {name for name in found if name.startswith("tensorboard/events.out.tfevents")}
    assert len(events) == 1
    images = {f"samples/{step:06d}-{index:02d}.png" for step in (0, 2, 4, 5) for index in (0, 1)}
    assert found - events == images | {
        "config.yaml",
        "run.json",
        "run.lock",
        "metrics.jsonl",
        "events.jsonl",
        "log.txt",
        "report.html",
        "checkpoints/step-000004.safetensors",
        "checkpoints/step-000005.safetensors",
        *(f"lora/tiny{step}.{kind}" for step in ("-000002", "-000004", "") for kind in KINDS),
        "samples/grid.png",
    }


@pytest.mark.slow
def test_metrics_have_a_record_per_step(finished: Config):
    """Metrics have a record per step, with the samples and sigmas that it used."""
    records = read_records(folder(finished) / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert record.keys() == {"step", "loss", "lr", "grad_norm", "sigma", "samples", "seconds", "gb"}
        assert 2 <= len(record["sigma"]) == len(record["samples"]) <= 4  # the last batch of a size may be smaller
        assert record["lr"] == 1e-3
        assert record["loss"] > 0 and record["grad_norm"] > 0


def test_run_json_proves_the_settings(finished: Config):
    found = facts(finished)
    groups = {"attention": 24, "feed_forward": 18}
    lora = {"type": "lora", "rank": 4, "ranks": None, "lr_factors": {}, "matched": "42/42", "groups": groups}
    assert found["lora"] == lora
    assert found["adapter"]["matched"] == "48/48"
    assert found["starts"] == [0]
    assert found["dataset"]["pictures"] == 16
    assert found["versions"]["torch"] == torch.__version__


def test_effective_config_is_complete(finished: Config):
    """The effective config is complete, and can be loaded."""
    path = folder(finished) / "config.yaml"
    assert read_config(path) == finished
    assert strict_yaml.parse(path.read_text()).value == finished.model_dump()


def test_export_metadata(finished: Config):
    """The export's metadata describes the LoRA, and not the machine it was made on."""
    with safe_open(folder(finished) / "lora" / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "Z-Image/lora"
    assert metadata["ss_base_model_version"] == "ZImageTurbo"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.trigger_phrase"] == "zorb"
    assert json.loads(metadata["trained_words"]) == ["zorb"]
    assert json.loads(metadata["ss_tag_frequency"]) == {"zorb": {"zorb": 1}}
    assert not [key for key in metadata if "adapter" in key or "settings" in key]
    assert str(Path(finished.output_dir)) not in json.dumps(metadata)


def test_previews_have_size_and_settings(finished: Config):
    """Previews have the requested size, and hold their sampling settings."""
    with Image.open(folder(finished) / "samples" / "000005-01.png") as image:
        assert image.size == (64, 64)
        assert "Seed: 43" in image.info["parameters"] and "CFG 1" in image.info["parameters"]


def test_report_is_self_contained(finished: Config):
    """The report is a single page without links elsewhere."""
    page = (folder(finished) / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == 8
    for text in ("matched 42/42", "matched 48/48", "a red zorb on a blue background", "steps: 5"):
        assert text in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.slow
def test_user_text_is_escaped_in_the_report(make_config):
    config = make_config(train={"steps": 1}, sample=PREVIEWED | {"prompts": ["<script>alert(1)</script> zorb"]})
    run_training(config, fresh=False)
    page = (folder(config) / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


# Resume


def test_a_moved_run_folder_still_continues(make_config, monkeypatch, tmp_path: Path):
    config = make_config(train={"steps": 4})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        run_training(config, fresh=False)
    shutil.move(config.output_dir, tmp_path / "elsewhere")
    moved = make_config(train={"steps": 4}, output_dir=str(tmp_path / "elsewhere"))
    run_training(moved, fresh=False)
    assert facts(moved)["starts"] == [0, 2]


def test_fresh_moves_the_old_run_aside(make_config):
    config = make_config(train={"steps": 2})
    run_training(config, fresh=False)
    changed = make_config(train={"steps": 2}, seed=99)
    run_training(changed, fresh=True)
    assert facts(changed)["starts"] == [0]
    assert (folder(config).with_name("tiny.old") / "lora" / "tiny.safetensors").exists()


# What must not change training


@pytest.mark.slow
def test_noise_is_independent_of_batches(make_config):
    """A sample's noise and sigma do not depend on how batches are made."""

    def sigmas(name: str, **options) -> dict[str, set[float]]:
        config = make_config(name=name, train={"steps": 16, **options})
        run_training(config, fresh=False)
        found: dict[str, set[float]] = {}
        for record in read_records(folder(config) / "metrics.jsonl"):
            for sample, sigma in zip(record["samples"], record["sigma"], strict=True):
                found.setdefault(sample, set()).add(sigma)
        return found

    # 16 steps of batch size 1 are an epoch; with larger steps the same samples of the first epoch are among them.
    single = sigmas("a", batch_size=1)
    assert len(single) == 16
    for other in (sigmas("b", batch_size=4), sigmas("c", batch_size=2, grad_accumulation=3)):
        assert all(single[sample] <= other[sample] for sample in single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "density",
    [
        {"type": "sigmoid", "bias": "high_noise"},
        {"type": "sigmoid", "shift": "flux", "scale": 1.5, "stratified": True},
    ],
)
def test_sigmas_follow_the_density(density: dict, make_config):
    """The sigmas of a run follow the density that `timesteps` prints."""
    config = make_config(
        train={"steps": 12, "batch_size": 16},
        timesteps=density,
        data=[{"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb", "repeats": 12}],
    )
    run_training(config, fresh=False)
    drawn = sorted(sigma for record in read_records(folder(config) / "metrics.jsonl") for sigma in record["sigma"])
    printed = timesteps.describe_timesteps(config)
    assert len(drawn) > 100
    assert sum(drawn) / len(drawn) == pytest.approx(printed["sigma_mean"], abs=0.05)
    for share, expected in printed["sigma_quantiles"].items():
        below = sum(sigma <= expected for sigma in drawn) / len(drawn)
        assert below == pytest.approx(float(share), abs=0.04 if "stratified" in density else 0.12)
    assert len(printed["weights"]) == 1001 and printed["weights"][500] == [0.5, 1.0]


def test_differential_guidance_gradient(make_config):
    """Differential guidance multiplies the first unclipped gradient by its scale."""
    norms = []
    for scale in (None, 3.0):
        config = make_config(name=f"s{scale}", train={"steps": 1}, guidance={"differential": scale})
        run_training(config, fresh=False)
        norms.append(read_records(folder(config) / "metrics.jsonl")[0]["grad_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)


def test_logged_rate_follows_the_schedule(make_config):
    """The logged learning rate is that of the schedule."""
    config = make_config(train={"steps": 6}, schedule={"warmup_steps": 4})
    run_training(config, fresh=False)
    assert [r["lr"] for r in read_records(folder(config) / "metrics.jsonl")] == pytest.approx(
        [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3]
    )


def test_caption_dropout_of_one(make_config, monkeypatch):
    """A caption dropout of 1 trains on the empty prompt alone."""
    used: set[int] = set()
    original = batches.make_batch

    def spy(config, samples, latents, embeds, extras):
        used.update(int((~one.is_padding).sum()) for one in embeds)
        return original(config, samples, latents, embeds, extras)

    monkeypatch.setattr("zimage_train.training.batches.make_batch", spy)
    monkeypatch.setattr("zimage_train.commands.train.dry_run", lambda run: run)
    data = [{"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb", "caption_dropout": 1.0}]
    run_training(make_config(data=data), fresh=False)
    assert used == {8}  # the template around nothing: never zeros, never no tokens


# What goes wrong


def test_bad_export_is_removed(make_config, monkeypatch):
    """An export that other programs would read wrongly is removed."""
    from zimage_train.lora import verify

    config = make_config(train={"steps": 1})
    monkeypatch.setattr(verify, "as_diffusers", lambda path, shape: {})
    with pytest.raises(WeightsError, match=r"diffusers [\d.]+ would load 0 of 42"):
        run_training(config, fresh=False)
    assert not (folder(config) / "lora" / "tiny.safetensors").exists()


def test_only_the_last_exports_are_kept(make_config):
    config = make_config(train={"steps": 6}, save={"every": 1, "keep": 2})
    run_training(config, fresh=False)
    names = sorted(path.name for path in (folder(config) / "lora").iterdir())
    assert names == ["tiny-000004.safetensors", "tiny-000005.safetensors", "tiny.safetensors"]


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(2, 5, [2, 4, 5]), (10, 3, [3]), (None, 3, []), (1, 3, [1, 2, 3])]
)
def test_what_is_due_when(every: int | None, steps: int, expected: list[int]):
    assert [step for step in range(1, steps + 1) if is_due(every, step, steps)] == expected


@pytest.mark.slow
def test_checkpointing_follows_the_budget(make_config):
    """Checkpointing follows the budget of each start, and changes no loss."""
    small = make_config(memory={"budget_gb": 0.015}, train={"steps": 1, "batch_size": 8})
    run_training(small, fresh=False)
    assert "attention" in next(iter_lines(small, "memory plan"))
    assert facts(small)["plan"]["recomputes"]["none"] < 8 * 48
    later = make_config(memory={"budget_gb": 50.0}, train={"steps": 2, "batch_size": 8})
    run_training(later, fresh=False)
    assert facts(later)["plan"]["recomputes"]["none"] > 8 * 512
    large = make_config(name="large", memory={"budget_gb": 50.0}, train={"steps": 2, "batch_size": 8})
    run_training(large, fresh=False)
    assert losses(large) == losses(later)


def iter_lines(config: Config, word: str) -> Iterator[str]:
    return (line for line in (folder(config) / "log.txt").read_text().splitlines() if word in line)


def test_warnings_of_check_are_logged(make_config):
    """The warnings of `check` are in the log, too."""
    config = make_config(train={"steps": 1}, sample={"prompts": ["a zorb"], "every": None, "first": False})
    run_training(config, fresh=False)
    assert "warning: every prompt in sample.prompts has the trigger" in (folder(config) / "log.txt").read_text()
