"""Fused blocks: diffusers' numbers, the same bits in every mode, and what is not served runs as a module."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zimage_train.config.lora import LoraSettings
from zimage_train.config.types import RECOMPUTE_MODES
from zimage_train.lora import fused_block, layers, swap
from zimage_train.lora.deltas import Factors
from zimage_train.models.transformer import velocity

from steps import gradients, trained, unfused

SIZES = st.tuples(st.integers(4, 8), st.integers(4, 8))
"""Height and width in patches of 16 px, from the smallest image; they are padded to 32 or 64 tokens."""


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@cache
def pair(dtype: str):
    """A fused step and the same step of modules."""
    return trained("none", dtype=dtype), unfused("none", dtype=dtype)


@settings(max_examples=12, deadline=None)
@given(size=SIZES, captions=st.lists(st.integers(1, 70), min_size=1, max_size=3))
def test_step_equals_diffusers(size: tuple[int, int], captions: list[int]):
    """In fp32, loss and gradients differ by less than 1e-5 from those of diffusers' blocks.

    Captions of different lengths are padded, and attention has a mask.
    """
    fused, modules = pair("fp32")
    shape = (2 * size[0], 2 * size[1])
    loss, *grads = gradients(*fused, tuple(captions), shape)
    wanted_loss, *wanted = gradients(*modules, tuple(captions), shape)
    assert relative(loss, wanted_loss) < 1e-6
    assert max(relative(one, other) for one, other in zip(grads, wanted, strict=True)) < 1e-5


@pytest.mark.slow
def test_bf16_is_as_exact_as_diffusers():
    """In bf16, every gradient is at most 1.1 times as far from that of fp32 as that of diffusers' blocks.

    Rounding is noise, so distances are the root mean squares of 16 steps.
    """
    exact_step = unfused("none", dtype="bf16")
    exact_step[0].model.float()  # the same rounded weights, computed with in fp32
    ours, theirs = np.zeros(84), np.zeros(84)
    for seed in range(16):
        exact, found, stock = (gradients(*step, (40,), seed=seed) for step in (exact_step, *pair("bf16")))
        ours += [relative(one, other) ** 2 for one, other in zip(found[1:], exact[1:], strict=True)]
        theirs += [relative(one, other) ** 2 for one, other in zip(stock[1:], exact[1:], strict=True)]
        assert relative(found[0], exact[0]) <= 1.1 * relative(stock[0], exact[0])
    assert theirs.min() > 1e-6  # bf16 did round
    assert np.sqrt(ours / theirs).max() <= 1.1


@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
@pytest.mark.parametrize("captions", [(40, 40), (5, 40)])
def test_modes_give_the_same_bits(mode: str, captions: tuple[int, int]):
    wanted = gradients(*trained("none"), captions)
    found = gradients(*trained(mode), captions)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "groups",
    [(".to_v",), (".to_q", ".w3"), ("feed_forward",), ("attention", "refiners")],
    ids=", ".join,
)
def test_lora_on_some_layers(groups: tuple[str, ...]):
    """Blocks whose LoRA is on some of their layers are served, and so are the refiners."""
    loss, *grads = gradients(*trained("full", groups=groups))
    wanted_loss, *wanted = gradients(*unfused("none", groups=groups))
    assert relative(loss, wanted_loss) < 1e-6
    assert max(relative(one, other) for one, other in zip(grads, wanted, strict=True)) < 1e-5


def test_gradients_are_added():
    """A second backward adds its gradients to those of the first."""
    frozen, attached = trained("elementwise")
    x, sigma = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    prompt = [torch.randn(9, frozen.shape.cap_feat_dim)]
    velocity(frozen.model.train(), x, sigma, prompt).square().mean().backward()
    once = attached.flat.grads.clone()
    velocity(frozen.model, x, sigma, prompt).square().mean().backward()
    assert once.abs().max() > 0 and torch.allclose(attached.flat.grads, 2 * once)


class Calls:
    """Counts the blocks that run as modules, in place of what runs them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, block, *inputs):
        self.count += 1
        return block(*inputs)


@pytest.mark.parametrize(
    ("groups", "dropout", "captions", "unserved"),
    [
        (("attention",), {}, (40, 40), 0),
        (("attention",), {"dropout": 0.5}, (40, 40), 6),  # the refiners have no LoRA, and so no dropout
        (("attention",), {"rank_dropout": 0.5}, (40, 40), 6),
        (("attention",), {"module_dropout": 0.5}, (40, 40), 6),
        (("attention", "adaln"), {}, (40, 40), 6),
    ],
    ids=["all", "dropout", "rank dropout", "module dropout", "modulation"],
)
def test_what_is_not_served(
    groups: tuple[str, ...], dropout: dict[str, float], captions: tuple[int, ...], unserved: int
):
    """What fused blocks do not serve runs as modules, with the same loss."""
    frozen, attached = unfused("none", groups=groups, lora=LoraSettings(rank=4, **dropout))
    modules = gradients(frozen, attached, captions)
    calls = Calls()
    fused_block.fuse_blocks(frozen.model, attached, None, lambda tokens: "none", calls)
    found = gradients(frozen, attached, captions)
    assert calls.count == unserved
    assert relative(found[0], modules[0]) < 1e-6


def test_lora_replaced():
    """Within `replaced_lora` a step has the loss of the other LoRA, and of the first after it."""
    frozen, attached = trained("none")
    wanted = gradients(frozen, attached)[0]
    other = {name: Factors(factors.a, 2 * factors.b, 1.0) for name, factors in attached.deltas().items()}
    with swap.replaced_lora(frozen.model, other):
        replaced = gradients(frozen, attached)[0]
    assert torch.equal(gradients(frozen, attached)[0], wanted)
    for b in attached.b.values():
        b.data.mul_(2.0)
    assert relative(replaced, gradients(frozen, attached)[0]) < 1e-6 and relative(replaced, wanted) > 1e-4


def test_lora_switched_off():
    """Within `without_lora` a step has the loss of the frozen model."""
    frozen, attached = trained("full")
    x, sigma = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    prompt = [torch.randn(9, frozen.shape.cap_feat_dim)]
    frozen.model.train()
    with layers.without_lora(frozen.model):
        off = velocity(frozen.model, x, sigma, prompt)
    attached.flat.whole.data.zero_()
    assert torch.equal(off, velocity(frozen.model, x, sigma, prompt))
