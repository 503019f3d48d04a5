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
    backward_bytes: Mapping[str, float]
    """By dtype: what its backward adds to all that `none` keeps of it, per token and unit of `dim`."""
    traffic_bytes: int
    """Bytes that norms, gates, rotations and the LoRA move in forward and backward, per token and unit of `dim`.

    Matrix products and attention are left out: they are limited by arithmetic, which flops.py counts.
    """
    kernels: int
    """Number of kernels that forward and backward launch."""
    recomputed_products: Literal["none", "wide", "all"]
    """Which matrix products the backward computes a second time; wide: w1 and w3 of the feed forward."""
    recomputes_attention: bool = False


def _cost(
    description: str,
    kept: tuple[float, float],
    backward: tuple[float, float],
    traffic_bytes: int,
    kernels: int,
    recomputed_products: Literal["none", "wide", "all"],
    recomputes_attention: bool = False,
) -> RecomputeCost:
    """Return a cost, with bytes for bf16 and fp32."""
    kept_bytes, backward_bytes = ({"bf16": bf16, "fp32": fp32} for bf16, fp32 in (kept, backward))
    return RecomputeCost(
        description, kept_bytes, backward_bytes, traffic_bytes, kernels, recomputed_products, recomputes_attention
    )


WIDE = "norms, gates, activations and wide products"
FUSED_COSTS: dict[RecomputeMode, RecomputeCost] = {
    "none": _cost("nothing", (40.2, 80.3), (34.8, 48.8), 225, 68, "none"),
    "elementwise": _cost("norms, gates and activations", (24.8, 49.5), (25.5, 30.2), 262, 72, "none"),
    "w1w3": _cost(WIDE, (14.1, 28.2), (15.2, 29.9), 290, 77, "wide"),
    "attention": _cost("all but attention", (4.04, 8.05), (13.2, 25.8), 320, 91, "all"),
    "full": _cost("everything", (2.01, 4.01), (11.2, 21.8), 315, 91, "all", True),
}
"""Blocks that are fused (`lora.fused_block`), with a kernel for each region."""
MODULE_COSTS: dict[RecomputeMode, RecomputeCost] = {
    "none": _cost("nothing", (69.4, 90.8), (18.3, 24.3), 1100, 400, "none"),
    "elementwise": _cost("norms, gates and activations", (24.7, 49.4), (18.3, 24.3), 1390, 590, "none"),
    "w1w3": _cost(WIDE, (14.0, 28.0), (18.3, 24.3), 1417, 590, "wide"),
    "attention": _cost("all but attention", (4.03, 8.03), (18.3, 24.3), 1450, 590, "all"),
    "full": _cost("everything", (2.0, 4.0), (18.3, 24.3), 1450, 590, "all", True),
}
"""Blocks that run as diffusers' modules (`models.checkpointing`)."""


def recompute_costs(is_fused: bool) -> dict[RecomputeMode, RecomputeCost]:
    """Return the costs of the modes, from the mode that recomputes least."""
    return FUSED_COSTS if is_fused else MODULE_COSTS


def describe_mode(mode: RecomputeMode) -> str:
    """Return what the backward computes a second time, for messages."""
    return FUSED_COSTS[mode].description
