"""Sums, means and lower ranks of LoRAs, against dense float64 arithmetic."""

import numpy as np
import pytest
import torch
from torch import Tensor

from zimage_train.errors import WeightsError
from zimage_train.lora import arithmetic
from zimage_train.lora.deltas import Delta, DeltaSum, Factors, Kronecker, Rotation

OUT, IN = 10, 12
draw = torch.Generator().manual_seed(0)


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=draw)


def lora(rank: int, scale: float) -> Factors:
    return Factors(random(rank, IN), random(OUT, rank), scale)


def lokr(scale: float) -> Kronecker:
    return Kronecker((random(2, 3),), (random(5, 4),), scale)


def dense(delta: Delta) -> Tensor:
    """The delta in float64; those other kinds are not asked for."""
    if isinstance(delta, Factors):
        return delta.scale * delta.b.double() @ delta.a.double()
    if isinstance(delta, Kronecker):
        return delta.scale * torch.kron(delta.w1[0].double(), delta.w2[0].double())
    assert isinstance(delta, DeltaSum)
    return torch.stack([dense(part) for part in delta.parts]).sum(0)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


# Sums


def test_sum_of_kinds():
    """A sum has the LoRAs of a module in one LoRA and its LoKrs beside it, each times its weight."""
    first = {"x": lora(2, 0.5), "y": lokr(2.0), "only": lora(1, 1.0)}
    second = {"x": DeltaSum((lora(3, -1.0), lokr(1.5))), "y": lora(4, 0.25)}
    third = {"x": lokr(0.5), "gone": lora(1, 1.0)}
    found = arithmetic.sum_deltas([(first, 2.0), (second, -0.5), (third, 0.0)])
    assert found.keys() == {"x", "y", "only"}
    assert close(dense(found["x"]), 2.0 * dense(first["x"]) - 0.5 * dense(second["x"]))
    assert close(dense(found["y"]), 2.0 * dense(first["y"]) - 0.5 * dense(second["y"]))
    assert close(dense(found["only"]), 2.0 * dense(first["only"]))
    x, y, only = found["x"], found["y"], found["only"]
    assert isinstance(x, DeltaSum) and [type(part) for part in x.parts] == [Factors, Kronecker]
    assert isinstance(y, DeltaSum) and [type(part) for part in y.parts] == [Factors, Kronecker]
    assert isinstance(only, Factors)
    (alone,) = arithmetic.sum_deltas([({"x": lokr(1.0)}, -1.0)]).values()
    assert isinstance(alone, Kronecker)


def test_sum_with_weights_by_module():
    """LoRAs are summed with the weight that each has for a module; with 0 it is left out."""
    one, other = {"x": lora(2, 0.5), "y": lora(1, 2.0)}, {"y": lora(3, -1.0), "z": lora(2, 1.0)}
    found = arithmetic.sum_loras([(one, {"x": -0.5, "y": 2.0}), (other, {"y": -3.0, "z": 0.0})])
    assert list(found) == ["x", "y"]
    assert close(dense(found["x"]), -0.5 * dense(one["x"]))
    assert close(dense(found["y"]), 2.0 * dense(one["y"]) - 3.0 * dense(other["y"]))
    assert (found["x"].rank, found["y"].rank, found["y"].scale) == (2, 4, 1.0)


def test_sum_needs_equal_shapes():
    """LoRAs for weights of different shapes are no summands; an OFT, which knows no inputs, fits all."""
    wide = Factors(random(2, IN + 1), random(OUT, 2), 1.0)
    turned = Rotation(random(5, 2, 2))
    found = arithmetic.sum_deltas([({"x": turned}, 1.0), ({"x": lora(2, 1.0)}, 1.0)])["x"]
    assert isinstance(found, DeltaSum) and found.shape == (OUT, IN)
    said = rf"x: the files change weights of shape \[{OUT}, {IN}\] and \[{OUT}, {IN + 1}\]"
    for order in ((lora(2, 1.0), wide), (wide, lora(2, 1.0))):
        with pytest.raises(WeightsError, match=said):
            arithmetic.sum_deltas([({"x": one}, 1.0) for one in order])
        with pytest.raises(WeightsError, match=said):
            arithmetic.sum_loras([({"x": one}, {"x": 1.0}) for one in order])


# Means


def test_mean_of_factors():
    """The mean is that of the factors, not of the deltas, with the scale in B."""
    saves = [{"x": lora(2, scale), "y": lora(3, 1.0)} for scale in (0.5, 2.0, -1.0)]
    weights = [0.25, -1.0, 2.5]
    found = arithmetic.mean_of_factors(saves, weights)
    for module, factors in found.items():
        parts = [(save[module], weight) for save, weight in zip(saves, weights, strict=True)]
        assert close(factors.a, torch.stack([weight * one.a.double() for one, weight in parts]).sum(0))
        assert close(factors.b, torch.stack([weight * one.scale * one.b.double() for one, weight in parts]).sum(0))
        assert factors.scale == 1.0
    assert found.keys() == {"x", "y"}
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        arithmetic.mean_of_factors(saves, weights[:2])


@pytest.mark.parametrize(
    "others",
    [
        [{"a": lora(2, 1.0), "b": lora(3, 1.0), "c": lora(3, 1.0)}],
        [{"a": lora(2, 1.0), "b": lora(2, 1.0), "c": lora(2, 1.0)}, {"a": lora(2, 1.0), "c": lora(2, 1.0)}],
        [{"a": lora(2, 1.0), "b": lora(2, 1.0), "c": lora(2, 1.0), "b2": lora(2, 1.0)}],
    ],
)
def test_mean_needs_equal_ranks(others: list):
    """The first module that differs in one of them, or is not there, is named."""
    first = {"c": lora(2, 1.0), "b": lora(2, 1.0), "a": lora(2, 1.0)}
    with pytest.raises(WeightsError, match=r"^b2?: differs in rank or shape"):
        arithmetic.mean_of_factors([first, *others], [1.0] * (1 + len(others)))


@pytest.mark.parametrize("steps", [[3, 5, 9], [10], [1, 2, 3, 50]])
def test_decay_by_steps(steps: list[int]):
    """The weights are those of an EMA that takes a step after the other, in which a save stands for those before it."""
    weights = [0.0] * len(steps)
    for step in range(1, steps[-1] + 1):
        weights = [0.9 * weight for weight in weights]
        weights[sum(step > saved for saved in steps)] += 1.0 - 0.9
    expected = [weight / sum(weights) for weight in weights]
    assert arithmetic.ema_weights(steps, 0.9, None) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("sigma_rel", "power"), [(0.05, 16.97), (0.10, 6.94), (0.28, None), (0.02, None)])
def test_power_law(sigma_rel: float, power: float | None):
    """The weights are the integral of t^p over the steps of each save, with the p of EDM2's paper."""
    steps = [100, 300, 400, 1000]
    found = arithmetic.ema_weights(steps, None, sigma_rel)
    assert sum(found) == pytest.approx(1.0)
    exponent = np.log(sum(found[:3])) / np.log(0.4)  # p + 1
    assert power is None or exponent == pytest.approx(power + 1.0, abs=0.005)
    assert np.sqrt(exponent / ((exponent + 1.0) ** 2 * (exponent + 2.0))) == pytest.approx(sigma_rel, rel=1e-6)
    expected = np.diff([0.0, 0.1**exponent, 0.3**exponent, 0.4**exponent, 1.0])
    assert found == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-300)


def test_last_save_alone():
    """Without memory, or with the narrowest of a long run, the last save has all the weight; nothing overflows."""
    assert arithmetic.ema_weights([1, 3, 8], 0.0, None) == [0.0, 0.0, 1.0]
    assert arithmetic.ema_weights([50_000, 100_000], None, 0.001) == pytest.approx([0.0, 1.0], abs=1e-100)


# Lower ranks


def best(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of `rank`, by the dense decomposition."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def of_values(*values: float) -> Factors:
    """A LoRA with these singular values."""
    q_b, q_a = torch.linalg.qr(random(OUT, len(values)))[0], torch.linalg.qr(random(IN, len(values)))[0]
    return Factors(q_a.T, q_b * torch.tensor(values), 1.0)


REDUCE = {
    "factors": arithmetic.reduce_rank,
    "dense": lambda factors, rank, energy, name="": arithmetic.factorize(factors.delta(), rank, energy, name),
}


@pytest.mark.parametrize("reduce", REDUCE.values(), ids=list(REDUCE))
@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_best_of_a_rank(reduce, rank: int):
    """A lower rank is the best approximation, its factors have equal sizes, and the squared norms are those of both."""
    one = lora(4, -0.7)
    found, kept, total = reduce(one, rank, 0.01)
    if reduce is REDUCE["factors"] or rank <= 4:
        assert found.rank == min(rank, 4)
    assert found.scale == 1.0 and found.a.dtype == found.b.dtype == torch.float32
    expected = best(dense(one), rank)
    assert close(dense(found), expected, 1e-5)
    assert total == pytest.approx(float(dense(one).square().sum()), rel=1e-5)
    assert kept == pytest.approx(float(expected.square().sum()), rel=1e-5)
    columns, rows = (found.b.double().T @ found.b.double()), (found.a.double() @ found.a.double().T)
    assert torch.allclose(columns, rows, atol=1e-4) and torch.allclose(rows, rows.diag().diag(), atol=1e-4)


@pytest.mark.parametrize("reduce", REDUCE.values(), ids=list(REDUCE))
@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.95, 2), (0.97, 3), (0.999, 3), (0.9999, 4), (0.0, 1)]
)
def test_lowest_rank_with_an_energy(reduce, energy: float, rank: int):
    """The lowest rank that keeps the energy is taken: of the squared singular values 64, 32, 4 and 0.09."""
    found, kept, total = reduce(of_values(8.0, 32**0.5, 2.0, 0.3), None, energy)
    assert found.rank == rank
    assert (kept, total) == (pytest.approx([64.0, 96.0, 100.0, 100.09][rank - 1], rel=1e-5), pytest.approx(100.09))


def test_exact_energy():
    """A rank that keeps just the energy is enough, and what is zero is not kept for the whole of it."""
    square = torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    assert arithmetic.factorize(square, None, 16 / 25, "x")[0].rank == 1
    assert arithmetic.factorize(square, None, 1.0, "x")[0].rank == 2


@pytest.mark.parametrize("rank", [None, 2])
def test_nothing_has_rank_one(rank: int | None):
    """A delta of zero keeps at least one rank, and at most the one that is asked for."""
    none = Factors(torch.zeros(3, IN), torch.zeros(OUT, 3), 1.0)
    for reduce in REDUCE.values():
        found, kept, total = reduce(none, rank, 0.9)
        assert (found.rank, kept, total) == (rank or 1, 0.0, 0.0) and not dense(found).any()


@pytest.mark.parametrize("reduce", REDUCE.values(), ids=list(REDUCE))
def test_infinite_change_is_named(reduce):
    factors = Factors(torch.ones(1, IN), torch.full((OUT, 1), float("inf")), 1.0)
    with pytest.raises(WeightsError, match=r"layers\.3: its change is beyond the range"):
        reduce(factors, 1, 1.0, "layers.3")


def test_small_values_are_kept():
    """A singular value that is a millionth of the largest is kept, since the factors are reduced in fp64."""
    found, _, _ = arithmetic.reduce_rank(of_values(1.0, 1e-6), 2, 1.0)
    assert torch.linalg.svdvals(dense(found))[:2].tolist() == [pytest.approx(1.0), pytest.approx(1e-6, rel=0.1)]


# Large matrices


@pytest.fixture
def projected(monkeypatch) -> list[int]:
    """The widths of the projections that are made; matrices from 20 on are projected."""
    monkeypatch.setattr(arithmetic, "EXACT_BELOW", 20)
    widths: list[int] = []
    project = arithmetic._randomized_svd

    def spy(delta: Tensor, width: int, name: str):
        widths.append(width)
        return project(delta, width, name)

    monkeypatch.setattr(arithmetic, "_randomized_svd", spy)
    return widths


def large(out: int, in_: int, decay: float) -> Tensor:
    """A matrix whose singular values fall by `decay`."""
    count = min(out, in_)
    q_b, q_a = torch.linalg.qr(random(out, count))[0], torch.linalg.qr(random(in_, count))[0]
    return q_b * decay ** torch.arange(count) @ q_a.T


def test_small_matrices_are_exact(projected: list[int]):
    """Matrices with a side below the limit, and of a rank that takes all of a side, are not projected."""
    for shape, rank in (((19, 90), 1), ((90, 19), 1), ((90, 20), 4), ((20, 90), 9)):
        delta = large(*shape, 0.8)
        assert close(dense(arithmetic.factorize(delta, rank, 1.0, "x")[0]), best(delta.double(), rank), 1e-5)
    assert projected == []
    arithmetic.factorize(large(20, 90, 0.99), 3, 1.0, "x")
    assert projected == [19]


@pytest.mark.parametrize("shape", [(120, 150), (150, 120)])
def test_projection_is_the_best(projected: list[int], shape: tuple[int, int]):
    """A projection gives the best approximation of a rank, also where the singular values fall slowly."""
    delta = large(*shape, 0.95)
    found, kept, total = arithmetic.factorize(delta, 8, 1.0, "x")
    assert projected == [24]
    expected = best(delta.double(), 8)
    assert float((dense(found) - expected).norm()) < 1e-3 * float(expected.norm())
    assert kept == pytest.approx(float(expected.square().sum()), rel=1e-5)
    assert total == pytest.approx(float(delta.double().square().sum()), rel=1e-5)


def test_projection_is_widened(projected: list[int]):
    """A projection is doubled until it holds the energy, and is no projection where it would have to hold all."""
    delta = large(200, 220, 0.99)
    values = torch.linalg.svdvals(delta.double()).square()
    for energy, widths in ((0.7, [80]), (0.9, [80, 160]), (0.99, [80, 160])):
        projected.clear()
        found, kept, total = arithmetic.factorize(delta, None, energy, "x")
        assert projected == widths
        least = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
        assert abs(found.rank - least) <= 1 and kept >= energy * total * (1 - 1e-6)
