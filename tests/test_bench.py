"""The benchmark script runs at miniature size, and what it has measured is what the docs hold."""

import json
from pathlib import Path

import pytest

from helpers import ROOT, script


@pytest.fixture(scope="module")
def bench():
    return script("bench")


def test_memory_runs_every_budget_precision_and_size(bench, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BUDGETS_GB", (24.0, 0.012))
    assert bench.main(["--memory", "--size", "mini", "--steps", "1", "-o", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert {(run["budget_gb"], run["side_px"]) for run in found["runs"]} == {
        (budget, side) for budget in (24.0, 0.012) for side in (64, 96)
    }
    assert all(len(run["seconds"]) == 1 and run["loss"] > 0 for run in found["runs"])
    assert any(run["streamed"] or run["mode"] != "none" for run in found["runs"] if run["budget_gb"] < 1)


def test_the_same_step_is_repeated_with_and_without_the_fixed_order(bench, tmp_path: Path):
    assert bench.main(["--repeat", "--steps", "2", "-o", str(tmp_path / "r.json")]) == 0
    steps = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert len(steps) == 4 and all(one["equal"] and one["off"] == 0 for one in steps.values())  # on a CPU, always


def test_full_size_without_a_gpu_is_refused(bench):
    with pytest.raises(SystemExit, match="--size full needs a GPU"):
        bench.main(["--memory", "--size", "full"])


def test_the_cost_of_quantising_is_the_one_in_the_docs(bench):
    stored = json.loads((ROOT / "docs" / "bench" / "quantize.json").read_text())
    for kind, found in bench.quantize()["kinds"].items():
        for name, value in found.items():
            assert value == pytest.approx(stored["kinds"][kind][name], rel=0.1), (kind, name)
    errors = [stored["kinds"][kind]["loss_error_mean"] for kind in ("int8", "fp8", "nf4")]
    assert errors == sorted(errors)


def test_what_guidance_does_stands_in_the_docs_as_it_was_measured():
    found = json.loads((ROOT / "docs" / "bench" / "guidance.json").read_text())
    text = (ROOT / "docs" / "recipes.md").read_text()
    for name, run in found["runs"].items():
        assert f"| {name} | {run['gradient_norm']:.2f} | {run['off_plain']:.1%} |" in text
    assert f"differ by {found['guided_and_clipped_at_1_against_clipped_at_a_third']:.1%}." in text


def test_guidance_is_measured_as_the_docs_say(bench, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench, "GUIDANCE_STEPS", 4)
    monkeypatch.setattr(
        bench, "GUIDANCE_RUNS", {name: bench.GUIDANCE_RUNS[name] for name in list(bench.GUIDANCE_RUNS)[:5]}
    )
    assert bench.main(["--guidance", "-o", str(tmp_path / "g.json")]) == 0
    runs = json.loads((tmp_path / "g.json").read_text())["runs"]
    assert runs["guidance 3"]["gradient_norm"] / runs["plain"]["gradient_norm"] == pytest.approx(3, rel=0.1)
    assert runs["plain"]["off_plain"] == 0.0
