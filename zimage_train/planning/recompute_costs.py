"""The costs of each recompute mode, counted on the real graph at the full width; the tests count again.

What a mode recomputes is in models/checkpointing.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zimage_train.config.types import RecomputeMode


@dataclass(frozen=True)
class RecomputeCost:
    """What one block costs in the backward pass."""

    description: str
    """Of what is computed again."""
    kept_bytes: Mapping[str, float]
    """Kept by one block until its backward, per token and unit of `dim`, by dtype."""
    traffic_bytes: int
    """Moved by norms, gates, rotations and the LoRA, per token and unit of `dim`; without products and attention."""
    kernels: int
    """Launched in forward and backward."""
    recomputed_products: Literal["none", "wide", "all"]
    """wide: w1 and w3 of the feed forward."""
    recomputes_attention: bool = False


RECOMPUTE_COSTS: dict[RecomputeMode, RecomputeCost] = {
    "none": RecomputeCost("nothing", {"bf16": 69.4, "fp32": 90.8}, 1100, 400, "none"),
    "elementwise": RecomputeCost("norms, gates and activations", {"bf16": 24.7, "fp32": 49.4}, 1390, 590, "none"),
    "w1w3": RecomputeCost(
        "norms, gates, activations and wide products", {"bf16": 14.0, "fp32": 28.0}, 1417, 590, "wide"
    ),
    "attention": RecomputeCost("all but attention", {"bf16": 4.03, "fp32": 8.03}, 1450, 590, "all"),
    "full": RecomputeCost("everything", {"bf16": 2.0, "fp32": 4.0}, 1450, 590, "all", recomputes_attention=True),
}
