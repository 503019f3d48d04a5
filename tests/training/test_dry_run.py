"""What happens before step 1, and what a run says of its prediction afterwards."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.config.load import dump_config
from zimage_train.config.schema import Config
from zimage_train.config.types import RecomputeMode
from zimage_train.errors import ConfigError, DiskError
from zimage_train.planning import calibration
from zimage_train.planning.planner import NO_LIMIT
from zimage_train.training import device_plan, dry_run, step_timer
from zimage_train.training.step_runner import StepRunner
from zimage_train.training.step_timer import SlowStepDetector

from helpers import PREVIEWED, facts, final, folder, losses


@pytest.mark.slow
def test_dry_run_leaves_no_trace(make_config, monkeypatch):
    """A dry run leaves no trace in what is trained."""
    config = make_config(sample=PREVIEWED | {"first": False}, lora={"dropout": 0.2})
    run_training(config, fresh=False)
    assert facts(config)["rehearsal"]["seconds"] > 0
    monkeypatch.setattr("zimage_train.commands.train.dry_run", lambda run: run)
    plain = make_config(name="plain", sample=PREVIEWED | {"first": False}, lora={"dropout": 0.2})
    run_training(plain, fresh=False)
    assert losses(config) == losses(plain)
    assert not (folder(config) / "rehearsal.safetensors").exists()


@pytest.mark.slow
def test_dry_run_of_the_largest_batch(make_config, monkeypatch):
    """The dry run makes a step of the largest batch."""
    seen = []
    original = dry_run._step
    monkeypatch.setattr(dry_run, "_step", lambda run, batch: (seen.append(batch.x0.shape), original(run, batch))[1])
    data = [{"folder": str(make_config().data[0].folder), "resolution": [64, 96], "trigger": "zorb"}]
    config = make_config(data=data, train={"steps": 30, "batch_size": 2})
    run_training(config, fresh=False)
    (shape,) = seen
    sizes = Counter()
    for line in (folder(config) / "metrics.jsonl").read_text().splitlines():
        sizes[len(json.loads(line)["samples"])] += 1
    assert shape[0] == max(sizes) and shape[2] * shape[3] >= 140  # with 144 it makes as many tokens


@pytest.mark.slow
def test_dry_run_of_a_preview(make_config, monkeypatch):
    """Each start draws a preview in the dry run, unless a preview is due before its first step."""
    drawn: list[int] = []
    original = dry_run.render_images

    def render(frozen, extras, recipes, *rest):
        drawn.append(recipes[0].steps)
        return original(frozen, extras, recipes, *rest)

    monkeypatch.setattr(dry_run, "render_images", render)
    run_training(make_config(sample=PREVIEWED, train={"steps": 2}), fresh=False)
    assert drawn == []  # the images before step 1 are real
    run_training(make_config(sample=PREVIEWED, train={"steps": 4}), fresh=False)
    assert drawn == [1]


def test_dry_run_of_a_checkpoint(make_config, monkeypatch):
    """A folder that cannot take a checkpoint ends the run before step 1."""

    def full(*args):
        raise DiskError(rehearsal_problem())

    monkeypatch.setattr(dry_run.tensorfile, "save_with_digest", full)
    config = make_config()
    with pytest.raises(DiskError):
        run_training(config, fresh=False)
    assert not (folder(config) / "metrics.jsonl").exists() or losses(config) == []


def rehearsal_problem():
    from zimage_train.errors import Problem

    return Problem("rehearsal", "the disk is full", "free some space")


@pytest.mark.slow
@pytest.mark.parametrize("failures", [1, 3])
def test_dry_run_out_of_memory(make_config, monkeypatch, capsys, failures):
    """If memory runs out, more is recomputed, and the losses are the same."""
    wanted = make_config(name="wanted")
    run_training(wanted, fresh=False)
    original, fired, modes = dry_run._step, [], []

    def short_of_memory(run, batch):
        if len(fired) < failures:
            fired.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(run, batch)

    apply = StepRunner.use_plan

    def spy(runner, plan):
        modes.append(plan.mode_of(plan.workload.max_tokens))
        apply(runner, plan)

    monkeypatch.setattr(dry_run, "_step", short_of_memory)
    monkeypatch.setattr(StepRunner, "use_plan", spy)
    config = make_config()
    run_training(config, fresh=False)
    assert len(fired) == failures
    assert modes == ["none", "elementwise", "w1w3", "attention"][: failures + 1]
    assert "did not fit as planned: more is recomputed" in capsys.readouterr().out
    assert losses(config) == losses(wanted)


def test_dry_run_that_never_fits(make_config, monkeypatch):
    """If nothing helps, the run ends before step 1, naming what to set."""

    def never(run, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(dry_run, "_step", never)
    config = make_config()
    with pytest.raises(ConfigError, match=r"memory: CUDA out of memory") as caught:
        run_training(config, fresh=False)
    assert caught.value.exit_code == 2 and losses(config) == []


def test_dry_run_is_not_repeated(make_config, monkeypatch):
    """If nothing is left to recompute, a single failure ends the run without a second try.

    A second try that succeeded would leave its gradient to step 1.
    """
    fired: list[int] = []
    original = dry_run._step

    def once(run, batch):
        fired.append(1)
        if len(fired) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(run, batch)

    monkeypatch.setattr(dry_run, "_step", once)
    with pytest.raises(ConfigError, match=r"memory: CUDA out of memory"):
        run_training(make_config(memory={"checkpointing": True}), fresh=False)
    assert fired == [1]


def test_dry_run_holds_optimizer_memory(make_config, monkeypatch):
    """The memory that the optimizer's state will take is held until it exists, and that of its update always."""
    held: list[int] = []
    original = dry_run.torch.empty
    monkeypatch.setattr(dry_run.torch, "empty", lambda *a, **k: (held.append(a[0]), original(*a, **k))[1])
    config = make_config(optimizer={"name": "adamw"}, train={"steps": 2})
    run_training(config, fresh=False)
    trained = sum(tensor.numel() for name, tensor in load_file(final_path(config)).items() if "lora_" in name)
    assert held.count((8 + 4) * trained) == 1
    held.clear()
    run_training(make_config(optimizer={"name": "adamw"}, train={"steps": 3}), fresh=False)
    assert held.count((8 + 4) * trained) == 0 and held.count(4 * trained) == 1


def final_path(config: Config) -> Path:
    return folder(config) / "lora" / f"{config.name}.safetensors"


# Quantised and streamed runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantized_run(make_config, kind: str):
    """A quantised run trains, draws previews, resumes and reports its error."""
    options = {"model": {"quantize": kind}, "sample": PREVIEWED, "memory": {"checkpointing": "w1w3", "offload": 0.5}}
    config = make_config(**options)
    run_training(make_config(**options, train={"steps": 2}), fresh=False)
    run_training(config, fresh=False)
    straight = make_config(name="straight", **options)
    run_training(straight, fresh=False)
    assert losses(config) == losses(straight)
    assert facts(config)["plan"]["kind"] == kind and facts(config)["plan"]["streamed"] == 3
    found = facts(config)["quantized"]
    assert 0 < found["weight_error"] < 0.1 and found["adapter_arrived"] == pytest.approx(1, abs=0.03)
    said = (folder(config) / "log.txt").read_text()
    assert f"quantised to {kind}: weights are off by {found['weight_error']:.2%}; " in said
    page = (folder(config) / "report.html").read_text()
    assert f"{kind}, 3 of 6 blocks streamed from" in page
    assert f"relative weight error {100 * found['weight_error']:.2f} %, " in page


def test_quantization_identifies_the_run(make_config):
    """Another quantization is another run; another share of streamed blocks is not."""
    run_training(make_config(model={"quantize": "int8"}, train={"steps": 1}), fresh=False)
    run_training(make_config(model={"quantize": "int8"}, train={"steps": 2}, memory={"offload": 1.0}), fresh=False)
    with pytest.raises(ConfigError, match=r'model.quantize: - "int8"  \+ null'):
        run_training(make_config(train={"steps": 3}), fresh=False)


def test_quantization_chosen_by_auto_stays(make_config, monkeypatch):
    """The quantization that `auto` chose stays when the budget changes.

    If a smaller GPU made the run quantise anew, its weights would change.
    """
    monkeypatch.setattr("zimage_train.planning.planner.HOST_SHARE", 0.0)
    auto = {"quantize": "auto"}
    small = make_config(model=auto, train={"steps": 1}, memory={"budget_gb": 0.0066})
    run_training(small, fresh=False)
    chosen = facts(small)["plan"]["kind"]
    assert chosen is not None
    (folder(small) / "run.json").unlink()  # the checkpoint knows
    large = make_config(model=auto, train={"steps": 2}, memory={"budget_gb": 50.0})
    run_training(large, fresh=False)
    assert facts(large)["plan"]["kind"] == chosen
    other = make_config(name="other", model=auto, train={"steps": 1}, memory={"budget_gb": 50.0})
    run_training(other, fresh=False)
    assert facts(other)["plan"]["kind"] is None
    assert final(other) != b""


# Pace


def test_slow_step_is_said_once():
    """A step that takes three times as long as similar steps is reported once."""
    watch = SlowStepDetector()
    assert not any(watch.update("512", 2.0, None, None) for _ in range(9))
    assert not any(watch.update("1024", 9.0, None, None) for _ in range(4))  # another kind, not slow
    assert watch.update("512", 5.9, None, None) is None
    said = watch.update("512", 6.5, None, None)
    assert said.startswith("a step took 6.5 s where steps like it take 2.0 s") and "Sysmem Fallback" in said
    assert watch.update("512", 60.0, None, None) is None


def test_slow_step_ignores_quick_ones():
    """Quick steps and the first steps are not reported as slow."""
    watch = SlowStepDetector()
    assert watch.update("a", 100.0, None, None) is None
    assert not any(watch.update("b", 0.01, None, None) for _ in range(9))
    assert watch.update("b", 0.9, None, None) is None


def test_memory_beyond_the_card_is_said():
    watch = SlowStepDetector()
    assert watch.update("a", 1.0, 23e9, 24e9) is None
    assert "25.5 GB are taken of a card with 24.0 GB: it spills into main memory" in watch.update(
        "a", 1.0, 25.5e9, 24e9
    )


def test_slow_step_is_logged(make_config, monkeypatch):
    """The warning of a slow step is in the log of the run."""
    monkeypatch.setattr(step_timer, "MIN_SAMPLES", 2)
    monkeypatch.setattr(step_timer, "SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(step_timer, "SLOW_FACTOR", 0.0)
    config = make_config(train={"steps": 12})
    run_training(config, fresh=False)
    assert "where steps like it take" in (folder(config) / "log.txt").read_text()


# Measured runs


def test_calibration_by_a_run(make_config, tmp_path):
    """A run tells `check` how long steps take on this device."""
    config = make_config(train={"steps": 12}, cache={"folder": str(tmp_path / "cache")})
    (tmp_path / "c.yaml").write_text(dump_config(config))

    def time() -> str:
        longer = ["check", str(tmp_path / "c.yaml"), "--set", "train.steps=100000"]
        output = CliRunner().invoke(app, longer).output
        return next(line for line in output.splitlines() if line.startswith("time"))

    assert "not known for this device before a run on it" in time()
    run_training(config, fresh=False)
    (known,) = json.loads((tmp_path / "cache" / "measured.json").read_text())
    assert known["device"].startswith("cpu, ") and known["steps"] == 12 and known["memory_ratio"] is None
    hours, minutes = re.search(r": (\d+) h (\d+) min \(predicted; from one run here\)", time()).groups()
    assert 60 * int(hours) + int(minutes) == pytest.approx(100_000 * known["seconds"] / 60, rel=0.2)


def test_calibration_cannot_be_written(make_config, tmp_path, capsys):
    """A calibration file that cannot be written does not end the run."""
    (tmp_path / "cache" / "measured.json").mkdir(parents=True)
    config = make_config(train={"steps": 12}, cache={"folder": str(tmp_path / "cache")})
    run_training(config, fresh=False)
    said = capsys.readouterr().out
    assert "warning: " in said and "measured.json" in said and "done: " in said
    assert (folder(config) / "report.html").exists()


def test_dry_run_of_every_mode(make_config, monkeypatch):
    """The largest batch of every mode is run, beginning with the batch that takes most memory.

    A small batch that keeps everything may take more than a large batch that recomputes.
    """
    seen: list[int] = []
    original = dry_run._step
    monkeypatch.setattr(
        dry_run, "_step", lambda run, batch: (seen.append(batch.x0[0, 0].numel()), original(run, batch))[1]
    )
    limits: dict[RecomputeMode, int] = {"none": 80, "elementwise": 0, "w1w3": 0, "attention": 0, "full": NO_LIMIT}
    planned = device_plan.plan_for_devices
    planning = "zimage_train.commands.train.plan_for_devices"

    def plan_with_limits(*args: Any) -> Any:
        spec, plan = planned(*args)
        return spec, replace(plan, limits=limits)

    monkeypatch.setattr(planning, plan_with_limits)
    data = [{"folder": str(mini.IMAGES), "resolution": [64, 128], "trigger": "zorb"}]
    run_training(make_config(data=data, train={"steps": 1, "batch_size": 1}), fresh=False)
    assert len(seen) >= 2 and seen[0] < seen[1]


def steps(ratio: float, count: int = 20) -> list[tuple[float, float]]:
    return [(50.0, 1.0)] * 3 + [(ratio * seconds, seconds) for seconds in (0.5, 1.0, 2.0) * count][: count - 3]


def test_calibration_is_the_median(tmp_path):
    """The correction is the median, and the first steps do not count."""
    path = tmp_path / "measured.json"
    assert calibration.calibration_factor(path, "4090") is None
    for ratio in (1.2, 1.3, 2.0):
        calibration.record_measurement(path, calibration.measure("4090", steps(ratio), 21.0, 20.0))
    calibration.record_measurement(path, calibration.measure("3090", steps(0.5), None, 20.0))
    found = calibration.calibration_factor(path, "4090")
    assert (found.runs, found.time, found.memory) == (3, pytest.approx(1.3), pytest.approx(1.05))
    assert found.spread == pytest.approx(0.7 / 1.3)
    runs = "from 3 runs here, which differ by up to 54%, memory x1.05"
    assert found.in_words(is_card_known=True) == f"corrected by x1.30 {runs}"
    assert found.in_words(is_card_known=False) == runs
    assert calibration.calibration_factor(path, "3090").memory is None


def test_calibration_of_short_and_old_runs(tmp_path):
    """A short run is not measured, and the oldest measurements are dropped."""
    assert calibration.measure("4090", steps(1.0, 9), 1.0, 1.0) is None
    for number in range(30):
        calibration.record_measurement(tmp_path / "m.json", calibration.measure("4090", steps(1.0 + number), None, 1.0))
    assert calibration.calibration_factor(tmp_path / "m.json", "4090").runs == calibration.MAX_MEASUREMENTS


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"device": 1}]', '{"a": 1}', "\xff", "[" * 5000])
def test_a_damaged_memo_knows_nothing(tmp_path, content: str):
    (tmp_path / "m.json").write_text(content, encoding="latin-1")
    assert calibration.calibration_factor(tmp_path / "m.json", "4090") is None
