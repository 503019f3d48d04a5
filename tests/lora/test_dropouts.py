"""Dropout of ranks and of modules: the formula, the frequency, and in training alone."""

import pytest
import torch
from torch import nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora.layers import attach_lora
from zimage_train.models.linear import FrozenLinear

RANK, INPUTS, OUTPUTS = 8, 12, 10


def layer(scale: float = 1.0, **settings: float) -> tuple[nn.ModuleDict, dict[str, torch.Tensor]]:
    """A layer with a LoRA, and its matrices in float64."""
    draw = torch.Generator().manual_seed(0)
    frozen = FrozenLinear(INPUTS, OUTPUTS, torch.float32, None)
    frozen.weight = nn.Parameter(torch.randn(OUTPUTS, INPUTS, generator=draw), requires_grad=False)
    model = nn.ModuleDict({"inner": frozen})
    attached = attach_lora(model, LoraSettings(rank=RANK, alpha=scale * RANK, **settings), ["inner"], 1)
    attached.b["inner"].data.normal_(generator=draw)
    matrices = {"w": frozen.weight, "a": attached.a["inner"], "b": attached.b["inner"]}
    return model, {name: tensor.detach().double() for name, tensor in matrices.items()}


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(3, 5), (3,)])
def test_ranks_are_dropped_per_sample(shape: tuple[int, ...]):
    """Each sample has the change of its own kept ranks, times 1 / (1 - p), for all its tokens; in float64."""
    model, exact = layer(scale=0.5, rank_dropout=0.25)
    x = inputs(*shape)
    torch.manual_seed(4)
    found = model["inner"](x).double()
    torch.manual_seed(4)
    kept = torch.rand(3, RANK) >= 0.25
    assert not kept.all() and kept.any() and not torch.equal(kept[0], kept[1])
    for sample in range(3):
        ranks = [rank for rank in range(RANK) if kept[sample, rank]]
        weight = exact["w"] + 0.5 / 0.75 * exact["b"][:, ranks] @ exact["a"][ranks]
        wanted = x[sample].double() @ weight.T
        assert torch.allclose(found[sample], wanted, rtol=1e-5, atol=1e-5)


def test_modules_are_dropped_whole():
    """A dropped module is its frozen layer, and gets no gradient; a kept one is as it is, without a factor."""
    model, exact = layer(scale=0.5, module_dropout=0.5)
    x = inputs(2, 5)
    base = x.double() @ exact["w"].T
    whole = x.double() @ (exact["w"] + 0.5 * exact["b"] @ exact["a"]).T
    dropped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        out = model["inner"](x)
        is_dropped = torch.allclose(out.double(), base, atol=1e-5)
        assert is_dropped or torch.allclose(out.double(), whole, rtol=1e-5, atol=1e-5)
        model.zero_grad()
        out.square().sum().backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and bool(parameter.grad.any()) != is_dropped
        dropped += is_dropped
    assert 10 < dropped < 30


def test_expected_change_is_kept_by_ranks():
    """On average over masks, dropout of ranks leaves the change as it is."""
    model, exact = layer(rank_dropout=0.5)
    x = inputs(4000)[:1].expand(4000, INPUTS)
    torch.manual_seed(0)
    change = (model["inner"](x).detach().double() - x.double() @ exact["w"].T).mean(0)
    wanted = x[0].double() @ (exact["b"] @ exact["a"]).T
    assert (change - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("settings", [{"rank_dropout": 0.9}, {"module_dropout": 0.9}])
def test_nothing_dropped_without_training(settings: dict[str, float]):
    model, exact = layer(**settings)
    x = inputs(3, 5)
    before = torch.get_rng_state()
    found = model.eval()["inner"](x).double()
    assert torch.allclose(found, x.double() @ (exact["w"] + exact["b"] @ exact["a"]).T, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_dropout_draws_nothing():
    model, _ = layer(rank_dropout=0.0, module_dropout=0.0)
    before = torch.get_rng_state()
    model["inner"](inputs(3, 5))
    assert torch.equal(torch.get_rng_state(), before)
