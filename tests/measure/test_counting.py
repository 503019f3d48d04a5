"""The work of a step at full size, which holds without a GPU: launches, bytes moved and bytes kept, by their limits."""

import pytest
import torch

from zimage_train.config.lora import LoraSettings
from zimage_train.config.types import RECOMPUTE_MODES
from zimage_train.lora.kronecker_shapes import shapes_of
from zimage_train.measure import counting
from zimage_train.planning.flops import LOKR_BYTES

import workloads
from steps import FULL, counted_step

LIMITS = {"launches_ours": 3300, "bytes_ours": 60e9, "kept_ours": 20e9}
REFERENCE = {"launches_reference": 8280, "bytes_reference": 547e9, "kept_reference": 33.2e9}
"""The work of diffusers' model with peft's LoRA, counted in another way before the blocks were fused."""


@pytest.mark.slow
def test_step_at_1024_px():
    """At 1024 px, our step keeps to its limits, and the reference is counted as it was before."""
    (row,) = counting.comparison((1024,))["counted"]
    assert all(row[key] <= limit for key, limit in LIMITS.items()), row
    assert all(row[key] == pytest.approx(known, rel=0.002) for key, known in REFERENCE.items()), row
    assert row["optimizer_launches_ours"] < 30


KEPT_PER_TOKEN = {
    "none": 12 * 3840 + 3 * 10240,
    "elementwise": 7 * 3840 + 2 * 10240,  # x, q, k, v, attention and its projection, the feed forward's; w1 and w3
    "w1w3": 7 * 3840,
    "attention": 2 * 3840,
    "full": 3840,
}
"""Numbers in bf16 that a block keeps, by the table in docs/memory.md."""
SMALL = {"none": 7 * 16 * 2 + 4 * (4 + 2 * 30), "elementwise": 7 * 16 * 2 + 4, "w1w3": 7 * 16 * 2 + 4}
"""Bytes of the inputs of every B, and of inverse RMS: of four norms, and of q and k by head."""


@pytest.mark.slow
@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
def test_fused_blocks_keep_what_they_name(mode: str):
    """A block keeps the tensors that the mode names, and nothing else."""
    tokens = 32**2 + 64
    kept = counted_step(mode, 512, 3).kept_bytes - counted_step(mode, 512, 2).kept_bytes
    row_sums = 0 if mode == "full" else 4 * FULL.n_heads
    wanted = (2 * KEPT_PER_TOKEN[mode] + row_sums + SMALL.get(mode, 4)) * tokens
    modulation = 4 * 2 * 3840
    assert kept == pytest.approx(wanted + modulation, abs=2000)


def products_and_bytes(lora: LoraSettings) -> tuple[float, float, int]:
    """What a block with an adapter takes: bytes of its products, all other bytes, and those that are kept."""
    steps = [counted_step("none", 1024, layers, lora=lora).select("forward", "backward") for layers in (2, 3)]
    moved = [sum(launch.num_bytes for launch in step.launches if launch.is_arithmetic) for step in steps]
    return moved[1] - moved[0], steps[1].moved_bytes - steps[0].moved_bytes, steps[1].kept_bytes - steps[0].kept_bytes


@pytest.mark.slow
def test_lokr_moves_and_keeps_like_a_lora():
    """A LoKr keeps nothing that a LoRA does not, and moves as planned: more in its products, and little elsewhere."""
    settings = LoraSettings(type="lokr")
    lora, lokr = products_and_bytes(LoraSettings(rank=16)), products_and_bytes(settings)
    tokens = 64**2 + 64
    block = shapes_of(settings, FULL.linears, [name for name in workloads.MODULES if name.startswith("layers.0.")])
    between = sum(shape.between for shape in block.values())
    assert lokr[0] - lora[0] == pytest.approx(LOKR_BYTES * between * tokens, rel=0.1)
    assert lokr[1] < 1.1 * lora[1]
    assert lokr[2] <= lora[2]


def test_a_launch_counts_what_it_moves():
    """Views are free, an expanded dimension counts once, and a product is told from the rest."""
    with torch.device("meta"), counting.CountedLaunches() as counter:
        x, row = torch.empty(8, 4), torch.empty(4)
        counter.launches.clear()
        y = x.t().t() + row.expand(8, 4)
        y @ x.t()
    assert [launch.name for launch in counter.launches] == ["add", "mm"]
    assert counter.launches[0].num_bytes == 4 * (32 + 4 + 32)
    assert [launch.is_arithmetic for launch in counter.launches] == [False, True]


def test_live_bytes_fall_when_a_tensor_goes():
    with torch.device("meta"), counting.LiveBytes() as live:
        kept = torch.empty(10)
        gone = kept + 1
        del gone
        assert (live.now, live.peak) == (40, 80)
