"""Recomputation: every mode keeps what it says, frees what it says, and changes no number."""

import pytest
import torch

from zimage_train.config.lora import LoraSettings
from zimage_train.config.types import RECOMPUTE_MODES, RecomputeMode
from zimage_train.models import checkpointing

from steps import FULL, counted_step, gradients, unfused


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", RECOMPUTE_MODES[1:])
def test_recomputing_changes_no_bit(mode: str, dropout: float):
    """Loss and gradients are the same bits in every mode."""
    lora = LoraSettings(rank=4, dropout=dropout, rank_dropout=dropout, module_dropout=dropout)
    wanted = gradients(*unfused("none", dropout=dropout, lora=lora))
    found = gradients(*unfused(mode, dropout=dropout, lora=lora))
    assert sum(bool(one.any()) for one in wanted) > len(wanted) / 2
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_mode_follows_the_tokens():
    """The mode follows the number of tokens in the batch."""
    asked: list[int] = []

    def mode_of(tokens: int) -> RecomputeMode:
        asked.append(tokens)
        return "full"

    frozen, attached = unfused("none")
    frozen.model.enable_gradient_checkpointing(checkpointing.checkpoint_by_tokens(mode_of, False))
    gradients(frozen, attached, (5, 40))
    image, caption = 32, 64  # 4 x 4 patches and the longer of two captions, each padded to a multiple of 32
    assert set(asked) - {2 * image, 2 * caption} == {2 * (image + caption)}  # the rest are the refiners


KEPT_PER_TOKEN = {
    "elementwise": 7 * 3840 + 2 * 10240,  # input, q, k, v, attention, its projection, w2; w1 and w3
    "w1w3": 7 * 3840,
    "attention": 2 * 3840,
    "full": 3840,
}
"""Numbers in bf16 by the list in the module's docstring; attention's row sums come on top, 4 bytes a head."""


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("mode", RECOMPUTE_MODES[1:])
def test_modes_keep_what_they_name(mode: str, side: int):
    """A block of the full model keeps the tensors that the mode names, and nothing else."""
    tokens = (side // 16) ** 2 + 64
    kept = counted_step(mode, side, 3, ops=None).kept_bytes - counted_step(mode, side, 2, ops=None).kept_bytes
    row_sums = 0 if mode == "full" else 4 * FULL.n_heads * tokens
    wanted = 2 * KEPT_PER_TOKEN[mode] * tokens + row_sums
    assert kept == pytest.approx(wanted, rel=0.005)
