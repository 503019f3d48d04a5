"""The functions of `regions` as Triton kernels, one launch each.

Results are written to the tensors that are passed by name, which must be contiguous. Nothing is tuned at run time: the
number of warps follows from the width of a row.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# The types above belong to launches, whose signatures Triton's decorator hides.

import torch
import triton
from torch import Tensor

from zimage_train.models import triton_kernels

MAX_ELEMENTWISE = 1024
"""Elements of a program that has no sum over a row."""
TRANSPOSED = 64
"""Rows and columns of a program that transposes bytes."""


def modulated_norm(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, h: Tensor, inverse: Tensor) -> None:
    """See `regions.modulated_norm`."""
    x = x.contiguous()
    triton_kernels.modulated_norm[_rows(x)](
        x, weight, _row(scale, weight), h, inverse, x.shape[1], x.shape[2], eps, scale is not None, **_tile(x)
    )


def modulated_norm_backward(
    gh: Tensor, gx: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, inverse: Tensor, *, out: Tensor
) -> None:
    """See `regions.modulated_norm_backward`."""
    gh, gx, x = gh.contiguous(), gx.contiguous(), x.contiguous()
    triton_kernels.modulated_norm_backward[_rows(x)](
        gh, gx, x, weight, _row(scale, weight), inverse, out, x.shape[1], x.shape[2], scale is not None, **_tile(x)
    )


def gated_residual(
    x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, eps: float, *, summed: Tensor, inverse: Tensor
) -> None:
    """See `regions.gated_residual`."""
    _forward_residual(x, y, weight, gate, weight, None, eps, summed, summed, inverse, inverse, has_next=False)


def gated_residual_backward(
    gx: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None, inverse: Tensor, *, gy: Tensor
) -> None:
    """See `regions.gated_residual_backward`."""
    gx = gx.contiguous()
    _backward_residual(gx, gx, y, y, weight, gate, weight, None, inverse, inverse, gx, gy, has_next=False)


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
    """See `regions.residual_norm`."""
    _forward_residual(x, y, weight, gate, next_weight, next_scale, eps, summed, h, inverse, next_inverse, has_next=True)


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
    """See `regions.residual_norm_backward`."""
    _backward_residual(
        gx, gh, summed, y, weight, gate, next_weight, next_scale, inverse, next_inverse, out, gy, has_next=True
    )


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
    """See `regions.rotated_norm`."""
    q, k = _with_same_strides(q, k)
    b, t = q.shape[:2]
    triton_kernels.rotated_norm[(b * t,)](
        q,
        k,
        q_weight,
        k_weight,
        rope.contiguous(),
        q_rotated,
        k_rotated,
        q_inverse,
        k_inverse,
        t,
        *q.stride()[:3],
        eps,
        **_heads(q),
    )


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
    """See `regions.rotated_norm_backward`."""
    (gq_rotated, gk_rotated), (q, k) = _with_same_strides(gq_rotated, gk_rotated), _with_same_strides(q, k)
    b, t = q.shape[:2]
    triton_kernels.rotated_norm_backward[(b * t,)](
        gq_rotated,
        gk_rotated,
        q,
        k,
        q_weight,
        k_weight,
        rope.contiguous(),
        q_inverse,
        k_inverse,
        gq,
        gk,
        t,
        *gq_rotated.stride()[:3],
        *q.stride()[:3],
        **_heads(q),
    )


def swiglu(u: Tensor, v: Tensor, *, out: Tensor) -> None:
    """See `regions.swiglu`."""
    u, v = u.contiguous(), v.contiguous()
    triton_kernels.swiglu[_pieces(u)](u, v, out, u.numel(), MAX_ELEMENTWISE, num_warps=4)


def swiglu_backward(g: Tensor, u: Tensor, v: Tensor, *, gu: Tensor, gv: Tensor) -> None:
    """See `regions.swiglu_backward`."""
    g, u, v = g.contiguous(), u.contiguous(), v.contiguous()
    triton_kernels.swiglu_backward[_pieces(u)](g, u, v, gu, gv, u.numel(), MAX_ELEMENTWISE, num_warps=4)


def unpack(data: Tensor, scales: Tensor, *, out: Tensor) -> None:
    """See `regions.unpack`."""
    block = data.shape[1] // scales.shape[1]
    triton_kernels.unpack[_pieces(out)](data, scales, out, out.numel(), block, MAX_ELEMENTWISE, num_warps=4)


def to_fp8(x: Tensor, scale: Tensor, *, out: Tensor) -> None:
    """See `regions.to_fp8`."""
    x = x.contiguous()
    triton_kernels.to_fp8[_pieces(x)](x, scale, out, x.numel(), MAX_ELEMENTWISE, num_warps=4)


def transpose(data: Tensor, *, out: Tensor) -> None:
    """See `regions.transpose`."""
    rows, columns = data.shape
    grid = (triton.cdiv(rows, TRANSPOSED), triton.cdiv(columns, TRANSPOSED))
    # As bytes: Triton has no fp8 on older GPUs, and nothing is computed.
    triton_kernels.transpose[grid](
        data.view(torch.uint8), out.view(torch.uint8), rows, columns, TRANSPOSED, num_warps=4
    )


def _forward_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
    summed: Tensor,
    h: Tensor,
    inverse: Tensor,
    next_inverse: Tensor,
    has_next: bool,
) -> None:
    x, y = x.contiguous(), y.contiguous()
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
    out: Tensor,
    gy: Tensor,
    has_next: bool,
) -> None:
    triton_kernels.residual_norm_backward[_rows(y)](
        gx.contiguous(),
        gh.contiguous(),
        summed.contiguous(),
        y.contiguous(),
        weight,
        _row(gate, weight),
        next_weight,
        _row(next_scale, weight),
        inverse,
        next_inverse,
        out,
        gy,
        y.shape[1],
        y.shape[2],
        gate is not None,
        has_next,
        **_tile(y),
    )


def _with_same_strides(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k (b, t, heads, d) with the same strides and each head dense; attention orders b, t and heads."""
    if q.stride() == k.stride() and q.stride(-1) == 1:
        return q, k
    return q.contiguous(), k.contiguous()


def _heads(q: Tensor) -> dict[str, int]:
    """Return the sizes of a program that holds all heads of a token, and its warps."""
    heads, half = q.shape[2], q.shape[3] // 2
    tile = {"heads": heads, "half": half, "H": triton.next_power_of_2(heads), "D": triton.next_power_of_2(half)}
    return tile | {"num_warps": 4}


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
