"""What a transformer block computes between its matrix products and attention, forward and backward, in plain torch.

Every function here is one kernel on a GPU; this module is its reference and runs anywhere. The forward rounds where
diffusers' block rounds, so both give the same bits. The backward computes in fp32 and rounds its result once.

x, y: (b, t, dim); scale and gate: (b, 1, dim) or None; weight: (dim,); inverse RMS: (b, t, 1), fp32. A `g` before a
name is the gradient of the loss with respect to it. Weights, scales and gates are frozen and have no gradient.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Region = TypeVar("Region", bound=Callable[..., Any])
ROWS = 512
"""Tokens that are computed together, so that what is in fp32 in between stays small."""


def _by_rows(region: Region) -> Region:
    """Return `region`, which treats every token by itself, with its work cut into pieces of `ROWS` tokens."""

    @wraps(region)
    def run(*args: Any, **kwargs: Any) -> Any:
        num_tokens = args[0].shape[1]
        if num_tokens <= ROWS or args[0].is_meta:
            return region(*args, **kwargs)
        outputs: list[Tensor] = []
        for start in range(0, num_tokens, ROWS):
            pieces = [_piece(arg, start, num_tokens) for arg in args]
            named = {name: _piece(arg, start, num_tokens) for name, arg in kwargs.items()}
            results = region(*pieces, **named)
            results = (results,) if isinstance(results, Tensor) else results
            for index, result in enumerate(results):
                if start == 0:
                    outputs.append(result.new_empty(result.shape[0], num_tokens, *result.shape[2:]))
                outputs[index][:, start : start + ROWS] = result
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return cast(Region, run)


def _piece(arg: Any, start: int, num_tokens: int) -> Any:
    has_tokens = isinstance(arg, Tensor) and arg.ndim > 2 and arg.shape[1] == num_tokens
    return arg[:, start : start + ROWS] if has_tokens else arg


@_by_rows
def modulated_norm(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return `RMSNorm(x) * scale`, and the inverse RMS of each row of x."""
    normed, inverse = _rms_norm(x, weight, eps)
    return _times(normed, scale), inverse


@_by_rows
def modulated_norm_backward(
    gh: Tensor, gx: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, inverse: Tensor
) -> Tensor:
    """Return the gradient of x, for `gh` of `modulated_norm` and `gx` of the residual branch, which also reads x."""
    return (gx.float() + _rms_norm_backward(_times(gh.float(), scale), x, weight, inverse)).to(x.dtype)


@_by_rows
def gated_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + gate * RMSNorm(y)`, and the inverse RMS of each row of y."""
    normed, inverse = _rms_norm(y, weight, eps)
    return x + _times(normed, gate), inverse


@_by_rows
def gated_residual_backward(gx: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, inverse: Tensor) -> Tensor:
    """Return the gradient of y, for `gx` of `gated_residual`; that of x is `gx` itself."""
    return _rms_norm_backward(_times(gx.float(), gate), y, weight, inverse).to(y.dtype)


@_by_rows
def residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `gated_residual(x, y)`, its `modulated_norm`, and the inverse RMS of y and of the sum."""
    summed, inverse = gated_residual(x, y, weight, gate, eps)
    normed, next_inverse = modulated_norm(summed, next_weight, next_scale, eps)
    return summed, normed, inverse, next_inverse


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
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and y, for `gx` of the sum and `gh` of its norm."""
    gsum = gx.float() + _rms_norm_backward(_times(gh.float(), next_scale), summed, next_weight, next_inverse)
    gy = _rms_norm_backward(_times(gsum, gate), y, weight, inverse)
    return gsum.to(summed.dtype), gy.to(y.dtype)


@_by_rows
def rotated_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the RMSNorm of q and k (b, t, heads, d) over d, rotated by `rope`, and the inverse RMS of each.

    `rope` (b, t, d / 2, 2) holds cosine and sine for each pair of neighbouring elements.
    """
    q_normed, q_inverse = _rms_norm(q, q_weight, eps)
    k_normed, k_inverse = _rms_norm(k, k_weight, eps)
    cos, sin = _cos_sin(rope)
    return _rotate(q_normed, cos, sin).to(q.dtype), _rotate(k_normed, cos, sin).to(k.dtype), q_inverse, k_inverse


@_by_rows
def rotated_norm_backward(
    gq: Tensor,
    gk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k, for those of `rotated_norm`."""
    cos, sin = _cos_sin(rope)
    # The inverse of a rotation is its transpose: the rotation by the opposite angle.
    q_result = _rms_norm_backward(_rotate(gq, cos, -sin), q, q_weight, q_inverse).to(q.dtype)
    k_result = _rms_norm_backward(_rotate(gk, cos, -sin), k, k_weight, k_inverse).to(k.dtype)
    return q_result, k_result


@_by_rows
def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """Return `silu(u) * v`."""
    return F.silu(u) * v


@_by_rows
def swiglu_backward(g: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and v, for `g` of `swiglu`."""
    g, gate = g.float(), u.float()
    sigmoid = torch.sigmoid(gate)
    gu = g * v.float() * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    return gu.to(u.dtype), (g * (gate * sigmoid)).to(v.dtype)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return diffusers' RMSNorm, and the inverse RMS: fp32 inside, and rounded before the weight is multiplied."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(weight.dtype) * weight, inverse


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
