"""Quantised weights: how far they are from the dense weights, what they take, and that nothing odd breaks them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.models import quantize

KINDS = ("fp8", "fp8_fast", "int8", "nf4")
GAUSSIAN = {"fp8": 0.025, "fp8_fast": 0.0264, "int8": 0.006, "nf4": 0.092}
"""Relative error of a Gaussian weight, as the module's docstring has it."""
BITS = {"fp8": 8.25, "fp8_fast": 8 + 32 / (64 * 3840), "int8": 8.25, "nf4": 4.25}
"""A weight, with its share of a bf16 scale for 64."""


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_gaussian_weights(kind):
    """The error of a Gaussian weight is the documented error."""
    weight = gaussian(64, 3840)
    back = quantize.unpack(*quantize.pack(weight, kind), torch.float32)
    assert ((back - weight).norm() / weight.norm()).item() == pytest.approx(GAUSSIAN[kind], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_weight(kind):
    """A weight takes the documented bits, and an empty weight has the same shapes and types."""
    packed = quantize.pack(gaussian(64, 3840), kind)
    room = quantize.empty_quantized(64, 3840, kind, torch.device("meta"))
    assert [(one.shape, one.dtype) for one in packed] == [(one.shape, one.dtype) for one in room]
    assert sum(one.nbytes for one in packed) * 8 / (64 * 3840) == BITS[kind]


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_each_block_has_its_own_scale(kind):
    """A row of small weights with a single huge weight: only the block of the huge weight suffers."""
    weight = gaussian(1, 256) * 1e-3
    weight[0, 10] = 100.0
    back = quantize.unpack(*quantize.pack(weight, kind), torch.float32)
    rest = slice(64, None)
    assert ((back - weight)[0, rest].norm() / weight[0, rest].norm()) < 0.12


@pytest.mark.parametrize("columns", [32, 96, 256, 10240])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_divide_any_width(kind, columns):
    """Any width in the model family is packed in blocks that divide it."""
    block = quantize.scale_block_size(columns)
    assert columns % block == 0 and block in (32, 64)
    back = quantize.unpack(*quantize.pack(gaussian(4, columns), kind), torch.bfloat16)
    assert back.shape == (4, columns) and back.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32),
)
def test_error_is_at_most_half_a_step(kind, values):
    """No finite weight becomes infinite, or moves further than half a step."""
    weight = torch.tensor([values])
    back = quantize.unpack(*quantize.pack(weight, kind), torch.float32)
    assert back.isfinite().all()
    largest = weight.abs().max().double()
    if largest > 1e-30:  # below, a bf16 scale is subnormal
        worst = (back.double() - weight.double()).abs().max()
        assert worst <= largest * (0.5 / 127 if kind == "int8" else 2**-4) * 1.02


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    assert (quantize.unpack(*quantize.pack(torch.zeros(2, 64), kind), torch.float32) == 0).all()


def test_nf4_equals_bitsandbytes():
    """NF4 is the same as in bitsandbytes, but for rounded scales."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = gaussian(8, 128)
    data, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = dequantize_4bit(data, state)
    ours = quantize.unpack(*quantize.pack(weight, "nf4"), torch.float32)
    assert torch.allclose(ours, theirs, rtol=2**-8, atol=0)


def test_the_cost_that_is_told_is_the_cost():
    """Of a weight and of a change in it, against sums made here; a change below the grid's step arrives on average."""
    weight, change = gaussian(256, 1024), gaussian(1024, 256).T.contiguous() * 0.002
    rounding = quantize.QuantizationStats()
    rounding.add(weight + change, change, "int8")
    rounding.add(gaussian(8, 64), None, "int8")
    found = rounding.facts()
    assert found["weight_error"] == pytest.approx(GAUSSIAN["int8"], rel=0.05)
    with_it, without = (
        quantize.unpack(*quantize.pack(one, "int8"), torch.float32) for one in (weight + change, weight)
    )
    seen = (with_it - without).double()
    assert found["adapter_error"] == pytest.approx(float((seen - change).norm() / change.norm()), rel=1e-3)
    assert found["adapter_arrived"] == pytest.approx(1.0, abs=0.03)
    assert quantize.QuantizationStats().facts() == {}
