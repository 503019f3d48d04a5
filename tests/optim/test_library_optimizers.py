"""The optimizers of pytorch_optimizer: each against its paper in double precision; the averages of schedule-free."""

import math

import pytest
import torch
from torch.nn import Parameter

from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName, OptimizerSettings
from zimage_train.measure.counting import LiveBytes
from zimage_train.optim import optimizers
from zimage_train.optim.flat import FlatParameters

GRADS = [0.3, -0.9, 0.1, 0.4, -0.2]
LR, DECAY = 0.1, 0.5


def run(name: OptimizerName, params: dict[str, list[float] | float], grads: list[float], value: float = 2.0) -> float:
    """The value of one number after its gradients."""
    parameter = Parameter(torch.tensor([value], dtype=torch.float64))
    settings = OptimizerSettings(name=name, lr=LR, weight_decay=DECAY, params=params)
    optimizer = optimizers.build_optimizer(settings, [parameter])
    for grad in grads:
        parameter.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
    return float(parameter.detach())


def test_schedulefree_is_its_paper():
    """Defazio et al. 2024: z is stepped, x is its average, and the gradient is taken between the two at y."""
    beta1, beta2 = 0.8, 0.9
    flat = FlatParameters({"a": (1,)}, ["a"], torch.device("cpu"))
    flat.allocate_grads()
    flat.whole.data.fill_(2.0)
    params = {"betas": [beta1, beta2]}
    settings = OptimizerSettings(name="adamw_schedulefree", lr=LR, weight_decay=DECAY, params=params)
    optimizer = optimizers.build_optimizer(settings, [flat.whole])
    x = y = z = 2.0
    v = total = 0.0
    for index, grad in enumerate(GRADS, 1):
        lr = LR / (1 + index % 2)
        optimizers.set_lr(optimizer, lr)
        flat.grads.fill_(grad)
        optimizer.step()
        v = beta2 * v + (1 - beta2) * grad**2
        z -= lr * (grad / (math.sqrt(v / (1 - beta2**index)) + 1e-8) + DECAY * y)
        largest = LR / 1 if index > 1 else LR / 2  # of the rates so far
        total += largest**2
        x += largest**2 / total * (z - x)
        y = (1 - beta1) * z + beta1 * x
        assert float(flat.whole.detach()) == pytest.approx(y, rel=1e-5)
        with optimizers.averaged_weights("adamw_schedulefree", optimizer, flat):
            assert float(flat.views["a"].detach()) == pytest.approx(x, rel=1e-5)
    assert x != pytest.approx(y, rel=1e-3)


def test_adopt_is_its_paper():
    """Taniguchi et al. 2024: a gradient is divided by the second moment of those before it; the first only makes it."""
    beta1, beta2 = 0.8, 0.9
    value, m, v = 2.0, 0.0, GRADS[0] ** 2
    value -= LR * DECAY * value
    for index, grad in enumerate(GRADS[1:], 2):
        value -= LR * DECAY * value
        limit = index**0.25
        m = beta1 * m + (1 - beta1) * max(-limit, min(limit, grad / max(math.sqrt(v), 1e-6)))
        value -= LR * m
        v = beta2 * v + (1 - beta2) * grad**2
    assert run("adopt", {"betas": [beta1, beta2]}, GRADS) == pytest.approx(value, rel=1e-9)


def test_stable_adamw_is_its_paper():
    """Wortsman et al. 2023: AdamW whose rate is divided by the RMS of g^2 / v where that is above 1."""
    beta1, beta2 = 0.8, 0.9
    value, m, v = 2.0, 0.0, 0.0
    for index, grad in enumerate(GRADS, 1):
        hat1 = beta1 * (1 - beta1 ** (index - 1)) / (1 - beta1**index)
        hat2 = beta2 * (1 - beta2 ** (index - 1)) / (1 - beta2**index)
        m, v = hat1 * m + (1 - hat1) * grad, hat2 * v + (1 - hat2) * grad**2
        rate = LR / max(1.0, math.sqrt(grad**2 / v))
        value -= rate * DECAY * value
        value -= rate * m / (math.sqrt(v) + 1e-8)
    assert run("stable_adamw", {"betas": [beta1, beta2]}, GRADS) == pytest.approx(value, rel=1e-6)


def test_came_is_its_paper():
    """Luo et al. 2023: moments of rows and columns, and a second pair of them for the instability of the update."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    parameter = Parameter(start.clone())
    b1, b2, b3 = 0.8, 0.9, 0.95
    settings = OptimizerSettings(name="came", lr=LR, weight_decay=DECAY, params={"betas": [b1, b2, b3]})
    optimizer = optimizers.build_optimizer(settings, [parameter])
    value, m = start.clone(), torch.zeros_like(start)
    rows, columns, unstable_rows, unstable_columns = (torch.zeros(n, dtype=torch.float64) for n in (3, 4, 3, 4))
    for _ in range(4):
        grad = torch.randn(3, 4, generator=draw, dtype=torch.float64)
        parameter.grad = grad.clone()
        optimizer.step()
        value -= LR * DECAY * value
        rows = b2 * rows + (1 - b2) * (grad**2 + 1e-30).mean(1)
        columns = b2 * columns + (1 - b2) * (grad**2 + 1e-30).mean(0)
        update = grad / torch.sqrt(rows[:, None] * columns[None] / rows.mean())
        update = update / max(1.0, float(update.square().mean().sqrt()))
        m = b1 * m + (1 - b1) * update
        instability = (update - m) ** 2 + 1e-16
        unstable_rows = b3 * unstable_rows + (1 - b3) * instability.mean(1)
        unstable_columns = b3 * unstable_columns + (1 - b3) * instability.mean(0)
        value -= LR * m / torch.sqrt(unstable_rows[:, None] * unstable_columns[None] / unstable_rows.mean())
    assert torch.allclose(parameter.detach(), value, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 256), (256, 8)], ids=["A", "B"])
def test_muon_is_orthogonal(shape: tuple[int, int]):
    """Jordan et al. 2024: every direction of the momentum moves alike, here as far as AdamW moves (Liu et al. 2025)."""
    draw = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=draw) * torch.logspace(0, -2, min(shape)).view(
        (-1, 1) if shape[0] < shape[1] else (1, -1)
    )
    parameter = Parameter(torch.zeros(shape))
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="muon", lr=LR, weight_decay=0.0), [parameter])
    parameter.grad = grad.clone()
    optimizer.step()
    update = -parameter.detach() / LR
    scale = 0.2 * math.sqrt(max(shape))
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    along = (left.T @ update @ right.T).diagonal() / scale
    assert float(along.min()) > 0.6 and float(along.max()) < 1.3, "singular values near 1"
    assert 0.13 < float(update.square().mean().sqrt()) < 0.26


def test_looking_changes_no_bit():
    """A training whose averages are looked at in every step has the bits and the state of one that is left alone."""
    ends = []
    for looks in (False, True):
        flat = FlatParameters({"a": (64, 33), "b": (7,)}, ["b", "a"], torch.device("cpu"))
        flat.allocate_grads()
        flat.whole.data.normal_(generator=torch.Generator().manual_seed(0))
        settings = OptimizerSettings(name="adamw_schedulefree", lr=LR)
        optimizer = optimizers.build_optimizer(settings, optimizers.parameters_for(settings.name, flat))
        draw = torch.Generator().manual_seed(1)
        for index in range(5):
            flat.grads.normal_(generator=draw)
            optimizer.step()
            if looks:
                before = flat.whole.detach().clone()
                with optimizers.averaged_weights(settings.name, optimizer, flat):
                    assert torch.equal(flat.whole, before) == (index == 0), "the first average is the weight itself"
        ends.append((flat.whole.detach(), *optimizers.optimizer_state(optimizer, flat)))
    (one, tensors, numbers), (other, other_tensors, other_numbers) = ends
    assert torch.equal(one, other) and numbers == other_numbers
    assert all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_update_size_equals_the_plan(name: OptimizerName):
    """The temporaries of an update are as large as planned, at rank 16."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(20):
        shapes |= {f"{index}.A": (16, 512), f"{index}.B": (512, 16)}
    flat = FlatParameters(shapes, list(shapes), torch.device("cpu"))
    flat.allocate_grads()
    settings = OptimizerSettings(name=name)
    optimizer = optimizers.build_optimizer(settings, optimizers.parameters_for(name, flat))
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = True  # as torch's own take all tensors together on a GPU
    live = LiveBytes()
    for step in range(3):
        flat.grads.fill_(1.0)
        states = [value for state in optimizer.state.values() for value in state.values()]
        for tensor in (flat.whole, flat.grads, *states):
            if isinstance(tensor, torch.Tensor):
                live.watch(tensor)
        before = live.peak = live.now
        with live:
            optimizer.step()
        if step == 2:
            planned = OPTIMIZERS[name].update_bytes
            found = (live.peak - before) / flat.numel
            assert 0.95 * planned <= found <= planned + 1e-3


def test_other_optimizers_average_nothing():
    flat = FlatParameters({"a": (8, 8)}, ["a"], torch.device("cpu"))
    optimizer = optimizers.build_optimizer(OptimizerSettings(name="adamw"), [flat.whole])
    with optimizers.averaged_weights("adamw", optimizer, flat):
        assert not optimizer.state
