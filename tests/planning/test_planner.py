"""The planner: what it chooses fits, is the fastest of what fits, and says what to set where nothing does."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.config.schema import Config
from zimage_train.config.types import RECOMPUTE_MODES
from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import ConfigError
from zimage_train.models.pinned_memory import arena_sizes, pinned_bytes
from zimage_train.planning import flops, gpus, memory, planner, suggestions
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import AUTO_QUANTIZATIONS, NO_LIMIT, PlanConstraints
from zimage_train.planning.suggestions import SettingChange

from workloads import recipe, workload

FREE = PlanConstraints((None,), None, None)
ANY = PlanConstraints(AUTO_QUANTIZATIONS, None, None)
HOST = 64e9
ALL = (512, 768, 1024)


def choose(sides=ALL, limit=24e9, wanted=FREE, host=HOST, card=None, **changes):
    return planner.choose_plan(workload(sides, **changes), wanted, limit, host, card)


@settings(max_examples=60, deadline=None)
@given(
    limit_gb=st.floats(6, 200),
    host_gb=st.floats(8, 128),
    batch=st.integers(1, 4),
    kinds=st.sampled_from([(None,), ("fp8",), ("nf4",), AUTO_QUANTIZATIONS]),
    sides=st.sets(st.sampled_from((256, 512, 768, 1024, 1536)), min_size=1),
)
def test_plan_fits_everywhere(limit_gb, host_gb, batch, kinds, sides):
    """A plan that fits does so in every batch and preview."""
    made = workload(tuple(sides), batch_size=batch)
    plan = planner.choose_plan(made, PlanConstraints(kinds, None, None), limit_gb * 1e9, host_gb * 1e9, None)
    assert plan.placement.quantization in kinds
    assert plan.fits == (plan.peak.total <= limit_gb * 1e9)
    if plan.fits:
        for size in made.sizes:
            tokens = made.tokens(size)
            assert memory.step_memory(made, plan.placement, plan.mode_of(tokens), tokens).total <= limit_gb * 1e9
        assert plan.placement.streamed == 0 or memory.host_bytes(made, plan.placement) <= 0.5 * host_gb * 1e9
    if plan.placement.streamed:
        assert all(plan.mode_of(tokens) != "none" for tokens in range(1, 20000, 500))


def test_full_precision_is_preferred():
    """Full precision without streaming is taken wherever it fits."""
    for limit in (17e9, 24e9, 48e9, 141e9):
        plan = choose(limit=limit, wanted=ANY)
        assert plan.fits and plan.placement == WeightPlacement()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", {512: "none", 768: "none", 1024: "none"}),
        ("4090", {512: "none", 768: "none", 1024: "w1w3"}),
        ("4080", {512: "elementwise", 768: "attention", 1024: "attention"}),
    ],
)
def test_sizes_recompute_the_least(name: str, expected: dict[int, str]):
    """Each size recomputes the least that fits."""
    plan = choose(limit=GPU_SPECS[name].memory_gb * 1e9, card=GPU_SPECS[name])
    assert {side: plan.mode_of(plan.workload.tokens(Bucket(side, side))) for side in ALL} == expected
    for side, mode in expected.items():
        if mode != "none":
            more = RECOMPUTE_MODES[RECOMPUTE_MODES.index(mode) - 1]
            tokens = plan.workload.tokens(Bucket(side, side))
            assert (
                memory.step_memory(plan.workload, plan.placement, more, tokens).total > GPU_SPECS[name].memory_gb * 1e9
            )


@pytest.mark.parametrize("name", ["4070", "4060"])
def test_small_gpus_stream(name: str):
    """Small GPUs stream, and keep full precision if main memory allows."""
    card = GPU_SPECS[name]
    plan = choose(limit=card.memory_gb * 1e9, card=card, wanted=ANY)
    assert plan.fits and plan.placement.quantization is None and plan.placement.streamed > 0
    poor = choose(limit=card.memory_gb * 1e9, card=card, wanted=ANY, host=7e9)
    assert poor.fits and poor.placement.quantization == "int8"


def test_a_plan_explains_itself():
    card = GPU_SPECS["4060"]
    assert choose(limit=24e9).why == "by what fits 24.00 GB"
    assert "streaming in full precision costs little" in choose(limit=8e9, card=card, wanted=ANY).why
    assert "full precision does not fit" in choose(limit=8e9, card=card, wanted=ANY, host=8e9).why
    slow = replace(card, pcie_gb_per_second=1.0)
    assert re.search(r"full precision would take \d\.\d times as long", choose(limit=8e9, card=slow, wanted=ANY).why)
    assert choose(wanted=PlanConstraints((None,), "full", 0)).why == "set in the config"


def test_a_slow_bus_prefers_fewer_bytes():
    slow = replace(GPU_SPECS["4090"], pcie_gb_per_second=1.0)
    fast = choose((512,), limit=9e9, card=GPU_SPECS["4060"], wanted=ANY)
    slowed = choose((512,), limit=9e9, card=slow, wanted=ANY)
    assert fast.placement.quantization is None and slowed.placement.quantization is not None
    assert slowed.placement.streamed < fast.placement.streamed


def test_choice_is_near_the_fastest():
    """No plan that fits is predicted to be more than a quarter faster than the chosen plan."""
    card, limit = GPU_SPECS["4060"], 8.6e9
    chosen = choose(limit=limit, card=card, wanted=ANY)
    for kind in AUTO_QUANTIZATIONS:
        for streamed in range(31):
            other = planner._make_plan(chosen.workload, WeightPlacement(kind, streamed), None, limit)
            if other.fits:
                ours, theirs = (planner._mean_seconds(plan, card) for plan in (chosen, other))
                assert ours <= theirs * planner.MAX_SLOWDOWN * 1.0001


@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
def test_the_config_has_the_last_word(mode: str):
    plan = choose(wanted=PlanConstraints(("fp8",), mode, 0), limit=1e9)
    assert plan.placement == WeightPlacement("fp8", 0) and plan.limits == {mode: NO_LIMIT} and not plan.fits
    assert plan.mode_of(1) == plan.mode_of(10**6) == mode


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PlanConstraints((None,), None, None)),
        ({"model": {"quantize": "auto"}}, PlanConstraints(AUTO_QUANTIZATIONS, None, None)),
        ({"model": {"quantize": "nf4"}}, PlanConstraints(("nf4",), None, None)),
        ({"memory": {"checkpointing": True, "offload": 0.5}}, PlanConstraints((None,), "full", 15)),
        ({"memory": {"checkpointing": False}}, PlanConstraints((None,), "none", None)),
        ({"memory": {"checkpointing": "w1w3", "offload": 0}}, PlanConstraints((None,), "w1w3", 0)),
    ],
)
def test_constraints_from_the_config(changes: dict, expected: PlanConstraints):
    """The planner decides the settings that the config leaves open."""
    config = Config.model_validate({"name": "x", "data": [{"folder": "p"}], **changes})
    assert planner.plan_constraints(config, 30) == expected


def test_streaming_needs_recomputation():
    """Streaming without recomputation is refused."""
    with pytest.raises(ValueError, match="offload needs recomputation"):
        Config.model_validate(
            {"name": "x", "data": [{"folder": "p"}], "memory": {"checkpointing": "none", "offload": 0.5}}
        )


@pytest.mark.parametrize("limit_gb", [80, 24, 16, 12, 8, 7])
def test_suggestion_is_predicted_to_fit(limit_gb: float):
    """The settings suggested for a run that does not fit are predicted to fit."""
    made = workload((1024, 1536), batch_size=4, previews=(recipe(1024),))
    wanted = PlanConstraints((None,), "none", 0)
    if planner.choose_plan(made, wanted, limit_gb * 1e9, HOST, None).fits:
        return
    said = suggestions.suggest_settings(made, wanted, limit_gb * 1e9, HOST)
    settings = {one.key: one.value for one in said.changes}
    assert settings.pop("memory.checkpointing") == settings.pop("memory.offload") == "auto"
    batch, side = int(settings.pop("train.batch_size", 4)), settings.pop("data.*.resolution", None)
    changed = replace(made, batch_size=batch, sizes=Counter({Bucket(int(side), int(side)): 20}) if side else made.sizes)
    kinds = AUTO_QUANTIZATIONS if settings.pop("model.quantize", None) == "auto" else (None,)
    assert not settings
    plan = planner.choose_plan(changed, PlanConstraints(kinds, None, None), limit_gb * 1e9, HOST, None)
    assert plan.fits and said.predicted_bytes == plan.peak.total
    assert str(said).endswith(f" (predicted: {plan.peak.total / 1e9:.2f} GB)")


def test_suggestion_of_the_least_memory():
    """If nothing fits, the least memory that a run takes is named."""
    said = suggestions.suggest_settings(workload(), ANY, 1e9, HOST)
    assert said.changes == []
    assert re.fullmatch(r"a run takes \d\.\d\d GB at the least \(predicted\), so more memory is needed", str(said))


def test_suggestion_names_the_cause():
    """Large previews and a large rank are named where they are the cause."""
    drawn = workload((512,), previews=(recipe(4096),))
    small = [SettingChange("sample.width", 1024), SettingChange("sample.height", 1024)]
    assert suggestions.suggest_settings(drawn, FREE, 9e9, HOST).changes == small
    ranked = replace(workload((512,)), trained=workload((512,)).trained * 32, rank=512)
    assert not planner.choose_plan(ranked, FREE, 8e9, HOST, None).fits
    assert suggestions.suggest_settings(ranked, FREE, 8e9, HOST).changes == [SettingChange("lora.rank", 16)]


def test_gpu_memory_matches_its_name():
    """A GPU has as much memory as its name says."""
    assert gpus.get_gpu("a100 40gb").memory_gb == pytest.approx(42.9, abs=0.1)
    assert gpus.get_gpu("A100-SXM4-40GB").tflops == GPU_SPECS["a100"].tflops
    assert gpus.get_gpu("NVIDIA A100 80GB PCIe") is GPU_SPECS["a100"]


def test_suggestion_skips_planner_choices():
    """Settings that the planner decides already are not suggested."""
    said = suggestions.suggest_settings(workload((1536,), batch_size=4), FREE, 9e9, HOST)
    assert {"memory.checkpointing", "memory.offload"}.isdisjoint(one.key for one in said.changes)


# Cards


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "4090"),
        ("RTX-4090", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070tisuper"),
        ("NVIDIA GeForce RTX 5060 Ti", "5060ti"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA RTX A5000", "a5000"),
        ("NVIDIA RTX 6000 Ada Generation", "6000ada"),
    ],
)
def test_gpu_names_and_nicknames(text: str, name: str):
    """A GPU is known by its own name and by its common short names."""
    assert gpus.get_gpu(text).name == name


@pytest.mark.parametrize(
    "text",
    ["", "GTX 1080", "L", "Quadro RTX 8000", "9070 XT", "4070 ti", "3060 Ti", "4090 Laptop GPU", "4090 D", "4090x"],
)
def test_unknown_gpu_is_refused(text: str):
    """An unknown GPU is refused, with the list of known GPUs."""
    with pytest.raises(ConfigError, match="give one of 3060, "):
        gpus.get_gpu(text)


# Time


def test_time_falls_with_faster_gpus():
    """Faster GPUs and less recomputation take less time."""
    made = workload((1024,))
    size = Bucket(1024, 1024)

    def seconds(mode="none", name="4090", placement=WeightPlacement()):  # noqa: B008
        return flops.step_seconds(made, placement, mode, size, GPU_SPECS[name])

    assert seconds(name="h100") < seconds(name="5090") < seconds(name="4090") < seconds(name="3090")
    by_mode = [seconds(mode) for mode in RECOMPUTE_MODES]
    assert by_mode == sorted(by_mode)
    assert seconds(placement=WeightPlacement("int8")) > seconds()
    assert seconds("full", placement=WeightPlacement(None, 30)) >= seconds("full")


def test_time_floor_is_arithmetic():
    """The lower bound of a step's time is its arithmetic.

    At 1024 px that is 120.2 TFLOP: 152 ms at the 790 TFLOP/s that an H100 reaches.
    """
    made = workload((1024,))
    found = flops.step_seconds(made, WeightPlacement(), "none", Bucket(1024, 1024), GPU_SPECS["h100"])
    assert 0.152 < found < 0.35


def test_streaming_time_is_hidden():
    """Streaming is hidden behind computing until it takes longer."""
    made, size, card = workload((1024,)), Bucket(1024, 1024), GPU_SPECS["4090"]
    hidden = flops.step_seconds(made, WeightPlacement(None, 15), "full", size, card)
    assert hidden == flops.step_seconds(made, WeightPlacement(), "full", size, card)
    slow = replace(card, pcie_gb_per_second=2.0)
    copying = 2 * 13 * memory.block_bytes(made, None) / (0.9 * 2e9)
    assert flops.step_seconds(made, WeightPlacement(None, 15), "full", size, slow) == pytest.approx(copying)


# Main memory


@pytest.mark.parametrize("block_bytes", [361_814_528, 190_443_008, 101_904_896])
def test_pinned_blocks_lose_little(block_bytes: int):
    """Pinned blocks lose little to the allocator's rounding."""
    for count in range(0, 31):
        shared = arena_sizes(count, block_bytes)
        assert sum(shared) == count
    assert pinned_bytes(30, block_bytes) <= 1.12 * 30 * block_bytes
    assert pinned_bytes(1, block_bytes) == 2 ** (block_bytes - 1).bit_length()
