"""Compares every Triton kernel, run by Triton's interpreter on a CPU, with its plain region; a program of its own.

The interpreter must be chosen before Triton is imported. Prints a line for each comparison that fails, and then
their number. With `--fault`, at a single size, each result of a kernel is 2 % too large.
"""

import itertools
import os
import sys
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from region_results import results
from torch import Tensor
from triton.runtime import interpreter

from zimage_train.models import quantize, region_ops, regions, triton_regions

EPS = 1e-5
SIZES = [(1, 1, 8, 1, 4), (2, 5, 40, 3, 10), (1, 33, 96, 4, 24), (3, 2, 130, 5, 26), (1, 7, 2049, 1, 128)]
"""Samples, tokens, dim, heads and size of a head: odd ones, and a row beyond a power of two."""


truncated = interpreter._convert_float


def rounded(source: np.ndarray, from_type: tl.dtype, to_type: tl.dtype, mode: object) -> np.ndarray:
    """Round fp32 to bf16 or e4m3 as a GPU does; Triton's interpreter would cut off the digits that are too many."""
    if from_type != tl.float32 or to_type not in (tl.bfloat16, tl.float8e4nv):
        return truncated(source, from_type, to_type, mode)
    values = torch.from_numpy(np.ascontiguousarray(source).view(np.float32))
    if to_type == tl.float8e4nv:
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(source.shape)
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(source.shape)


interpreter._convert_float = rounded


def calls(size: tuple[int, ...], dtype: torch.dtype, is_modulated: bool) -> Iterator[tuple[str, tuple]]:
    """The name and the arguments of a call of each region."""
    b, t, dim, heads, d = size
    draw = torch.Generator().manual_seed(sum(size))

    def drawn(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(to)

    x, y, gx, gh = (drawn(b, t, dim) for _ in range(4))
    weight, next_weight = drawn(dim), drawn(dim)
    # As the blocks have them: parts of a larger tensor.
    gate, scale = drawn(b, 1, 4 * dim).chunk(4, dim=2)[1:3] if is_modulated else (None, None)
    yield "modulated_norm", (x, weight, scale, EPS)
    inverse = results(regions, "modulated_norm", x, weight, scale, EPS)[1]
    yield "modulated_norm_backward", (gh, gx, x, weight, scale, inverse)
    yield "gated_residual", (x, y, weight, gate, EPS)
    summed, inverse = results(regions, "gated_residual", x, y, weight, gate, EPS)
    yield "gated_residual_backward", (gx, y, weight, gate, inverse)
    yield "residual_norm", (x, y, weight, gate, next_weight, scale, EPS)
    _, _, inverse, next_inverse = results(regions, "residual_norm", x, y, weight, gate, next_weight, scale, EPS)
    yield (
        "residual_norm_backward",
        (gx, gh, summed, y, weight, gate, next_weight, scale, inverse, next_inverse),
    )
    q, k, q_weight, k_weight = drawn(b, t, heads, d), drawn(b, t, heads, d), drawn(d), drawn(d)
    rope = drawn(b, t, d // 2, 2, to=torch.float32)
    yield "rotated_norm", (q, k, q_weight, k_weight, rope, EPS)
    inverses = results(regions, "rotated_norm", q, k, q_weight, k_weight, rope, EPS)[2:]
    # Attention returns gradients whose heads come before the tokens in memory.
    gq, gk = (drawn(b, heads, t, d).transpose(1, 2) for _ in range(2))
    yield "rotated_norm_backward", (gq, gk, q, k, q_weight, k_weight, rope, *inverses)
    yield "swiglu", (x, y)
    yield "swiglu_backward", (gx, x, y)
    for kind in ("int8", "fp8"):
        data, scales = quantize.pack(drawn(dim, 128), kind)
        yield "unpack", (data, scales.to(dtype))
    wide = 100 * drawn(dim, 128)
    yield "to_fp8", (wide, wide.abs().max().float() / 448)
    yield "transpose", (wide.to(torch.float8_e4m3fn),)


def is_near(found: Tensor, wanted: Tensor, exact: Tensor) -> bool:
    """In fp32 the same but for the order of sums; in bf16 hardly farther from the fp32 result than the plain region."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if wanted.dtype == torch.float8_e4m3fn:
        return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    if wanted.dtype == torch.float32:
        return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    error, allowed = (float((one.float() - exact).norm()) for one in (found, wanted))
    return error <= 1.05 * allowed + 1e-4 * float(exact.norm())


def main() -> int:
    count, names = 0, set()
    sizes = SIZES[:1] if "--fault" in sys.argv else SIZES
    for size, dtype, is_modulated in itertools.product(sizes, (torch.float32, torch.bfloat16), (True, False)):
        for name, arguments in calls(size, dtype, is_modulated):
            wide = arguments
            if name != "transpose":
                wide = tuple(one.float() if isinstance(one, Tensor) else one for one in arguments)
            found, wanted, exact = (
                results(of, name, *given)
                for of, given in ((triton_regions, arguments), (regions, arguments), (regions, wide))
            )
            names.add(name)
            if "--fault" in sys.argv:
                found = tuple((1.02 * one.float() + 0.01).to(one.dtype) for one in found)
            for index, (one, other, best) in enumerate(zip(found, wanted, exact, strict=True)):
                count += 1
                if not is_near(one, other, best):
                    print(f"{name} {index} differs at {size} in {dtype}, modulated: {is_modulated}")
    print(f"{count} comparisons of {len(names)} regions")
    return int(names != set(region_ops.NAMES))


if __name__ == "__main__":
    sys.exit(main())
