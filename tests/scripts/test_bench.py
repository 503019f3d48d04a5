"""The benchmark script runs at miniature size, and what it has measured is what the docs hold."""

import contextlib
import json
import re
from pathlib import Path

import pytest

from zimage_train.config.schema import Config
from zimage_train.planning import devices
from zimage_train.training.step_runner import StepRunner

from gpu_parts import product
from gpu_parts.parts import TRIALS
from helpers import ROOT, script


@pytest.fixture(scope="module")
def bench():
    return script("bench")


@pytest.mark.slow
def test_memory_bench_runs_all_cases(bench, tmp_path: Path, monkeypatch, capsys):
    """The memory benchmark runs every budget, precision and size."""
    monkeypatch.setattr(bench, "BUDGETS_GB", (24.0, 0.012))
    assert bench.main(["--memory", "--size", "mini", "--steps", "1", "-o", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert {(run["budget_gb"], run["side_px"]) for run in found["runs"]} == {
        (budget, side) for budget in (24.0, 0.012) for side in (64, 96)
    }
    assert all(len(run["step_seconds"]) == 1 and run["loss"] > 0 for run in found["runs"])
    assert any(run["streamed"] or run["mode"] != "none" for run in found["runs"] if run["budget_gb"] < 1)


def test_repeat_bench_with_fixed_order(bench, tmp_path: Path, monkeypatch):
    """The same step is repeated with and without the fixed order of sums."""
    entered: list[str] = []
    real, call = devices.reproducible, StepRunner.__call__

    @contextlib.contextmanager
    def watched(device):
        entered.append("in")
        with real(device):
            yield
        entered.append("out")

    def step(*given):
        entered.append("step")
        return call(*given)

    monkeypatch.setattr(devices, "reproducible", watched)
    monkeypatch.setattr(StepRunner, "__call__", step)
    assert bench.main(["--repeat", "--steps", "2", "-o", str(tmp_path / "r.json")]) == 0
    steps = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert len(steps) == 4 and all(one["equal"] and one["off"] == 0 for one in steps.values())  # on a CPU, always
    assert entered == ["step", "step", "in", "step", "step", "out"] * 2


def test_full_size_without_a_gpu_is_refused(bench):
    with pytest.raises(SystemExit, match="--size full needs a GPU"):
        bench.main(["--memory", "--size", "full"])


def test_medium_size_is_for_speed_alone(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--memory", "--size", "medium"])
    assert "--size medium goes with --speed" in capsys.readouterr().err


def test_quantize_bench_equals_the_docs(bench, quick_fp8: None):
    """The cost of quantising is the cost in the docs."""
    stored = json.loads((ROOT / "docs" / "bench" / "quantize.json").read_text())
    for kind, found in bench.quantize()["kinds"].items():
        for name, value in found.items():
            assert value == pytest.approx(stored["kinds"][kind][name], rel=0.1), (kind, name)
    errors = [stored["kinds"][kind]["loss_error_mean"] for kind in ("int8", "fp8", "fp8_fast", "nf4")]
    assert errors == sorted(errors)
    text = (ROOT / "docs" / "memory.md").read_text()
    off = stored["loras"]["off_fp32"]
    for kind in ("int8", "fp8", "fp8_fast", "nf4"):
        assert re.search(rf"\| {kind} \|.* \| {100 * off['bf16, ' + kind]:.1f} % \|\n", text), kind
    assert f"Another seed differs by {100 * off['another seed']:.0f} %" in text


def test_guidance_bench_is_in_the_docs():
    """The docs show the effects of guidance as they were measured."""
    found = json.loads((ROOT / "docs" / "bench" / "guidance.json").read_text())
    text = (ROOT / "docs" / "settings.md").read_text()
    for name, run in found["runs"].items():
        assert f"| {name} | {run['gradient_norm']:.2f} | {run['off_plain']:.1%} |" in text
    assert f"differ by {found['guided_and_clipped_at_1_against_clipped_at_a_third']:.1%}." in text


@pytest.mark.slow
def test_guidance_bench_measures(bench, tmp_path: Path, monkeypatch):
    """Guidance is measured as the docs say."""
    monkeypatch.setattr(bench, "GUIDANCE_STEPS", 4)
    monkeypatch.setattr(
        bench, "GUIDANCE_RUNS", {name: bench.GUIDANCE_RUNS[name] for name in list(bench.GUIDANCE_RUNS)[:5]}
    )
    assert bench.main(["--guidance", "-o", str(tmp_path / "g.json")]) == 0
    runs = json.loads((tmp_path / "g.json").read_text())["runs"]
    assert runs["guidance 3"]["gradient_norm"] / runs["plain"]["gradient_norm"] == pytest.approx(3, rel=0.1)
    assert runs["plain"]["off_plain"] == 0.0


def test_full_size_trials_are_valid(tmp_path: Path):
    """Every full-size trial is a config that the trainer accepts."""
    trials = product.trials(tmp_path / "lora.safetensors")
    configs = [Config.model_validate(product.config(trial, tmp_path)) for trial in trials]
    assert len({config.name for config in configs}) == len(trials) > 5
    assert sorted(trial.name for trial in trials) == sorted(TRIALS)
    assert {config.train.method for config in configs} == {"sft", "trajectory_imitation", "de_distill"}
    assert any(config.model.quantize for config in configs) and all(config.model.path for config in configs)


def test_optimizers_are_as_measured():
    """The table of the optimizers has the numbers of the measurement, and no best rate was the last that was tried."""
    found = json.loads((ROOT / "docs" / "bench" / "optimizers.json").read_text())["optimizers"]
    text = (ROOT / "docs" / "optimizers.md").read_text()
    for name, row in found.items():
        assert not row["is_at_the_edge"], name
        numbers = []
        for mean, spread in (row["behind_first"], row["behind_first_in_equal_time"]):
            numbers.append("0" if spread == 0 else f"{mean:.3f} +- {spread:.3f}")
        rate = f"{row['lr']:.0e}".replace("e-0", "e-") if row["lr"] < 0.1 else f"{row['lr']:g}"
        assert f"| {name} | {rate} | {numbers[0]} | {numbers[1]} |" in text, (name, rate, numbers)
