"""Optimizers and schedules: what they do, and that their state survives JSON and safetensors exactly."""

import itertools
import json
import math

import pytest
import torch
from torch.nn import Parameter

from zimage_train import optim
from zimage_train.config.schema import Optimizer, Schedule
from zimage_train.errors import WeightsError

NAMES = ["adamw", "adamw8bit", "prodigy"]


def problem(seed: int = 0) -> list[Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(64, 128, generator=draw)), Parameter(torch.randn(7, generator=draw))]


def step(optimizer: torch.optim.Optimizer, parameters: list[Parameter], index: int) -> None:
    draw = torch.Generator().manual_seed(1000 + index)
    for parameter in parameters:
        parameter.grad = parameter.detach() * 0.1 + torch.randn(parameter.shape, generator=draw)
    optim.set_lr(optimizer, 1e-2 * (1 + index % 3))
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_json_and_bytes_so_that_twelve_steps_are_six_and_six(name: str):
    settings = Optimizer(name=name, lr=0.01, weight_decay=0.1)
    whole = problem()
    optimizer = optim.build(settings, whole)
    for index in range(12):
        step(optimizer, whole, index)
    halves = problem()
    first = optim.build(settings, halves)
    for index in range(6):
        step(first, halves, index)
    tensors, numbers = optim.state(first)
    second = optim.build(settings, halves)
    optim.load_state(second, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers)), "here")
    for index in range(6, 12):
        step(second, halves, index)
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))


def test_eight_bit_state_is_eight_bit():
    parameters = problem()
    optimizer = optim.build(Optimizer(name="adamw8bit"), parameters)
    step(optimizer, parameters, 0)
    tensors, _ = optim.state(optimizer)
    assert tensors["optim.0.state1"].dtype is torch.uint8
    assert tensors["optim.0.state2"].dtype is torch.uint8
    storages = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(storages)) == len(storages), "shared tensors cannot be saved"


def test_adamw_does_what_the_paper_says():
    parameter = Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optim.build(
        Optimizer(name="adamw", lr=0.1, weight_decay=0.5, params={"betas": [0.8, 0.9]}), [parameter]
    )
    value, m, v = 2.0, 0.0, 0.0
    for index in range(1, 4):
        grad = 0.3 * index
        parameter.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (m / (1 - 0.8**index)) / (math.sqrt(v / (1 - 0.9**index)) + 1e-8)
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("given", "used"), [(1e-4, 1.0), (0.09, 1.0), (0.1, 0.1), (0.5, 0.5), (1.0, 1.0)])
def test_prodigy_raises_a_rate_that_would_stop_it(given: float, used: float):
    optimizer = optim.build(Optimizer(name="prodigy", lr=given), problem())
    assert optimizer.param_groups[0]["lr"] == used


def test_the_rate_that_is_logged_for_prodigy_is_its_own_times_ours():
    parameters = problem()
    optimizer = optim.build(Optimizer(name="prodigy", lr=1.0), parameters)
    for index in range(5):
        step(optimizer, parameters, index)
    group = optimizer.param_groups[0]
    assert optim.used_lr(optimizer) == group["d"] * group["lr"] != group["lr"]


@pytest.mark.parametrize(
    ("name", "params"), [("adamw", {"eps": 1e-3}), ("adamw8bit", {"betas": [0.1, 0.2]}), ("prodigy", {"d_coef": 3.0})]
)
def test_parameters_reach_the_optimizer(name: str, params: dict):
    group = optim.build(Optimizer(name=name, params=params, weight_decay=0.03), problem()).param_groups[0]
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    assert {key: group[key] for key in params} == expected
    assert group["weight_decay"] == 0.03


def test_the_state_of_another_optimizer_is_refused():
    parameters = problem()
    optimizer = optim.build(Optimizer(name="prodigy"), parameters)
    step(optimizer, parameters, 0)
    tensors, numbers = optim.state(optimizer)
    with pytest.raises(WeightsError, match="state of Prodigy"):
        optim.load_state(optim.build(Optimizer(name="adamw"), parameters), tensors, numbers, "here")


def factors(schedule: Schedule, steps: int) -> list[float]:
    return [optim.lr_factor(schedule, step, steps) for step in range(1, steps + 1)]


def test_constant_is_constant():
    assert factors(Schedule(), 5) == [1.0] * 5


def test_warm_up_rises_evenly_and_reaches_the_rate_in_its_last_step():
    assert factors(Schedule(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_begins_at_the_rate_and_falls_by_half_a_cosine():
    expected = [0.5 * (1 + math.cos(math.pi * index / 10)) for index in range(10)]
    assert factors(Schedule(name="cosine"), 10) == pytest.approx(expected)


def test_cosine_ends_near_its_end_factor_after_warm_up():
    values = factors(Schedule(name="cosine", warmup_steps=10, params={"end_factor": 0.1}), 1000)
    assert values[9] == values[10] == 1.0
    assert values[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(one >= other for one, other in itertools.pairwise(values[10:]))
