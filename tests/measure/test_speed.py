"""The comparison of whole steps: both do the same work, and what is measured is written in one form."""

import json

import pytest
import torch

from zimage_train.measure import speed
from zimage_train.measure.models import random_batch
from zimage_train.measure.records import Measurement, report
from zimage_train.models.arch import TransformerShape

from helpers import ROOT, script

CPU = torch.device("cpu")
TINY = TransformerShape(dim=96, n_heads=3, n_kv_heads=3, n_layers=2, cap_feat_dim=64, axes_dims=(8, 12, 12))


def test_both_steps_do_the_same_work():
    """Ours and that of diffusers with peft begin with the same loss, and lower it alike."""
    batch = random_batch(TINY, torch.float32, 64, 64, 20, size=2)
    ours, reference = (make(TINY, "fp32", batch, CPU) for make in (speed.our_step, speed.reference_step))
    first, other_first = ours(), reference()
    assert first == pytest.approx(other_first, rel=1e-4)
    lower, other_lower = [(ours(), reference()) for _ in range(30)][-1]
    # The LoRAs begin with other random factors, so they do not go the same way.
    assert lower < 0.995 * first and other_lower < 0.995 * other_first


@pytest.mark.slow
def test_speed_bench_writes_records(tmp_path):
    path = tmp_path / "speed.json"
    assert script("bench").main(["--speed", "--size", "mini", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]
    claims = [row["claim"] for row in found["measurements"]]
    assert claims[0] == "ours to diffusers + peft, 64 px, batch 1" and len(claims) == 3
    assert all(row["value"] > 0 and row["unit"] for row in found["measurements"])


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
