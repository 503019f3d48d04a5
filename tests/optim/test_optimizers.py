"""Optimizers and schedules: what they do, and that their state survives JSON and safetensors exactly."""

import itertools
import json
import math
from typing import get_args

import pytest
import torch
from torch.nn import Parameter

from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName, OptimizerSettings, ScheduleSettings
from zimage_train.config.types import ScheduleName
from zimage_train.errors import WeightsError
from zimage_train.optim import optimizers
from zimage_train.optim.automagic import Automagic
from zimage_train.optim.flat import FlatParameters
from zimage_train.optim.schedules import lr_factor

NAMES = get_args(OptimizerName)
EIGHT_BIT = [name for name in NAMES if name.endswith("8bit")]


SHAPES = {"a": (64, 128), "b": (128, 64), "c": (32, 192)}


def flat_problem(shapes: dict[str, tuple[int, ...]] = SHAPES) -> FlatParameters:
    """Parameters whose order in memory is not that of their names."""
    flat = FlatParameters(shapes, sorted(shapes, reverse=True), torch.device("cpu"))
    flat.allocate_grads()
    draw = torch.Generator().manual_seed(0)
    for view in flat.views.values():
        view.data.normal_(generator=draw)
    return flat


def flat_step(optimizer: torch.optim.Optimizer, flat: FlatParameters, index: int) -> None:
    draw = torch.Generator().manual_seed(1000 + index)
    for name, grad in flat.split(flat.grads).items():
        grad.copy_(flat.views[name].detach() * 0.1 + torch.randn(grad.shape, generator=draw))
    optimizers.set_lr(optimizer, 1e-2 * (1 + index % 3))
    optimizer.step()


def problem(seed: int = 0) -> list[Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(64, 128, generator=draw)), Parameter(torch.randn(7, generator=draw))]


def step(optimizer: torch.optim.Optimizer, parameters: list[Parameter], index: int) -> None:
    draw = torch.Generator().manual_seed(1000 + index)
    for parameter in parameters:
        parameter.grad = parameter.detach() * 0.1 + torch.randn(parameter.shape, generator=draw)
    optimizers.set_lr(optimizer, 1e-2 * (1 + index % 3))
    optimizer.step()


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES | {"small": (7,)}], ids=["large", "with a small one"])
@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(name: OptimizerName, shapes: dict[str, tuple[int, ...]]):
    """State survives JSON and bytes, so that twelve steps equal six and six."""
    settings = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1)
    whole = flat_problem(shapes)
    optimizer = optimizers.build_optimizer(settings, optimizers.parameters_for(name, whole))
    for index in range(12):
        flat_step(optimizer, whole, index)
    halves = flat_problem(shapes)
    first = optimizers.build_optimizer(settings, optimizers.parameters_for(name, halves))
    for index in range(6):
        flat_step(first, halves, index)
    tensors, numbers = optimizers.optimizer_state(first, halves)
    second = optimizers.build_optimizer(settings, optimizers.parameters_for(name, halves))
    optimizers.load_optimizer_state(
        second, halves, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers)), "here"
    )
    for index in range(6, 12):
        flat_step(second, halves, index)
    assert torch.equal(whole.whole, halves.whole)


@pytest.mark.parametrize("name", NAMES)
def test_one_buffer_gives_the_same_bits(name: OptimizerName):
    """An optimizer on the whole buffer gives the bits and the state of an optimizer on each parameter."""
    settings = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1)
    flat, split = flat_problem(), flat_problem()
    on_whole = optimizers.build_optimizer(settings, optimizers.parameters_for(name, flat))
    on_each = optimizers.build_optimizer(settings, list(split.views.values()))
    for index in range(5):
        flat_step(on_whole, flat, index)
        flat_step(on_each, split, index)
    assert (len(on_whole.param_groups[0]["params"]) == 1) == (OPTIMIZERS[name].state_block is not None)
    assert torch.equal(flat.whole, split.whole)
    (found, numbers), (wanted, wanted_numbers) = (
        optimizers.optimizer_state(on_whole, flat),
        optimizers.optimizer_state(on_each, split),
    )
    assert numbers == wanted_numbers and found.keys() == wanted.keys()
    assert all(found[key].shape == wanted[key].shape and torch.equal(found[key], wanted[key]) for key in wanted)


def test_small_parameters_are_apart():
    """bitsandbytes keeps the state of small tensors in fp32, which a buffer of all of them would not be."""
    small = flat_problem({"a": (64, 128), "b": (15, 256)})
    assert optimizers.parameters_for("adamw8bit", small) == list(small.views.values())
    odd = flat_problem({"a": (64, 128), "b": (65, 65)})
    assert optimizers.parameters_for("adamw8bit", odd) == list(odd.views.values())
    assert optimizers.parameters_for("adamw", odd) == [odd.whole]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_state_is_eight_bit(name: OptimizerName):
    flat = flat_problem()
    optimizer = optimizers.build_optimizer(OptimizerSettings(name=name), optimizers.parameters_for(name, flat))
    flat_step(optimizer, flat, 0)
    tensors, _ = optimizers.optimizer_state(optimizer, flat)
    moments = ("exp_avg.packed", "exp_avg_sq.packed", "s.packed") if name == "prodigy8bit" else ("state1", "state2")
    large = {key: tensors[f"optim.0.{key}"] for key in moments if f"optim.0.{key}" in tensors}
    assert len(large) == (1 if name == "lion8bit" else len(moments))
    assert {one.dtype for one in large.values()} == {torch.uint8}
    full = [key for key, one in tensors.items() if key.startswith("optim.0.") and one.dtype == torch.float32]
    assert all(tensors[key].numel() <= 256 or key.endswith(".p0") for key in full), full
    storages = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(storages)) == len(storages), "shared tensors cannot be saved"


def test_adamw_does_what_the_paper_says():
    parameter = Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optimizers.build_optimizer(
        OptimizerSettings(name="adamw", lr=0.1, weight_decay=0.5, params={"betas": [0.8, 0.9]}), [parameter]
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


@pytest.mark.parametrize("name", ["prodigy", "prodigy8bit"])
@pytest.mark.parametrize(("given", "used"), [(1e-4, 1.0), (0.09, 1.0), (0.1, 0.1), (0.5, 0.5), (1.0, 1.0)])
def test_prodigy_raises_a_small_rate(name: str, given: float, used: float):
    """Prodigy's learning rate is raised where a small rate would stop it."""
    optimizer = optimizers.build_optimizer(OptimizerSettings(name=name, lr=given), problem())
    assert optimizer.param_groups[0]["lr"] == used


def test_prodigy_logged_rate():
    """The rate logged for Prodigy is its own estimate times ours."""
    parameters = problem()
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="prodigy", lr=1.0), parameters)
    for index in range(5):
        step(optimizer, parameters, index)
    group = optimizer.param_groups[0]
    assert optimizers.current_lr(optimizer) == group["d"] * group["lr"] != group["lr"]


@pytest.mark.parametrize(
    ("name", "params"), [("adamw", {"eps": 1e-3}), ("adamw8bit", {"betas": [0.1, 0.2]}), ("prodigy", {"d_coef": 3.0})]
)
def test_parameters_reach_the_optimizer(name: str, params: dict):
    group = optimizers.build_optimizer(
        OptimizerSettings(name=name, params=params, weight_decay=0.03), problem()
    ).param_groups[0]
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    assert {key: group[key] for key in params} == expected
    assert group["weight_decay"] == 0.03


def test_state_of_another_optimizer():
    """The state of another optimizer is refused."""
    flat = flat_problem()
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="prodigy"), list(flat.views.values()))
    flat_step(optimizer, flat, 0)
    tensors, numbers = optimizers.optimizer_state(optimizer, flat)
    with pytest.raises(WeightsError, match="state of Prodigy"):
        optimizers.load_optimizer_state(
            optimizers.build_optimizer(OptimizerSettings(name="adamw"), [flat.whole]), flat, tensors, numbers, "here"
        )


@pytest.mark.parametrize("name", NAMES)
def test_state_size_equals_the_plan(name: OptimizerName):
    """The state of an optimizer is as large as planned."""
    shapes = {"a": (16, 2048), "b": (2048, 16)} if name == "came" else {"a": (512, 1024)}  # came: per row and column
    flat = flat_problem(shapes)
    optimizer = optimizers.build_optimizer(OptimizerSettings(name=name, lr=0.01), optimizers.parameters_for(name, flat))
    flat_step(optimizer, flat, 0)
    tensors, _ = optimizers.optimizer_state(optimizer, flat)
    size = sum(one.numel() * one.element_size() for key, one in tensors.items() if "qmap" not in key)
    taken, planned = size / flat.numel, OPTIMIZERS[name].state_bytes
    if name == "adafactor":
        assert taken < 0.1 and planned == 4  # its update, as large as the parameter, is not state
    else:
        assert 0.9 * planned <= taken <= planned * 1.001


def test_bitsandbytes_needs_are_known():
    """Every optimizer of bitsandbytes is known to need it."""
    modules = {
        name: type(optimizers.build_optimizer(OptimizerSettings(name=name), problem())).__module__ for name in NAMES
    }
    needing = {name for name, module in modules.items() if module.startswith("bitsandbytes")} | {"prodigy8bit"}
    assert needing == {name for name, spec in OPTIMIZERS.items() if spec.needs == "bitsandbytes"}


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_down_a_valley(name: str):
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    parameter = Parameter(start.clone())
    params = {"max_lr": 1.0} if name == "automagic" else {}
    lr = 1.0 if "prodigy" in name else 0.01
    optimizer = optimizers.build_optimizer(
        OptimizerSettings(name=name, lr=lr, weight_decay=0.0, params=params), [parameter]
    )
    for _ in range(60):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert float(parameter.detach().square().mean()) < 0.9 * float(start.square().mean())


def test_lion_does_what_the_paper_says():
    parameter = Parameter(torch.tensor([2.0]))
    optimizer = optimizers.build_optimizer(
        OptimizerSettings(name="lion", lr=0.1, weight_decay=0.5, params={"betas": [0.8, 0.9]}), [parameter]
    )
    value, m = 2.0, 0.0
    for grad in (0.3, -0.9, 0.1):
        parameter.grad = torch.tensor([grad])
        optimizer.step()
        value = value * (1 - 0.1 * 0.5) - 0.1 * math.copysign(1.0, 0.8 * m + 0.2 * grad)
        m = 0.9 * m + 0.1 * grad
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-5)


def test_eight_bit_prodigy_follows_prodigy():
    ends = []
    for name in ("prodigy", "prodigy8bit"):
        parameters = problem()
        optimizer = optimizers.build_optimizer(OptimizerSettings(name=name, lr=1.0, params={"d0": 1e-3}), parameters)
        for index in range(30):
            draw = torch.Generator().manual_seed(index)
            for parameter in parameters:
                parameter.grad = parameter.detach() * 0.1 + 0.01 * torch.randn(parameter.shape, generator=draw)
            optimizer.step()
        ends.append((optimizer.param_groups[0]["d"], parameters[0].detach() - problem()[0].detach()))
    (d, moved), (d8, moved8) = ends
    assert d > 1e-3 and d8 == pytest.approx(d, rel=0.05)
    assert 0 < float((moved8 - moved).norm() / moved.norm()) < 0.1


def test_automagic_by_hand():
    """Automagic is AdamW with a rate that follows the agreement of gradients.

    Computed by hand in double precision, for a tensor of two numbers.
    """
    parameter = Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    params = {"betas": [0.8, 0.9], "bump": 0.1, "min_lr": 0.09, "max_lr": 0.115}
    optimizer = optimizers.build_optimizer(
        OptimizerSettings(name="automagic", lr=0.1, weight_decay=0.5, params=params), [parameter]
    )
    value, m, v, scale = [2.0, -1.0], [0.0, 0.0], [0.0, 0.0], 1.0
    scales = []
    for index, grads in enumerate([(0.3, 0.4), (0.3, 0.9), (0.1, -9.0), (0.2, -0.3), (-9.0, 9.0), (0.3, -1.0)], 1):
        optimizers.set_lr(optimizer, 0.1 / index)
        parameter.grad = torch.tensor(grads, dtype=torch.float64)
        optimizer.step()
        agreement = sum(sign(grad) * sign(mean) for grad, mean in zip(grads, m, strict=True)) / 2
        scale = min(max(scale * math.exp(0.1 * agreement), 0.9), 1.15)
        scales.append(scale)
        for i, grad in enumerate(grads):
            m[i], v[i] = 0.8 * m[i] + 0.2 * grad, 0.9 * v[i] + 0.1 * grad**2
            rate = 0.1 / index * scale
            value[i] *= 1 - rate * 0.5
            value[i] -= rate * (m[i] / (1 - 0.8**index)) / (math.sqrt(v[i] / (1 - 0.9**index)) + 1e-8)
        assert parameter.detach().tolist() == pytest.approx(value, rel=1e-6)
    assert scales == pytest.approx([1, 1.1052, 1.1052, 1.15, 1.0406, 0.9416], abs=1e-3)
    assert optimizers.current_lr(optimizer) == pytest.approx(0.1 / 6 * scale, rel=1e-6)


def sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0


def test_automagic_without_a_bump_is_adamw():
    ends = []
    for settings in (
        OptimizerSettings(name="adamw", lr=0.01),
        OptimizerSettings(name="automagic", lr=0.01, params={"bump": 0.0, "max_lr": 1.0}),
    ):
        parameters = problem()
        optimizer = optimizers.build_optimizer(settings, parameters)
        for index in range(8):
            step(optimizer, parameters, index)
        ends.append(parameters[0].detach())
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6)


def test_automagic_follows_agreement():
    """Automagic raises the rate where gradients agree, and lowers it where they turn back."""
    agreeing, turning = Parameter(torch.zeros(8)), Parameter(torch.zeros(8))
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="automagic", lr=1e-4), [agreeing, turning])
    for index in range(20):
        agreeing.grad, turning.grad = torch.ones(8), torch.full((8,), (-1.0) ** index)
        optimizer.step()
    assert isinstance(optimizer, Automagic)
    up, down = (float(optimizer.state[one]["scale"]) for one in (agreeing, turning))
    assert up == pytest.approx(math.exp(0.02 * 19), rel=1e-4) and down == pytest.approx(math.exp(-0.02 * 19), rel=1e-4)


def factors(schedule: ScheduleSettings, steps: int) -> list[float]:
    return [lr_factor(schedule, step, steps) for step in range(1, steps + 1)]


def test_constant_is_constant():
    assert factors(ScheduleSettings(), 5) == [1.0] * 5


def test_warmup_rises_evenly():
    """Warm-up rises evenly, and reaches the rate in its last step."""
    assert factors(ScheduleSettings(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_begins_at_the_rate():
    """A cosine schedule begins at the rate, and falls by half a cosine."""
    expected = [0.5 * (1 + math.cos(math.pi * index / 10)) for index in range(10)]
    assert factors(ScheduleSettings(name="cosine"), 10) == pytest.approx(expected)


def test_cosine_ends_near_its_factor():
    """After warm-up, a cosine schedule ends near its end factor."""
    values = factors(ScheduleSettings(name="cosine", warmup_steps=10, params={"end_factor": 0.1}), 1000)
    assert values[9] == values[10] == 1.0
    assert values[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(one >= other for one, other in itertools.pairwise(values[10:]))


def test_constant_with_warmup():
    """`constant_with_warmup` is constant after its warm-up."""
    assert factors(ScheduleSettings(name="constant_with_warmup", warmup_steps=2), 4) == [0.5, 1.0, 1.0, 1.0]


def test_linear_falls_to_its_end_factor():
    values = factors(ScheduleSettings(name="linear", params={"end_factor": 0.2}), 8)
    assert values == pytest.approx([1.0 - 0.8 * index / 8 for index in range(8)])


def test_polynomial_power():
    """A polynomial schedule has its power, and is linear without a power."""
    values = factors(ScheduleSettings(name="polynomial", params={"power": 2.0, "end_factor": 0.5}), 4)
    assert values == pytest.approx([0.5 + 0.5 * left**2 for left in (1.0, 0.75, 0.5, 0.25)])
    assert factors(ScheduleSettings(name="polynomial"), 7) == factors(ScheduleSettings(name="linear"), 7)


def test_cosine_with_restarts():
    """`cosine_with_restarts` begins each cycle at the rate."""
    values = factors(ScheduleSettings(name="cosine_with_restarts", params={"cycles": 3}), 12)
    one = [0.5 * (1 + math.cos(math.pi * index / 4)) for index in range(4)]
    assert values == pytest.approx(one * 3)
    assert factors(ScheduleSettings(name="cosine_with_restarts"), 9) == pytest.approx(
        factors(ScheduleSettings(name="cosine"), 9)
    )


def test_step_schedule():
    """The step schedule falls by its factor every `every` steps."""
    values = factors(ScheduleSettings(name="step", warmup_steps=1, params={"every": 3, "factor": 0.5}), 10)
    assert values == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_rex_is_the_reflected_exponential():
    values = factors(ScheduleSettings(name="rex"), 10)
    assert values == pytest.approx([(1 - p) / (0.5 + 0.5 * (1 - p)) for p in (index / 10 for index in range(10))])
    assert values[9] > factors(ScheduleSettings(name="linear"), 10)[9]


def test_one_cycle_is_that_of_torch():
    """torch counts its phases from 0 to the last step, this from 0 to the step after it, so compare at equal shares."""
    steps = 1001
    dummy = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        dummy, 1.0, total_steps=steps, pct_start=0.3, div_factor=25, final_div_factor=1e9, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(reference.get_last_lr()[0])
        dummy.step()
        if len(expected) < steps:
            reference.step()
    found = factors(ScheduleSettings(name="one_cycle"), steps)
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 0.01
    assert found[0] == pytest.approx(0.04) and max(found) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in get_args(ScheduleName) if name != "step"])
def test_schedules_stay_in_range(name: str):
    """Every schedule stays between 0 and 1, and trains in every step."""
    warmup = 3 if name == "constant_with_warmup" else 0
    assert all(0 < factor <= 1 for factor in factors(ScheduleSettings(name=name, warmup_steps=warmup), 50))


def test_automagic_stays_in_its_bounds():
    """Automagic stays within its bounds even if the initial rate does not."""
    for lr, used in ((2e-3, 1e-3), (1e-9, 1e-7)):
        parameter = Parameter(torch.zeros(8))
        optimizer = optimizers.build_optimizer(OptimizerSettings(name="automagic", lr=lr), [parameter])
        parameter.grad = torch.ones(8)
        optimizer.step()
        assert optimizers.current_lr(optimizer) == pytest.approx(used)
