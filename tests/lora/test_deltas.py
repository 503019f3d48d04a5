"""The changes of every kind of adapter and what is measured of them, against dense float64 arithmetic."""

import itertools

import pytest
import torch
from torch import Tensor

from zimage_train.lora.deltas import Delta, DeltaSum, Dora, Factors, Hadamard, Kronecker, Rotation, row_norms
from zimage_train.lora.keys import ANY_INPUTS

draw = torch.Generator().manual_seed(0)


def random(*size: int) -> Tensor:
    return 0.3 * torch.randn(size, generator=draw)


OUT, IN = 6, 8
W = random(OUT, IN)
LORA = Factors(random(3, IN), random(OUT, 3), 0.7)
KINDS: dict[str, Delta] = {
    "lora": LORA,
    "lora of another rank": Factors(random(2, IN), random(OUT, 2), -1.5),
    "lokr": Kronecker((random(2, 2),), (random(3, 3), random(3, 4)), 0.7),
    "lokr of the same parts": Kronecker((random(2, 4),), (random(3, 2),), -1.5),
    "lokr of other parts": Kronecker((random(3, 1), random(1, 2)), (random(2, 4),), 3.0),
    "loha": Hadamard((random(OUT, 2), random(2, IN)), (random(OUT, 2), random(2, IN)), 0.7),
    "sum": DeltaSum((LORA, Kronecker((random(2, 4),), (random(3, 2),), 0.5))),
    "dora": Dora(LORA, random(OUT).abs() + 0.5, 0.6),
    "oft": Rotation(random(2, 3, 3), 0.8),
}
PLAIN = [name for name in KINDS if name not in ("dora", "oft")]
WITH_WEIGHT = {**KINDS, "sum with oft": DeltaSum((KINDS["oft"], KINDS["dora"], LORA))}


def product(matrices: tuple[Tensor, ...]) -> Tensor:
    """The matrix, or the product of two, in float64."""
    first, *others = (matrix.double() for matrix in matrices)
    return first @ others[0] if others else first


def dense(delta: Delta) -> Tensor:
    """The change to W in float64."""
    weight = W.double()
    match delta:
        case Factors():
            return delta.scale * product((delta.b, delta.a))
        case Kronecker():
            return delta.scale * torch.kron(product(delta.w1), product(delta.w2))
        case Hadamard():
            return delta.scale * product(delta.w1) * product(delta.w2)
        case Dora():
            length = weight.square().sum(1, keepdim=True).sqrt()
            after = delta.magnitude.double()[:, None] * (weight + dense(delta.factors)) / length
            return delta.strength * (after - weight)
        case Rotation():
            skew = delta.blocks.double() - delta.blocks.double().transpose(1, 2)
            identity = torch.eye(3, dtype=torch.float64)
            turns = [(identity + one) @ torch.linalg.inv(identity - one) for one in skew]
            return delta.strength**2 * (torch.block_diag(*turns).T @ weight - weight)
        case DeltaSum():
            return torch.stack([dense(part) for part in delta.parts]).sum(0)
    raise AssertionError(delta)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_change_of_a_weight(name: str):
    """Every kind changes a weight as its formula has it."""
    assert close(WITH_WEIGHT[name].change(W), dense(WITH_WEIGHT[name]))


@pytest.mark.parametrize("name", PLAIN)
def test_dense_delta(name: str):
    """The dense delta of a kind that has one is its change to any weight."""
    assert close(KINDS[name].delta(), dense(KINDS[name]))
    assert torch.equal(KINDS[name].change(random(OUT, IN)), KINDS[name].delta())


@pytest.mark.parametrize("name", ["dora", "oft"])
def test_no_delta_without_a_weight(name: str):
    with pytest.raises(NotImplementedError, match="depends on the weight"):
        KINDS[name].delta()


@pytest.mark.parametrize(
    ("name", "numel", "rank"),
    [
        ("lora", 3 * 8 + 6 * 3, 3),
        ("lokr", 2 * 2 + 3 * 3 + 3 * 4, 3),
        ("lokr of the same parts", 2 * 4 + 3 * 2, 0),
        ("lokr of other parts", 3 + 2 + 2 * 4, 1),
        ("loha", 2 * (6 * 2 + 2 * 8), 2),
        ("sum", 42 + 14, None),
        ("dora", 42 + 6, None),
        ("oft", 18, None),
    ],
)
def test_sizes(name: str, numel: int, rank: int | None):
    delta = KINDS[name]
    assert delta.shape == (OUT, ANY_INPUTS if name == "oft" else IN)
    assert (delta.numel, getattr(delta, "rank", None)) == (numel, rank)


def test_shape_of_a_sum_with_oft():
    """The shape of a sum is that of the part that knows its inputs."""
    assert WITH_WEIGHT["sum with oft"].shape == (OUT, IN)


@pytest.mark.parametrize("weight", [-0.5, 2.0])
@pytest.mark.parametrize("name", [*PLAIN, "dora"])
def test_times_a_weight(name: str, weight: float):
    assert close(KINDS[name].times(weight).times(3.0).change(W), 3.0 * weight * dense(KINDS[name]))


def test_times_of_a_rotation():
    """The strength of an OFT is squared, as in ComfyUI."""
    assert close(KINDS["oft"].times(0.5).change(W), 0.25 * dense(KINDS["oft"]))


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_stored_in_a_file(name: str):
    """A stored delta is the same, with a scale of 1, and rounded once."""
    delta = WITH_WEIGHT[name]
    exact, rounded = delta.stored(torch.float32), delta.stored(torch.bfloat16)
    assert close(exact.change(W), dense(delta))
    assert 1e-5 < float((rounded.change(W) - dense(delta)).norm() / dense(delta).norm()) < 0.02
    assert getattr(rounded, "scale", 1.0) == 1.0


def test_scale_is_rounded_with_a_factor():
    """The scale goes into one factor before it is rounded, and the others are rounded as they are."""
    lora, lokr, loha, dora = (KINDS[name].stored(torch.bfloat16) for name in ("lora", "lokr", "loha", "dora"))
    assert isinstance(lora, Factors) and isinstance(lokr, Kronecker)
    assert isinstance(loha, Hadamard) and isinstance(dora, Dora)
    assert torch.equal(lora.b, (LORA.b * 0.7).bfloat16()) and torch.equal(lora.a, LORA.a.bfloat16())
    for found, own in ((lokr, KINDS["lokr"]), (loha, KINDS["loha"])):
        assert isinstance(own, Kronecker | Hadamard)
        first, *others = (*own.w1, *own.w2)
        assert torch.equal(found.w1[0], (first * 0.7).bfloat16())
        assert all(map(torch.equal, (*found.w1, *found.w2)[1:], [one.bfloat16() for one in others]))
    assert dora.magnitude.dtype == torch.float32 and torch.equal(dora.factors.b, lora.b)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(PLAIN, PLAIN)))
def test_inner_product_and_distance(one: str, other: str):
    """Inner products and distances are those of the dense matrices, whatever the kinds."""
    first, second = KINDS[one], KINDS[other]
    a, b = dense(first), dense(second)
    size = float(a.norm() * b.norm())
    assert first.inner(second) == pytest.approx(float((a * b).sum()), abs=1e-6 * size)
    assert first.distance(second) == pytest.approx(float((a - b).norm()), rel=1e-5, abs=1e-4 * size)
    assert first.norm() == pytest.approx(float(a.norm()), rel=1e-6)


def test_inner_product_in_float64():
    """Inner products and distances of LoRAs and LoKrs of the same parts are exact beyond fp32."""
    lokr, other = KINDS["lokr of the same parts"], Kronecker((random(2, 4),), (random(3, 2),), 3.0)
    for first, second in ((LORA, KINDS["lora of another rank"]), (lokr, other)):
        a, b = dense(first), dense(second)
        assert first.inner(second) == pytest.approx(float((a * b).sum()), rel=1e-11)
        assert first.norm() == pytest.approx(float(a.norm()), rel=1e-12)
        assert first.distance(second) == pytest.approx(float((a - b).norm()), rel=1e-11)


@pytest.mark.parametrize("seed", range(30))
def test_nothing_has_no_length(seed: int):
    """Where a delta cancels but for rounding, its norm and distances are numbers near 0."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, IN, generator=generator), torch.randn(OUT, 3, generator=generator)
    b[:, 2] = -(b[:, 0] + b[:, 1])
    none = Factors(a.expand(3, IN), b, 1.0)
    whole = Kronecker((b[:2, :2],), (b[:3],), 1.0)
    for found in (none.norm(), none.distance(none)):
        assert isinstance(found, float) and 0.0 <= found < 1e-6
    # The same change in fp32, of which the squares differ by a ten-millionth.
    apart = whole.distance(DeltaSum((whole.times(0.3), whole.times(0.7))))
    assert isinstance(apart, float) and 0.0 <= apart < 1e-2


def test_small_deltas_have_small_norms():
    for name in PLAIN:
        small = KINDS[name].times(1e-3)
        assert small.norm() == pytest.approx(1e-3 * float(dense(KINDS[name]).norm()), rel=1e-5)
        assert small.distance(small.times(2.0)) == pytest.approx(small.norm(), rel=1e-4)


def test_dora_norm_and_distance():
    """The distance of DoRAs is that of their factors and magnitudes together, and the norm is that of the factors."""
    dora, other = KINDS["dora"], Dora(Factors(random(1, IN), random(OUT, 1), 2.0), random(OUT), 1.0)
    assert isinstance(dora, Dora)
    apart = (dense(dora.factors) - dense(other.factors)).square().sum()
    apart += (dora.magnitude.double() - other.magnitude.double()).square().sum()
    assert dora.distance(other) == pytest.approx(float(apart.sqrt()), rel=1e-6)
    assert dora.norm() == pytest.approx(float(dense(LORA).norm()), rel=1e-6)


def test_rotation_norm_and_distance():
    """The norm and the distance of OFTs are those of the orthogonal matrices."""
    oft, other = KINDS["oft"], Rotation(random(2, 3, 3), 1.0)
    assert isinstance(oft, Rotation)

    def turns(one: Rotation) -> Tensor:
        skew = one.blocks.double() - one.blocks.double().mT
        identity = torch.eye(3, dtype=torch.float64)
        return one.strength**2 * ((identity + skew) @ torch.linalg.inv(identity - skew) - identity)

    assert oft.norm() == pytest.approx(float(turns(oft).norm()), rel=1e-6)
    assert oft.distance(other) == pytest.approx(float((turns(oft) - turns(other)).norm()), rel=1e-6)


def test_row_norms():
    assert close(row_norms(W.bfloat16()), W.bfloat16().double().square().sum(1).sqrt())
    assert row_norms(W.bfloat16()).dtype == torch.float32


def test_whole_unless_said():
    """What is read without a scale or a strength counts as it is."""
    for name in ("lokr of other parts", "loha", "dora", "oft"):
        fields = vars(KINDS[name]) | {"scale": 1.0, "strength": 1.0}
        kind = type(KINDS[name])
        needed = [fields[key] for key in kind.__match_args__ if key not in ("scale", "strength")]
        assert close(kind(*needed).change(W), dense(kind(*needed, 1.0)))
