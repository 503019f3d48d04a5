"""The time of a whole run: its stages, by hand from the parts, and what changes them."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.planning import flops, forecast, memory, planner, preflight, run_times
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.planning.planner import PlanConstraints
from zimage_train.training import run_dir, stage_clock
from zimage_train.training.stage_clock import StageClock

from gpu_parts import product
from helpers import PREVIEWED
from workloads import workload

CARD = GPU_SPECS["4090"]


@torch.no_grad()
def test_vae_operations_are_counted():
    """Operations per pixel are those of the published VAE's classes."""
    with torch.device("meta"):
        vae = AutoencoderKL(**product.VAE)
    with FlopCounterMode(display=False) as counter:
        vae.encoder(torch.empty(1, 3, 1024, 1024, device="meta"))
    assert counter.get_total_flops() / 1024**2 == pytest.approx(run_times.ENCODE_FLOPS, rel=0.05)
    with FlopCounterMode(display=False) as counter:
        vae.decoder(torch.empty(1, 16, 128, 128, device="meta"))
    assert counter.get_total_flops() / 1024**2 == pytest.approx(run_times.DECODE_FLOPS, rel=0.05)


@pytest.fixture
def spec_and_plan(make_config, tmp_path):
    """A checked run on the published architecture, on a 4090."""

    def made(host_bytes: float = 256e9, **changes):
        sample = {"every": 100, "first": True, "prompts": ["one", "two"], "width": 1024, "height": 1024}
        values = {"train": {"steps": 1000}, "sample": sample, "save": {"every": 250}}
        values |= {"model": {"dtype": "bf16"}} | changes
        spec = preflight.check_run(make_config(**values))
        full = replace(spec, model_files=None)
        load = preflight.workload_of(full, gpu=True)
        plan = planner.choose_plan(load, PlanConstraints((None,), None, None), 24e9, host_bytes, CARD)
        return full, plan

    return made


def test_stages_by_hand(spec_and_plan):
    """Steps, previews and drift are what their passes take."""
    spec, plan = spec_and_plan()
    times = run_times.predict_times(spec, plan, CARD)
    shares = plan.workload.shares()
    step = sum(share * plan.step_seconds(size, CARD) for size, share in shares.items())
    assert times.seconds["steps"] == pytest.approx(1000 * step)

    forward = flops.forward_seconds(plan.workload, plan.placement, Bucket(1024, 1024), 1, CARD)
    image = 8 * forward + 1.0e7 * 1024**2 / (0.4 * 165e12)
    moved = memory.model_bytes(plan.workload, None)
    exchange = 2 * moved / 12e9  # both ways, at half of PCIe's rate
    # 11 times: before step 1 and after each 100 steps. Weights come and go each time, and are read once.
    assert times.seconds["previews"] == pytest.approx(11 * (2 * image + 2 * exchange) + moved / 2e9)
    # Turbo's own two trajectories, and ten measurements of both, at three steps each.
    assert times.seconds["drift"] == pytest.approx((1 + 10) * 2 * 3 * forward)
    saved = plan.workload.trained * (4 + 8 + 4)  # factors, the two moments of AdamW, and an export in fp32
    assert times.seconds["saves"] == pytest.approx(4 * saved / 0.5e9)
    assert times.seconds["validation"] == times.seconds["generating"] == 0
    assert times.total == pytest.approx(sum(times.seconds.values()))
    assert times.warm_start < sum(times.seconds[stage] for stage in run_times.BEFORE_STEPS)


def test_factor_is_of_passes_alone(spec_and_plan):
    """What runs on this machine measured corrects the passes, and not the files and programs."""
    spec, plan = spec_and_plan()
    one, ten = (run_times.predict_times(spec, plan, CARD, factor).seconds for factor in (1.0, 10.0))
    assert all(ten[stage] == pytest.approx(10 * one[stage]) for stage in ("steps", "drift"))
    assert all(ten[stage] == one[stage] for stage in ("checks", "encoding", "loading", "saves"))
    assert one["previews"] < ten["previews"] < 10 * one["previews"]


def test_small_main_memory_reads_files(spec_and_plan):
    """Without main memory for a second set of weights, previews read them from the file twice each time."""
    (spec, kept), (_, read) = spec_and_plan(), spec_and_plan(host_bytes=20e9)
    assert kept.keeps_original_weights and not read.keeps_original_weights
    assert read.placement == kept.placement
    fast, slow = (run_times.predict_times(spec, plan, CARD).seconds["previews"] for plan in (kept, read))
    moved = memory.model_bytes(kept.workload, None)
    assert slow - fast == pytest.approx(22 * moved / 2e9 - moved / 2e9 - 22 * 2 * moved / 12e9)


@pytest.mark.parametrize("host", [0.0, 20e9, 30e9, 64e9])
@pytest.mark.parametrize("streamed", [0, 20])
def test_spare_memory_is_half_less_streamed(host: float, streamed: int):
    """Weights for previews get what streamed blocks leave of half the main memory."""
    plan = planner.choose_plan(workload(), PlanConstraints((None,), None, streamed), 24e9, host, CARD)
    pinned = memory.host_bytes(plan.workload, plan.placement)
    assert plan.spare_host_bytes == max(host / 2 - pinned, 0)
    assert plan.keeps_original_weights == (host / 2 - pinned >= memory.model_bytes(plan.workload, None))


def test_no_previews_no_time(spec_and_plan):
    """Nothing is predicted or said of previews where there are none."""
    for sample in ({"every": None}, {"every": 100, "prompts": []}):
        spec, plan = spec_and_plan(sample=sample)
        times = run_times.predict_times(spec, plan, CARD)
        assert times.seconds["previews"] == times.seconds["drift"] == 0
        lines = forecast.forecast_lines(spec, "4090", None)
        assert not any("preview" in line.text for line in lines if line.code == "share")


def test_large_share_is_named(spec_and_plan, monkeypatch):
    """Whatever takes over a tenth beside the steps is named, and the setting that is named halves it."""
    spec, plan = spec_and_plan(train={"steps": 1000})
    texts = {line.code: line.text for line in forecast.forecast_lines(spec, "4090", None)}
    assert "sample.every: 200 halves that" in texts["large-share"]
    rarer, _ = spec_and_plan(sample={"every": 200, "prompts": ["one", "two"], "width": 1024, "height": 1024})
    before, after = (run_times.predict_times(one, plan, CARD).seconds["previews"] for one in (spec, rarer))
    assert after == pytest.approx(before / 2, rel=0.15)  # those before step 1 stay
    once, _ = spec_and_plan(sample={"every": 1000, "first": False, "prompts": ["one"], "width": 64, "height": 64})
    assert "large-share" not in {line.code for line in forecast.forecast_lines(once, "4090", None)}


@given(st.dictionaries(st.sampled_from(run_times.STAGES), st.floats(0, 1e5), min_size=1))
def test_shares_are_of_the_whole(some: dict):
    """The shares that are printed make up the whole, however small."""
    seconds = dict.fromkeys(run_times.STAGES, 0.0) | some
    text = run_times.describe_times(seconds)
    percents = [int(part.split("%")[0].split()[-1]) for part in text.split(", ")]
    if sum(seconds.values()) > 1e-3:
        assert abs(sum(percents) - 100) <= len(percents) / 2 + 1
    assert text.startswith("start ")


def test_clock_counts_inner_stages_once(monkeypatch):
    """A stage within another stops the outer one."""
    now = iter([0.0, 5.0, 15.0, 18.0, 118.0, 119.0, 120.0, 125.0])
    monkeypatch.setattr(stage_clock.time, "monotonic", lambda: next(now))
    clock = StageClock()
    # Steps begin at 5, previews at 15, drift at 18; they end at 118, 119 and 120.
    with clock.stage("steps"), clock.stage("previews"), clock.stage("drift"):
        pass
    found = {name: seconds for name, seconds in clock.seconds().items() if seconds}
    assert found == {"checks": 5.0 + 5.0, "steps": 10.0 + 1.0, "previews": 3.0 + 1.0, "drift": 100.0}


@pytest.mark.slow
def test_run_reports_its_stages(make_config, capsys):
    """A run's times by stage are in run.json and in its log, and make up the whole run."""
    config: Config = make_config(sample=PREVIEWED, train={"steps": 4})
    run_training(config, fresh=False)
    facts = run_dir.read_facts(run_dir.run_dir_of(config))
    assert set(facts["seconds"]) == set(run_times.STAGES)
    assert min(facts["seconds"][stage] for stage in ("loading", "rehearsal", "steps", "previews")) > 0
    assert facts["seconds"]["validation"] == 0
    assert "time of this start: start " in run_dir.run_dir_of(config).log.read_text()
    assert "time of the last start" in run_dir.run_dir_of(config).report.read_text()
