"""The cost of each recompute mode in memory, memory traffic and kernels.

What a mode recomputes is in lora/fused_block.py. Bytes and kernels were counted on the real graph at full width, with a
LoRA on attention and feed forward; tests/planning/test_memory.py counts the bytes again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zimage_train.config.types import RecomputeMode


@dataclass(frozen=True)
class RecomputeCost:
    """The cost of a transformer block under a mode."""

    description: str
    """What the backward computes a second time, for messages."""
    kept_bytes: Mapping[str, float]
    """By dtype: bytes that a block keeps from its forward to its backward, per token and unit of `dim`."""
    traffic_bytes: int
    """Bytes that norms, gates, rotations and the LoRA move in forward and backward, per token and unit of `dim`.

    Matrix products and attention are left out: they are limited by arithmetic, which flops.py counts.
    """
    kernels: int
    """Number of kernels that forward and backward launch."""
    recomputed_products: Literal["none", "wide", "all"]
    """Which matrix products the backward computes a second time; wide: w1 and w3 of the feed forward."""
    recomputes_attention: bool = False


FUSED_COSTS: dict[RecomputeMode, RecomputeCost] = {
    "none": RecomputeCost("nothing", {"bf16": 40.2, "fp32": 80.3}, 225, 68, "none"),
    "elementwise": RecomputeCost("norms, gates and activations", {"bf16": 24.8, "fp32": 49.5}, 262, 72, "none"),
    "w1w3": RecomputeCost("norms, gates, activations and wide products", {"bf16": 14.1, "fp32": 28.2}, 290, 77, "wide"),
    "attention": RecomputeCost("all but attention", {"bf16": 4.04, "fp32": 8.05}, 315, 90, "all"),
    "full": RecomputeCost("everything", {"bf16": 2.01, "fp32": 4.01}, 315, 91, "all", recomputes_attention=True),
}
"""Blocks that are fused (`lora.fused_block`), with a kernel for each region."""
MODULE_COSTS: dict[RecomputeMode, RecomputeCost] = {
    "none": RecomputeCost("nothing", {"bf16": 69.4, "fp32": 90.8}, 1100, 400, "none"),
    "elementwise": RecomputeCost("norms, gates and activations", {"bf16": 24.7, "fp32": 49.4}, 1390, 590, "none"),
    "w1w3": RecomputeCost(
        "norms, gates, activations and wide products", {"bf16": 14.0, "fp32": 28.0}, 1417, 590, "wide"
    ),
    "attention": RecomputeCost("all but attention", {"bf16": 4.03, "fp32": 8.03}, 1450, 590, "all"),
    "full": RecomputeCost("everything", {"bf16": 2.0, "fp32": 4.0}, 1450, 590, "all", recomputes_attention=True),
}
"""Blocks that run as diffusers' modules (`models.checkpointing`)."""


def recompute_costs(is_fused: bool) -> dict[RecomputeMode, RecomputeCost]:
    """Return the costs of the modes, from the mode that recomputes least."""
    return FUSED_COSTS if is_fused else MODULE_COSTS


def describe_mode(mode: RecomputeMode) -> str:
    """Return what the backward computes a second time, for messages."""
    return FUSED_COSTS[mode].description
