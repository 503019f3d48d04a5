"""The regions of a block: each forward against its formula in float64, each backward against float64 autograd."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from region_results import results
from torch import Tensor

from zimage_train.models import quantize, regions

EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """As complex numbers, which the regions are not computed with."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(rope.contiguous()).unsqueeze(2)).flatten(-2)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def single(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


def wanted_gradients(formula: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(formula(*leaves), leaves, grad))


def near(found: Tensor, wanted: Tensor, cancelled: float = 0.0) -> bool:
    """Equal but for rounding; `cancelled` is the size of what nearly cancelled out in between."""
    return float((found.double() - wanted).norm()) <= 1e-5 * float(wanted.norm() + cancelled)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(8, 40))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, is_modulated=st.booleans(), seed=st.integers(0, 1000))
def test_modulated_norm(shape: tuple[int, int, int], is_modulated: bool, seed: int):
    x, gh, gx, weight, scale = drawn(seed, shape, shape, shape, shape[2:], (shape[0], 1, shape[2]))
    factor = scale if is_modulated else torch.ones_like(scale)
    x32, gh32, gx32, weight32, scale32 = single(x, gh, gx, weight, scale if is_modulated else None)
    found, inverse = results(regions, "modulated_norm", x32, weight32, scale32, EPS)
    assert near(found, rms_norm(x, weight) * factor)
    (wanted,) = wanted_gradients(lambda x: rms_norm(x, weight) * factor, [x], gh)
    (found,) = results(regions, "modulated_norm_backward", gh32, gx32, x32, weight32, scale32, inverse)
    assert near(found, wanted + gx)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, is_modulated=st.booleans(), seed=st.integers(0, 1000))
def test_residual_norm(shape: tuple[int, int, int], is_modulated: bool, seed: int):
    """The residual with its gate, alone and together with the norm that follows."""
    x, y, gx, gh, weight, next_weight = drawn(seed, shape, shape, shape, shape, shape[2:], shape[2:])
    gate, scale = drawn(seed + 1, (shape[0], 1, shape[2]), (shape[0], 1, shape[2]))
    one = torch.ones_like(gate)
    gate64, scale64 = (gate, scale) if is_modulated else (one, one)
    gate32, scale32 = single(gate, scale) if is_modulated else (None, None)
    x32, y32, gx32, gh32, weight32, next32 = single(x, y, gx, gh, weight, next_weight)

    def residual(x: Tensor, y: Tensor) -> Tensor:
        return x + gate64 * rms_norm(y, weight)

    def both(x: Tensor, y: Tensor) -> Tensor:
        summed = residual(x, y)
        return torch.stack([summed, rms_norm(summed, next_weight) * scale64])

    alone, inverse = results(regions, "gated_residual", x32, y32, weight32, gate32, EPS)
    assert near(alone, residual(x, y))
    wanted_gy = wanted_gradients(residual, [x, y], gx)[1]
    assert near(results(regions, "gated_residual_backward", gx32, y32, weight32, gate32, inverse)[0], wanted_gy)

    summed, normed, inverse, next_inverse = results(
        regions, "residual_norm", x32, y32, weight32, gate32, next32, scale32, EPS
    )
    assert torch.equal(summed, alone) and near(normed, both(x, y)[1])
    wanted = wanted_gradients(both, [x, y], torch.stack([gx, gh]))
    found = results(
        regions,
        "residual_norm_backward",
        gx32,
        gh32,
        summed,
        y32,
        weight32,
        gate32,
        next32,
        scale32,
        inverse,
        next_inverse,
    )
    assert all(near(one, other) for one, other in zip(found, wanted, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_rotated_norm(sizes: tuple[int, int, int, int], seed: int):
    b, t, heads, half = sizes
    shape = (b, t, heads, 2 * half)
    q, k, gq, gk, q_weight, k_weight = drawn(seed, shape, shape, shape, shape, shape[3:], shape[3:])
    (angles,) = drawn(seed + 1, (b, t, half))
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    q32, k32, gq32, gk32, q_weight32, k_weight32, rope32 = single(q, k, gq, gk, q_weight, k_weight, rope)
    given = (q32, k32, q_weight32, k_weight32, rope32)
    found_q, found_k, *inverses = results(regions, "rotated_norm", *given, EPS)
    assert near(found_q, rotate(rms_norm(q, q_weight), rope)) and near(found_k, rotate(rms_norm(k, k_weight), rope))
    wanted = [
        *wanted_gradients(lambda q: rotate(rms_norm(q, q_weight), rope), [q], gq),
        *wanted_gradients(lambda k: rotate(rms_norm(k, k_weight), rope), [k], gk),
    ]
    found = results(regions, "rotated_norm_backward", gq32, gk32, *given, *inverses)
    for index, (grad, weight) in enumerate([(gq, q_weight), (gk, k_weight)]):
        cancelled = float(grad.norm() * weight.abs().max() * inverses[index].max())
        assert near(found[index], wanted[index], cancelled)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_swiglu(shape: tuple[int, int, int], seed: int):
    u, v, g = drawn(seed, shape, shape, shape)

    def formula(u: Tensor, v: Tensor) -> Tensor:
        return u / (1 + (-u).exp()) * v

    u32, v32, g32 = single(u, v, g)
    assert near(results(regions, "swiglu", u32, v32)[0], formula(u, v))
    found = results(regions, "swiglu_backward", g32, u32, v32)
    assert all(near(one, other) for one, other in zip(found, wanted_gradients(formula, [u, v], g), strict=True))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack(kind: str, dtype: torch.dtype):
    """A weight that is unpacked into memory has the bits of one that is unpacked anew."""
    data, scales = quantize.pack(torch.randn(6, 128, generator=torch.Generator().manual_seed(1)), kind)
    out = torch.full((6, 128), torch.nan, dtype=dtype)
    regions.unpack(data, scales, out=out)
    assert torch.equal(out, quantize.unpack(data, scales, dtype))


@pytest.mark.parametrize("b", [1, 2])
def test_many_tokens_in_pieces(b: int, monkeypatch: pytest.MonkeyPatch):
    """Regions of many tokens are computed in pieces, and give the same bits."""
    x, y, g, gh = (tensor.float() for tensor in drawn(5, *[(b, 50, 16)] * 4))
    weight, gate = torch.ones(16), torch.rand(b, 1, 16)
    q, k, rope = torch.rand(b, 50, 2, 8), torch.rand(b, 50, 2, 8), torch.rand(b, 50, 4, 2)

    def everything() -> list[Tensor]:
        summed, normed, *inverses = results(regions, "residual_norm", x, y, weight, gate, weight, gate, EPS)
        return [
            summed,
            normed,
            *results(regions, "residual_norm_backward", g, gh, summed, y, weight, gate, weight, gate, *inverses),
            *results(regions, "rotated_norm", q, k, torch.ones(8), torch.ones(8), rope, EPS),
            *results(regions, "swiglu", x, y),
            *results(regions, "swiglu_backward", g, x, y),
        ]

    whole = everything()
    monkeypatch.setattr(regions, "ROWS", 16)
    assert all(torch.equal(one, other) for one, other in zip(everything(), whole, strict=True))
