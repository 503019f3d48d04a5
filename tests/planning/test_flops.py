"""The arithmetic of a step, against operations counted on the real graph and the known totals of the full model."""

import json
import math
from pathlib import Path
from statistics import median

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from zimage_train.dataset.buckets import Bucket
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import flops
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.planning.memory import WeightPlacement

from workloads import workload

BENCH = Path(__file__).parents[2] / "docs" / "bench"
FULL = TransformerShape()


@pytest.mark.parametrize(("side", "kept", "recomputed"), [(512, 25.9, 38.1), (768, 61.5, 89.3), (1024, 120.2, 172.6)])
def test_step_flops_equal_the_graph(side: int, kept: float, recomputed: float):
    """The FLOPs of a step of the full model are those counted on its graph.

    The figures include the LoRA's own products of rank 16, about 1 %.
    """
    assert flops.step_flops(FULL, Bucket(side, side), "none") / 1e12 == pytest.approx(kept, rel=0.01)
    assert flops.step_flops(FULL, Bucket(side, side), "full") / 1e12 == pytest.approx(recomputed, rel=0.01)


def test_forward_flops_equal_torch():
    """The FLOPs of a forward pass are those that torch counts on the real graph."""
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**FULL.config())
        latents, embeds = torch.empty(16, 1, 64, 64), torch.empty(64, FULL.cap_feat_dim)
        t = torch.empty(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model([latents], t, [embeds])
    assert flops.forward_flops(FULL, Bucket(512, 512)) == pytest.approx(counter.get_total_flops(), rel=0.01)


MeasuredStep = tuple[str, int, str | None, float]
"""Mode, side in px, quantisation, and seconds."""


def measured_steps() -> list[MeasuredStep]:
    """Every step that was measured on an H100, launched from Python with blocks as modules."""
    steps: list[MeasuredStep] = []
    for run in json.loads((BENCH / "memory.json").read_text())["runs"]:
        if "error" not in run:
            steps.append((run["mode"], run["side_px"], run["kind"], median(run["seconds"][1:])))
    for name, found in json.loads((BENCH / "repeat.json").read_text())["steps"].items():
        if name.endswith("as a run"):
            steps.append(("none", int(name.partition(" ")[0]), None, found["seconds"]))
    return steps


def off(step: MeasuredStep, launch: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """Measured for predicted time, if a launch takes so many seconds."""
    mode, side, kind, seconds = step
    monkeypatch.setattr(flops, "LAUNCH_SECONDS", launch)
    made = workload((side,), is_fused=False)
    return seconds / flops.step_seconds(made, WeightPlacement(kind), mode, Bucket(side, side), GPU_SPECS["h100"])


def fitted(steps: list[MeasuredStep], monkeypatch: pytest.MonkeyPatch) -> float:
    """The time of a launch, in whole microseconds, with which the predictions are nearest."""

    def error(microseconds: int) -> float:
        return sum(abs(math.log(off(step, microseconds * 1e-6, monkeypatch))) for step in steps)

    return min(range(20, 61, 2), key=error) * 1e-6


def test_times_are_within_their_interval(monkeypatch):
    """Each measured step is within the interval of its prediction, with constants from all other steps."""
    launch, steps = flops.LAUNCH_SECONDS, measured_steps()
    assert len(steps) == 17 and fitted(steps, monkeypatch) == pytest.approx(launch)
    ratios = []
    for index, step in enumerate(steps):
        others = steps[:index] + steps[index + 1 :]
        ratios.append(off(step, fitted(others, monkeypatch), monkeypatch))
    least, most = flops.TIME_INTERVAL
    assert least <= min(ratios) and max(ratios) <= most
    assert sum(0.8 <= ratio <= 1.15 for ratio in ratios) >= 13


@pytest.mark.parametrize(("side", "goal_ms"), [(512, 70), (768, 165), (1024, 325)])
def test_fused_steps_are_predicted_in_reach(side: int, goal_ms: float):
    """A fused step without recomputation, replayed, is predicted within the goal for an H100."""
    seconds = flops.step_seconds(workload((side,)), WeightPlacement(), "none", Bucket(side, side), GPU_SPECS["h100"])
    assert 0.6 * goal_ms < seconds * 1000 <= goal_ms
