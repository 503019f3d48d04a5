"""The functions of `regions` as Triton kernels, one launch each.

Nothing is tuned at run time: the number of warps follows from the width of a row.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# The types above belong to launches, whose signatures Triton's decorator hides.

import torch
import triton
from torch import Tensor

from zimage_train.models import triton_kernels

MAX_ELEMENTWISE = 1024
"""Elements of a program that has no sum over a row."""


def modulated_norm(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `regions.modulated_norm`."""
    x = x.contiguous()
    h, inverse = torch.empty_like(x), _inverse_of(x)
    triton_kernels.modulated_norm[_rows(x)](
        x, weight, _row(scale, weight), h, inverse, x.shape[1], x.shape[2], eps, scale is not None, **_tile(x)
    )
    return h, inverse


def modulated_norm_backward(
    gh: Tensor, gx: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, inverse: Tensor
) -> Tensor:
    """See `regions.modulated_norm_backward`."""
    gh, gx, x = gh.contiguous(), gx.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    triton_kernels.modulated_norm_backward[_rows(x)](
        gh, gx, x, weight, _row(scale, weight), inverse, out, x.shape[1], x.shape[2], scale is not None, **_tile(x)
    )
    return out


def gated_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `regions.gated_residual`."""
    summed, _, inverse, _ = _forward_residual(x, y, weight, gate, weight, None, eps, has_next=False)
    return summed, inverse


def gated_residual_backward(gx: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, inverse: Tensor) -> Tensor:
    """See `regions.gated_residual_backward`."""
    return _backward_residual(gx, gx, y, y, weight, gate, weight, None, inverse, inverse, has_next=False)[1]


def residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `regions.residual_norm`."""
    return _forward_residual(x, y, weight, gate, next_weight, next_scale, eps, has_next=True)


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
    """See `regions.residual_norm_backward`."""
    return _backward_residual(
        gx, gh, summed, y, weight, gate, next_weight, next_scale, inverse, next_inverse, has_next=True
    )


def rotated_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `regions.rotated_norm`."""
    q, k = _with_same_strides(q, k)
    b, t = q.shape[:2]
    q_out, k_out = _dense_like(q), _dense_like(k)
    q_inverse, k_inverse = _inverse_of(q), _inverse_of(k)
    strides = q.stride()[:3]
    triton_kernels.rotated_norm[(b * t,)](
        q, k, q_weight, k_weight, rope.contiguous(), q_out, k_out, q_inverse, k_inverse, t, *strides, eps, **_heads(q)
    )
    return q_out, k_out, q_inverse, k_inverse


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
    """See `regions.rotated_norm_backward`."""
    (gq, gk), (q, k) = _with_same_strides(gq, gk), _with_same_strides(q, k)
    b, t = q.shape[:2]
    q_out, k_out = _dense_like(q), _dense_like(k)
    triton_kernels.rotated_norm_backward[(b * t,)](
        gq,
        gk,
        q,
        k,
        q_weight,
        k_weight,
        rope.contiguous(),
        q_inverse,
        k_inverse,
        q_out,
        k_out,
        t,
        *gq.stride()[:3],
        *q.stride()[:3],
        **_heads(q),
    )
    return q_out, k_out


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """See `regions.swiglu`."""
    u, v = u.contiguous(), v.contiguous()
    out = torch.empty_like(u)
    triton_kernels.swiglu[_pieces(u)](u, v, out, u.numel(), MAX_ELEMENTWISE, num_warps=4)
    return out


def swiglu_backward(g: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See `regions.swiglu_backward`."""
    g, u, v = g.contiguous(), u.contiguous(), v.contiguous()
    gu, gv = torch.empty_like(u), torch.empty_like(v)
    triton_kernels.swiglu_backward[_pieces(u)](g, u, v, gu, gv, u.numel(), MAX_ELEMENTWISE, num_warps=4)
    return gu, gv


def _forward_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
    has_next: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    summed, inverse = torch.empty_like(x), _inverse_of(x)
    h, next_inverse = (torch.empty_like(x), _inverse_of(x)) if has_next else (summed, inverse)
    triton_kernels.residual_norm[_rows(x)](
        x,
        y,
        weight,
        _row(gate, weight),
        next_weight,
        _row(next_scale, weight),
        summed,
        h,
        inverse,
        next_inverse,
        x.shape[1],
        x.shape[2],
        eps,
        gate is not None,
        has_next,
        **_tile(x),
    )
    return summed, h, inverse, next_inverse


def _backward_residual(
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
    has_next: bool,
) -> tuple[Tensor, Tensor]:
    gx, gh, summed, y = gx.contiguous(), gh.contiguous(), summed.contiguous(), y.contiguous()
    out_y = torch.empty_like(y)
    out_x = torch.empty_like(y) if has_next else gx
    triton_kernels.residual_norm_backward[_rows(y)](
        gx,
        gh,
        summed,
        y,
        weight,
        _row(gate, weight),
        next_weight,
        _row(next_scale, weight),
        inverse,
        next_inverse,
        out_x,
        out_y,
        y.shape[1],
        y.shape[2],
        gate is not None,
        has_next,
        **_tile(y),
    )
    return out_x, out_y


def _with_same_strides(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k (b, t, heads, d) with the same strides and each head dense; attention orders b, t and heads."""
    if q.stride() == k.stride() and q.stride(-1) == 1:
        return q, k
    return q.contiguous(), k.contiguous()


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _heads(q: Tensor) -> dict[str, int]:
    """Return the sizes of a program that holds all heads of a token, and its warps."""
    heads, half = q.shape[2], q.shape[3] // 2
    tile = {"heads": heads, "half": half, "H": triton.next_power_of_2(heads), "D": triton.next_power_of_2(half)}
    return tile | {"num_warps": 4}


def _inverse_of(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _row(values: Tensor | None, unused: Tensor) -> Tensor:
    """Return scales or gates (b, 1, dim) as rows, or a tensor that is never read where there are none."""
    return unused if values is None else values.contiguous()


def _rows(x: Tensor) -> tuple[int]:
    return (x.shape[0] * x.shape[1],)


def _pieces(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), MAX_ELEMENTWISE),)


def _tile(x: Tensor) -> dict[str, int]:
    """Return the width of a program that holds a whole row, and its warps."""
    width = triton.next_power_of_2(x.shape[-1])
    return {"N": width, "num_warps": 8 if width > 2048 else 4}
