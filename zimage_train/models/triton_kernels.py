"""Triton kernels of the regions of a block: each reads its inputs once and writes its results once.

A program computes a token: a row of `dim` elements, or the heads of q and k. The row stays in registers, so nothing in
fp32 ever reaches memory but the inverse RMS. Products round to the dtype of the tensors where the plain forward does.
`triton_regions` launches them.
"""

import triton
import triton.language as tl


@triton.jit
def modulated_norm(x_ptr, w_ptr, s_ptr, h_ptr, inverse_ptr, tokens, dim, eps, HAS_SCALE: tl.constexpr, N: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    mask = columns < dim
    dtype = h_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    w = tl.load(w_ptr + columns, mask, 0.0).to(tl.float32)
    h = ((x * inverse).to(dtype).to(tl.float32) * w).to(dtype)
    if HAS_SCALE:
        s = tl.load(s_ptr + row // tokens * dim + columns, mask, 0.0).to(tl.float32)
        h = (h.to(tl.float32) * s).to(dtype)
    tl.store(h_ptr + row * dim + columns, h, mask)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def modulated_norm_backward(
    gh_ptr, gx_ptr, x_ptr, w_ptr, s_ptr, inverse_ptr, out_ptr, tokens, dim, HAS_SCALE: tl.constexpr, N: tl.constexpr
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    mask, inverse = columns < dim, tl.load(inverse_ptr + row)
    g = tl.load(gh_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(s_ptr + row // tokens * dim + columns, mask, 0.0).to(tl.float32)
    g *= tl.load(w_ptr + columns, mask, 0.0).to(tl.float32)
    normed = tl.load(x_ptr + row * dim + columns, mask, 0.0).to(tl.float32) * inverse
    gx = tl.load(gx_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
    gx += inverse * (g - normed * (tl.sum(g * normed, 0) / dim))
    tl.store(out_ptr + row * dim + columns, gx.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def residual_norm(
    x_ptr,
    y_ptr,
    w_ptr,
    g_ptr,
    next_w_ptr,
    next_s_ptr,
    summed_ptr,
    h_ptr,
    inverse_ptr,
    next_inverse_ptr,
    tokens,
    dim,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    N: tl.constexpr,
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    mask = columns < dim
    dtype = summed_ptr.dtype.element_ty
    y = tl.load(y_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(y * y, 0) / dim + eps)
    w = tl.load(w_ptr + columns, mask, 0.0).to(tl.float32)
    normed = ((y * inverse).to(dtype).to(tl.float32) * w).to(dtype)
    if HAS_SCALE:
        gate = tl.load(g_ptr + row // tokens * dim + columns, mask, 0.0).to(tl.float32)
        normed = (normed.to(tl.float32) * gate).to(dtype)
    x = tl.load(x_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
    summed = (x + normed.to(tl.float32)).to(dtype)
    tl.store(summed_ptr + row * dim + columns, summed, mask)
    tl.store(inverse_ptr + row, inverse)
    if HAS_NEXT:
        wide = summed.to(tl.float32)
        next_inverse = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
        next_w = tl.load(next_w_ptr + columns, mask, 0.0).to(tl.float32)
        h = ((wide * next_inverse).to(dtype).to(tl.float32) * next_w).to(dtype)
        if HAS_SCALE:
            next_s = tl.load(next_s_ptr + row // tokens * dim + columns, mask, 0.0).to(tl.float32)
            h = (h.to(tl.float32) * next_s).to(dtype)
        tl.store(h_ptr + row * dim + columns, h, mask)
        tl.store(next_inverse_ptr + row, next_inverse)


@triton.jit
def residual_norm_backward(
    gx_ptr,
    gh_ptr,
    summed_ptr,
    y_ptr,
    w_ptr,
    g_ptr,
    next_w_ptr,
    next_s_ptr,
    inverse_ptr,
    next_inverse_ptr,
    out_x_ptr,
    out_y_ptr,
    tokens,
    dim,
    HAS_SCALE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    N: tl.constexpr,
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    mask = columns < dim
    gx = tl.load(gx_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
    if HAS_NEXT:
        gh = tl.load(gh_ptr + row * dim + columns, mask, 0.0).to(tl.float32)
        if HAS_SCALE:
            gh *= tl.load(next_s_ptr + row // tokens * dim + columns, mask, 0.0).to(tl.float32)
        gh *= tl.load(next_w_ptr + columns, mask, 0.0).to(tl.float32)
        next_inverse = tl.load(next_inverse_ptr + row)
        normed = tl.load(summed_ptr + row * dim + columns, mask, 0.0).to(tl.float32) * next_inverse
        gx += next_inverse * (gh - normed * (tl.sum(gh * normed, 0) / dim))
        tl.store(out_x_ptr + row * dim + columns, gx.to(out_x_ptr.dtype.element_ty), mask)
    gy = gx
    if HAS_SCALE:
        gy *= tl.load(g_ptr + row // tokens * dim + columns, mask, 0.0).to(tl.float32)
    gy *= tl.load(w_ptr + columns, mask, 0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + row)
    normed_y = tl.load(y_ptr + row * dim + columns, mask, 0.0).to(tl.float32) * inverse
    gy = inverse * (gy - normed_y * (tl.sum(gy * normed_y, 0) / dim))
    tl.store(out_y_ptr + row * dim + columns, gy.to(out_y_ptr.dtype.element_ty), mask)


@triton.jit
def _rotate_heads(
    x_ptr, w_ptr, out_ptr, inverse_ptr, token, cos, sin, stride_h, eps, heads, half, H: tl.constexpr, D: tl.constexpr
):
    """Norm and rotate the heads of a token, which begin at `x_ptr`."""
    head, pair = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    mask = (head < heads) & (pair < half)
    dtype = out_ptr.dtype.element_ty
    source = x_ptr + head * stride_h + 2 * pair
    first = tl.load(source, mask, 0.0).to(tl.float32)
    second = tl.load(source + 1, mask, 0.0).to(tl.float32)
    inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half) + eps)
    row = inverse[:, None]
    w_first = tl.load(w_ptr + 2 * pair, pair < half, 0.0).to(tl.float32)
    w_second = tl.load(w_ptr + 2 * pair + 1, pair < half, 0.0).to(tl.float32)
    first = ((first * row).to(dtype).to(tl.float32) * w_first).to(dtype).to(tl.float32)
    second = ((second * row).to(dtype).to(tl.float32) * w_second).to(dtype).to(tl.float32)
    target = out_ptr + (token * heads + head) * (2 * half) + 2 * pair
    tl.store(target, (first * cos - second * sin).to(dtype), mask)
    tl.store(target + 1, (first * sin + second * cos).to(dtype), mask)
    tl.store(inverse_ptr + token * heads + tl.arange(0, H), inverse, tl.arange(0, H) < heads)


@triton.jit
def rotated_norm(
    q_ptr,
    k_ptr,
    q_w_ptr,
    k_w_ptr,
    rope_ptr,
    q_out_ptr,
    k_out_ptr,
    q_inverse_ptr,
    k_inverse_ptr,
    tokens,
    stride_b,
    stride_t,
    stride_h,
    eps,
    heads,
    half,
    H: tl.constexpr,
    D: tl.constexpr,
):
    token, pair = tl.program_id(0).to(tl.int64), tl.arange(0, D)[None, :]
    angle = rope_ptr + (token * half + pair) * 2
    cos, sin = tl.load(angle, pair < half, 0.0), tl.load(angle + 1, pair < half, 0.0)
    start = token // tokens * stride_b + token % tokens * stride_t
    _rotate_heads(q_ptr + start, q_w_ptr, q_out_ptr, q_inverse_ptr, token, cos, sin, stride_h, eps, heads, half, H, D)
    _rotate_heads(k_ptr + start, k_w_ptr, k_out_ptr, k_inverse_ptr, token, cos, sin, stride_h, eps, heads, half, H, D)


@triton.jit
def _rotate_heads_backward(
    g_ptr,
    x_ptr,
    w_ptr,
    inverse_ptr,
    out_ptr,
    token,
    cos,
    sin,
    g_stride_h,
    stride_h,
    heads,
    half,
    H: tl.constexpr,
    D: tl.constexpr,
):
    head, pair = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    mask = (head < heads) & (pair < half)
    dtype = out_ptr.dtype.element_ty
    g_first = tl.load(g_ptr + head * g_stride_h + 2 * pair, mask, 0.0).to(tl.float32)
    g_second = tl.load(g_ptr + head * g_stride_h + 2 * pair + 1, mask, 0.0).to(tl.float32)
    # The inverse of a rotation is the rotation by the opposite angle.
    turned_first, turned_second = g_first * cos + g_second * sin, g_second * cos - g_first * sin
    turned_first *= tl.load(w_ptr + 2 * pair, pair < half, 0.0).to(tl.float32)
    turned_second *= tl.load(w_ptr + 2 * pair + 1, pair < half, 0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + token * heads + tl.arange(0, H), tl.arange(0, H) < heads, 0.0)[:, None]
    first = tl.load(x_ptr + head * stride_h + 2 * pair, mask, 0.0).to(tl.float32) * inverse
    second = tl.load(x_ptr + head * stride_h + 2 * pair + 1, mask, 0.0).to(tl.float32) * inverse
    mean = ((tl.sum(turned_first * first, 1) + tl.sum(turned_second * second, 1)) / (2 * half))[:, None]
    target = out_ptr + (token * heads + head) * (2 * half) + 2 * pair
    tl.store(target, (inverse * (turned_first - first * mean)).to(dtype), mask)
    tl.store(target + 1, (inverse * (turned_second - second * mean)).to(dtype), mask)


@triton.jit
def rotated_norm_backward(
    gq_ptr,
    gk_ptr,
    q_ptr,
    k_ptr,
    q_w_ptr,
    k_w_ptr,
    rope_ptr,
    q_inverse_ptr,
    k_inverse_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    g_stride_b,
    g_stride_t,
    g_stride_h,
    stride_b,
    stride_t,
    stride_h,
    heads,
    half,
    H: tl.constexpr,
    D: tl.constexpr,
):
    token, pair = tl.program_id(0).to(tl.int64), tl.arange(0, D)[None, :]
    angle = rope_ptr + (token * half + pair) * 2
    cos, sin = tl.load(angle, pair < half, 0.0), tl.load(angle + 1, pair < half, 0.0)
    g_start = token // tokens * g_stride_b + token % tokens * g_stride_t
    start = token // tokens * stride_b + token % tokens * stride_t
    _rotate_heads_backward(
        gq_ptr + g_start,
        q_ptr + start,
        q_w_ptr,
        q_inverse_ptr,
        q_out_ptr,
        token,
        cos,
        sin,
        g_stride_h,
        stride_h,
        heads,
        half,
        H,
        D,
    )
    _rotate_heads_backward(
        gk_ptr + g_start,
        k_ptr + start,
        k_w_ptr,
        k_inverse_ptr,
        k_out_ptr,
        token,
        cos,
        sin,
        g_stride_h,
        stride_h,
        heads,
        half,
        H,
        D,
    )


@triton.jit
def swiglu(u_ptr, v_ptr, out_ptr, numel, N: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = index < numel
    dtype = out_ptr.dtype.element_ty
    u = tl.load(u_ptr + index, mask, 0.0).to(tl.float32)
    v = tl.load(v_ptr + index, mask, 0.0).to(tl.float32)
    silu = (u / (1.0 + tl.exp(-u))).to(dtype).to(tl.float32)
    tl.store(out_ptr + index, (silu * v).to(dtype), mask)


@triton.jit
def swiglu_backward(g_ptr, u_ptr, v_ptr, gu_ptr, gv_ptr, numel, N: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = index < numel
    dtype = gu_ptr.dtype.element_ty
    g = tl.load(g_ptr + index, mask, 0.0).to(tl.float32)
    u = tl.load(u_ptr + index, mask, 0.0).to(tl.float32)
    v = tl.load(v_ptr + index, mask, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-u))
    tl.store(gu_ptr + index, (g * v * (sigmoid * (1.0 + u * (1.0 - sigmoid)))).to(dtype), mask)
    tl.store(gv_ptr + index, (g * (u * sigmoid)).to(dtype), mask)


@triton.jit
def unpack(data_ptr, scales_ptr, out_ptr, numel, block, N: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = index < numel
    data = tl.load(data_ptr + index, mask, 0.0).to(tl.float32)
    scale = tl.load(scales_ptr + index // block, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + index, (data * scale).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def to_fp8(x_ptr, scale_ptr, out_ptr, numel, N: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = index < numel
    x = tl.load(x_ptr + index, mask, 0.0).to(tl.float32) / tl.load(scale_ptr)
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(out_ptr + index, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def transpose(data_ptr, out_ptr, rows, columns, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    data = tl.load(data_ptr + row[:, None] * columns + column[None, :], mask, 0)
    turned = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(out_ptr + column[:, None] * rows + row[None, :], tl.trans(data), turned)
