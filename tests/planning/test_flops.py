"""The arithmetic of a step, against operations counted on the real graph and the known totals of the full model."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from zimage_train.dataset.buckets import Bucket
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import flops

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
