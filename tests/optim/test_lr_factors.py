"""Factors on the learning rate by module, and LoRA+."""

import json
from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName, OptimizerSettings
from zimage_train.optim import optimizers
from zimage_train.optim.flat import FlatParameters

NAMES = [name for name in get_args(OptimizerName) if not OPTIMIZERS[name].finds_lr]
SHAPES = {"one.A": (64, 128), "one.B": (128, 64), "two.A": (64, 128), "two.B": (192, 64)}
FACTORS = {"one": 0.5, "two": 2.0}
LORA_PLUS = 4.0
EXPECTED = [0.5, 2.0, 2.0, 8.0]
"""By hand, in the order of SHAPES."""


def flat_problem() -> FlatParameters:
    flat = FlatParameters(SHAPES, ["two.A", "one.A", "one.B", "two.B"], torch.device("cpu"))
    flat.allocate_grads()
    draw = torch.Generator().manual_seed(0)
    for view in flat.views.values():
        view.data.normal_(generator=draw)
    return flat


def write_grads(flat: FlatParameters, index: int) -> None:
    draw = torch.Generator().manual_seed(1000 + index)
    for name, grad in flat.split(flat.grads).items():
        grad.copy_(flat.views[name].detach() * 0.1 + torch.randn(grad.shape, generator=draw))


def lr_at(index: int) -> float:
    return 1e-2 * (1 + index % 3)


def build(name: OptimizerName, flat: FlatParameters) -> torch.optim.Optimizer:
    factors = optimizers.lr_factors(flat, FACTORS, LORA_PLUS)
    settings = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1)
    return optimizers.build_optimizer(settings, list(flat.views.values()), factors)


def test_factors_of_each_matrix():
    flat = flat_problem()
    assert optimizers.lr_factors(flat, FACTORS, LORA_PLUS) == EXPECTED
    ones = {"one": 1.0, "two": 1.0}
    assert optimizers.lr_factors(flat, ones, 1.0) == []
    assert optimizers.lr_factors(flat, ones, 16.0) == [1.0, 16.0, 1.0, 16.0]


@pytest.mark.parametrize("name", NAMES)
def test_as_optimizers_of_their_own(name: OptimizerName):
    """Each matrix goes where an optimizer of its own with that learning rate takes it, bit for bit."""
    together, apart = flat_problem(), flat_problem()
    optimizer = build(name, together)
    views = list(apart.views.values())
    members = {factor: [views[i] for i in range(4) if EXPECTED[i] == factor] for factor in (0.5, 2.0, 8.0)}
    others = {}
    for factor, parameters in members.items():
        settings = OptimizerSettings(name=name, lr=0.01 * factor, weight_decay=0.1)
        others[factor] = optimizers.build_optimizer(settings, parameters)
    for index in range(5):
        write_grads(together, index)
        write_grads(apart, index)
        optimizers.set_lr(optimizer, lr_at(index))
        if name != "automagic":
            assert optimizers.current_lr(optimizer) == pytest.approx(lr_at(index), rel=1e-12)
        optimizer.step()
        for factor, other in others.items():
            optimizers.set_lr(other, lr_at(index) * factor)
            other.step()
    assert torch.equal(together.whole, apart.whole)
    assert optimizers.count_lr_factors(optimizer) == {0.5: 1, 2.0: 2, 8.0: 1}
    if name == "automagic":
        rates = sum(optimizers.current_lr(others[factor]) * len(members[factor]) for factor in members) / 4
        assert optimizers.current_lr(optimizer) == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(name: OptimizerName):
    """State survives JSON and bytes, so that twelve steps equal six and six; its names are those of one group."""
    whole, halves = flat_problem(), flat_problem()
    first, second, other = build(name, halves), build(name, halves), build(name, whole)

    def steps(optimizer: torch.optim.Optimizer, flat: FlatParameters, indices: range) -> None:
        for index in indices:
            write_grads(flat, index)
            optimizers.set_lr(optimizer, lr_at(index))
            optimizer.step()

    steps(other, whole, range(12))
    steps(first, halves, range(6))
    tensors, numbers = optimizers.optimizer_state(first, halves)
    loaded = {key: value.clone() for key, value in tensors.items()}
    optimizers.load_optimizer_state(second, halves, loaded, json.loads(json.dumps(numbers)), "here")
    steps(second, halves, range(6, 12))
    assert torch.equal(whole.whole, halves.whole)
    for index, shape in enumerate(SHAPES.values()):
        same_shape = [
            key for key, value in tensors.items() if value.shape == shape and key.startswith(f"optim.{index}.")
        ]
        assert same_shape or name in ("adafactor", "came"), "the state of each matrix has its number"


def test_lora_plus_as_in_peft():
    """peft's optimizer of LoRA+ takes the same steps with the same gradients."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 192)

    config = LoraConfig(r=64, target_modules=["one", "two"], init_lora_weights=False)
    model = get_peft_model(Model(), config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, eps=1e-8
    )
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, _, module, matrix, *_ = name.split(".")
            parameters[f"{module}.{matrix.removeprefix('lora_')}"] = parameter
    flat = flat_problem()
    factors = optimizers.lr_factors(flat, {"one": 1.0, "two": 1.0}, 16.0)
    settings = OptimizerSettings(name="adamw", lr=0.01, weight_decay=0.1)
    ours = optimizers.build_optimizer(settings, list(flat.views.values()), factors)
    for name, view in flat.views.items():
        parameters[name].data.copy_(view.data)
    for index in range(5):
        write_grads(flat, index)
        for name, view in flat.views.items():
            assert view.grad is not None
            parameters[name].grad = view.grad.clone()
        ours.step()
        theirs.step()
    for name, view in flat.views.items():
        assert torch.allclose(view, parameters[name], rtol=1e-5, atol=1e-7), name
