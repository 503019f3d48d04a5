"""The comparison of whole steps: both do the same work, and what is measured is written in one form."""

import json
import sys
from pathlib import Path

import pytest
import torch

from zimage_train.measure import peers, speed
from zimage_train.measure.models import random_batch
from zimage_train.measure.records import Measurement, report
from zimage_train.models.arch import TransformerShape

from helpers import ROOT, script

CPU = torch.device("cpu")
TINY = TransformerShape(dim=96, n_heads=3, n_kv_heads=3, n_layers=2, cap_feat_dim=64, axes_dims=(8, 12, 12))


def test_both_steps_do_the_same_work():
    """Ours and that of diffusers with peft begin with the same loss, and lower it alike."""
    batch = random_batch(TINY, torch.float32, 64, 64, 20, size=2)
    ours = speed.our_step(TINY, speed.plan_without_limits(TINY, 64, "fp32", gpu=False), CPU)
    reference = speed.peer_step(peers.diffusers_and_peft(TINY, torch.float32, CPU), CPU)
    first, other_first = ours(batch), reference(batch)
    assert first == pytest.approx(other_first, rel=1e-4)
    lower, other_lower = [(ours(batch), reference(batch)) for _ in range(30)][-1]
    # The LoRAs begin with other random factors, so they do not go the same way.
    assert lower < 0.995 * first and other_lower < 0.995 * other_first


@pytest.mark.slow
def test_speed_bench_writes_records(tmp_path):
    path = tmp_path / "speed.json"
    assert script("bench").main(["--speed", "--size", "mini", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]
    claims = [row["claim"] for row in found["measurements"]]
    assert claims[0] == "ours to diffusers + peft, 64 px, batch 1" and claims[5].endswith(", mixed epoch")
    apart = [row["value"] for row in found["measurements"] if row["claim"].startswith("first losses apart")]
    assert len(claims) == 10 and len(apart) == 2 and max(apart) < 1e-4
    assert all(row["value"] > 0 or row["value"] in apart for row in found["measurements"])


def other_trainer(folder: Path, transformer: str) -> Path:
    """The source of a trainer whose transformer is diffusers', in SimpleTuner's place."""
    place = folder / "simpletuner/helpers/models/z_image"
    place.mkdir(parents=True)
    (place / "transformer.py").write_text(transformer)
    return folder


def test_against_another_trainer(tmp_path: Path, monkeypatch, capsys):
    """A trainer's own classes are timed on the same inputs; what cannot be timed is named in a line."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    bench, report = script("bench"), tmp_path / "against.json"
    source = other_trainer(tmp_path / "a", "from diffusers import ZImageTransformer2DModel\n")
    command = ["--speed", "--size", "mini", "--json", str(report), "--against"]
    assert bench.main([*command, str(source)]) == 0
    rows = {row["claim"]: row for row in json.loads(report.read_text())["measurements"]}
    assert rows["first losses apart, 64 px, batch 1"]["value"] < 1e-4
    assert "bound" not in rows["ours to SimpleTuner, 64 px, batch 1"]
    for module in [name for name in sys.modules if name.startswith("simpletuner")]:
        monkeypatch.delitem(sys.modules, module)

    assert bench.main([*command, str(tmp_path / "nothing")]) == 1
    assert "is the source of no known trainer" in capsys.readouterr().err
    broken = other_trainer(tmp_path / "b", "import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(broken))
    assert bench.main([*command, str(broken)]) == 1
    assert "cannot be imported (No module named 'a_package_that_is_not_there')" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--count", "--against", str(source)])


def test_cpu_step_is_no_slower():
    """What was measured on a CPU is within its bound."""
    found = json.loads((ROOT / "docs" / "bench" / "speed_cpu.json").read_text())
    bounded = [row for row in found["measurements"] if "bound" in row]
    assert len(bounded) == 2 and all(row["holds"] and row["value"] <= 1.05 for row in bounded)


def test_a_bound_holds_or_not():
    measurements = [
        Measurement("a", 1.0, "ms", bound=1.0),
        Measurement("b", 1.1, "ms", 1.0),
        Measurement("c", 9.0, "GB"),
    ]
    rows = report(measurements, CPU)["measurements"]
    assert [row.get("holds") for row in rows] == [True, False, None]
    assert rows[2] == {"claim": "c", "value": 9.0, "unit": "GB"}
