"""What a transformer block computes between its matrix products and attention, forward and backward, in plain torch.

Every function here is one kernel on a GPU; this module is its reference and runs anywhere. The forward rounds where
diffusers' block rounds, so both give the same bits. The backward computes in fp32 and rounds its result once. Results
are written to the tensors that are passed by name, so that the caller decides where they lie.

x, y, h: (b, t, dim); scale and gate: (b, 1, dim) or None; weight: (dim,); inverse RMS: (b, t, 1), fp32. A `g` before a
name is the gradient of the loss with respect to it. Weights, scales and gates are frozen and have no gradient.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Region = TypeVar("Region", bound=Callable[..., None])
ROWS = 512
"""Tokens that are computed together, so that what is in fp32 in between stays small."""


def _by_rows(region: Region) -> Region:
    """Return `region`, which treats every token by itself, with its work cut into pieces of `ROWS` tokens."""

    @wraps(region)
    def run(*args: Any, **results: Tensor) -> None:
        num_tokens = args[0].shape[1]
        if num_tokens <= ROWS or args[0].is_meta:
            return region(*args, **results)
        for start in range(0, num_tokens, ROWS):
            pieces = [_piece(arg, start, num_tokens) for arg in args]
            region(*pieces, **{name: _piece(result, start, num_tokens) for name, result in results.items()})

    return cast(Region, run)


def _piece(arg: Any, start: int, num_tokens: int) -> Any:
    has_tokens = isinstance(arg, Tensor) and arg.ndim > 2 and arg.shape[1] == num_tokens
    return arg[:, start : start + ROWS] if has_tokens else arg


@_by_rows
def modulated_norm(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, h: Tensor, inverse: Tensor) -> None:
    """Compute h = `RMSNorm(x) * scale`, and the inverse RMS of each row of x."""
    _multiply(_rms_norm(x, weight, eps, inverse), scale, h)


@_by_rows
def modulated_norm_backward(
    gh: Tensor, gx: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, inverse: Tensor, *, out: Tensor
) -> None:
    """Compute the gradient of x, for `gh` of `modulated_norm` and `gx` of the residual branch, which also reads x."""
    out.copy_(gx.float() + _rms_norm_backward(_times(gh.float(), scale), x, weight, inverse))


@_by_rows
def gated_residual(
    x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float, *, summed: Tensor, inverse: Tensor
) -> None:
    """Compute `x + gate * RMSNorm(y)`, and the inverse RMS of each row of y."""
    torch.add(x, _times(_rms_norm(y, weight, eps, inverse), gate), out=summed)


@_by_rows
def gated_residual_backward(
    gx: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, inverse: Tensor, *, gy: Tensor
) -> None:
    """Compute the gradient of y, for `gx` of `gated_residual`; that of x is `gx` itself."""
    gy.copy_(_rms_norm_backward(_times(gx.float(), gate), y, weight, inverse))


@_by_rows
def residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
    *,
    summed: Tensor,
    h: Tensor,
    inverse: Tensor,
    next_inverse: Tensor,
) -> None:
    """Compute `gated_residual(x, y)`, h = its `modulated_norm`, and the inverse RMS of y and of the sum."""
    gated_residual(x, y, weight, gate, eps, summed=summed, inverse=inverse)
    modulated_norm(summed, next_weight, next_scale, eps, h=h, inverse=next_inverse)


@_by_rows
def residual_norm_backward(
    gx: Tensor,
    gh: Tensor,
    summed: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor,
    next_scale: Tensor | None,
    inverse: Tensor,
    next_inverse: Tensor,
    *,
    out: Tensor,
    gy: Tensor,
) -> None:
    """Compute the gradients of x and y, for `gx` of the sum and `gh` of its norm."""
    gsum = gx.float() + _rms_norm_backward(_times(gh.float(), next_scale), summed, next_weight, next_inverse)
    out.copy_(gsum)
    gy.copy_(_rms_norm_backward(_times(gsum, gate), y, weight, inverse))


@_by_rows
def rotated_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    *,
    q_rotated: Tensor,
    k_rotated: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
) -> None:
    """Compute the RMSNorm of q and k (b, t, heads, d) over d, rotated by `rope`, and the inverse RMS of each.

    `rope` (b, t, d / 2, 2) holds cosine and sine for each pair of neighbouring elements.
    """
    cos, sin = _cos_sin(rope)
    q_rotated.copy_(_rotate(_rms_norm(q, q_weight, eps, q_inverse), cos, sin))
    k_rotated.copy_(_rotate(_rms_norm(k, k_weight, eps, k_inverse), cos, sin))


@_by_rows
def rotated_norm_backward(
    gq_rotated: Tensor,
    gk_rotated: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    *,
    gq: Tensor,
    gk: Tensor,
) -> None:
    """Compute the gradients of q and k, for those of `rotated_norm`."""
    cos, sin = _cos_sin(rope)
    # The inverse of a rotation is its transpose: the rotation by the opposite angle.
    gq.copy_(_rms_norm_backward(_rotate(gq_rotated, cos, -sin), q, q_weight, q_inverse))
    gk.copy_(_rms_norm_backward(_rotate(gk_rotated, cos, -sin), k, k_weight, k_inverse))


@_by_rows
def swiglu(u: Tensor, v: Tensor, *, out: Tensor) -> None:
    """Compute `silu(u) * v`."""
    torch.mul(F.silu(u), v, out=out)


@_by_rows
def swiglu_backward(g: Tensor, u: Tensor, v: Tensor, *, gu: Tensor, gv: Tensor) -> None:
    """Compute the gradients of u and v, for `g` of `swiglu`."""
    wide, gate = g.float(), u.float()
    sigmoid = torch.sigmoid(gate)
    gu.copy_(wide * v.float() * (sigmoid * (1.0 + gate * (1.0 - sigmoid))))
    gv.copy_(wide * (gate * sigmoid))


def unpack(data: Tensor, scales: Tensor, *, out: Tensor) -> None:
    """Compute the weight (rows, columns) of int8 or fp8 `data`, whose blocks within a row share a scale.

    Every number of `data` is exact in bf16, so the product with its scale is the only rounding.
    """
    blocks = out.unflatten(1, (scales.shape[1], -1))
    blocks.copy_(data.unflatten(1, (scales.shape[1], -1)))
    blocks.mul_(scales.unsqueeze(-1))


def to_fp8(x: Tensor, scale: Tensor, *, out: Tensor) -> None:
    """Compute x / scale in e4m3, for a scale () with which no number of x is beyond e4m3."""
    out.copy_((x.float() / scale).clamp_(-448.0, 448.0))  # a number that fp32 has rounded up must not become NaN


def transpose(data: Tensor, *, out: Tensor) -> None:
    """Copy `data` (rows, columns) in fp8 to `out` (columns, rows)."""
    out.copy_(data.T)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _multiply(x: Tensor, factor: Tensor | None, out: Tensor) -> None:
    if factor is None:
        out.copy_(x)
    else:
        torch.mul(x, factor, out=out)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, inverse: Tensor) -> Tensor:
    """Return diffusers' RMSNorm: fp32 inside, and rounded before the weight is multiplied; write the inverse RMS."""
    wide = x.float()
    torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps, out=inverse)
    return (wide * inverse).to(weight.dtype) * weight


def _rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the fp32 gradient of x.

    With n = x r and r = 1 / RMS(x): d n_i / d x_j = r (delta_ij - n_i n_j / dim).
    """
    normed, gw = x.float() * inverse, g.float() * weight.float()
    return inverse * (gw - normed * (gw * normed).mean(-1, keepdim=True))


def _cos_sin(rope: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope.unsqueeze(2).unbind(-1)  # the same for all heads
    return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (b, t, heads, d) with each pair of neighbours turned by its angle, in fp32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
