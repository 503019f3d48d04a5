"""Products in fp8, which Ada, Hopper and Blackwell compute twice as fast as in bf16.

A frozen weight has a single scale, and the other factor gets one at each product, from its largest number. Both are
e4m3, sums are fp32, and the result is rounded once to its dtype. fp8 has an exponent, so a single scale for a whole
tensor costs little: only what is below 1/200,000 of the largest number is lost.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zimage_train.models import region_ops

LARGEST = 448.0
"""Largest number in e4m3."""
LEAST_SCALE = 1e-30
"""Scale of a tensor of zeros."""


class ScaledRows(NamedTuple):
    """Rows in fp8: `data` (rows, columns) e4m3 times `scale` (), fp32."""

    data: Tensor
    scale: Tensor


def is_fp8_product(scales: Tensor | None) -> bool:
    """Return whether a weight with `scales` is multiplied in fp8: that of `fp8_fast` has one scale for all of it."""
    return scales is not None and scales.ndim == 0


def scaled_rows(x: Tensor) -> ScaledRows:
    """Return `x` (rows, columns) in fp8."""
    largest = torch.linalg.vector_norm(x, ord=math.inf, dtype=torch.float32)
    scale = largest.div_(LARGEST).clamp_(min=LEAST_SCALE)
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    region_ops.to_fp8(x, scale, out=data)
    return ScaledRows(data, scale)


def multiply(x: ScaledRows, weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write x W' (rows, out) for a weight (out, in) of fp8 times `scale`."""
    torch._scaled_mm(x.data, weight.T, x.scale, scale, out_dtype=out.dtype, out=out)


def multiply_backward(grad: ScaledRows, weight: Tensor, scale: Tensor, out: Tensor, scratch: Tensor | None) -> None:
    """Write the gradient of x (rows, in), for `grad` (rows, out) of x W'.

    Tensor cores take the second factor by columns only, so the weight is transposed first: into `scratch` if that is
    given, a contiguous tensor of at least as many bytes.
    """
    columns, rows = weight.shape
    if scratch is None:
        turned = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    else:
        turned = scratch.view(torch.uint8)[: weight.numel()].view(weight.dtype).view(rows, columns)
    region_ops.transpose(weight, out=turned)
    torch._scaled_mm(grad.data, turned.T, grad.scale, scale, out_dtype=out.dtype, out=out)
