"""A product of fp8 for processors without fp8 arithmetic, on which torch's own takes a hundred times as long."""

import torch
from torch import Tensor


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """Do what `torch._scaled_mm` does, in fp32, and hold its arguments to what tensor cores take."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.dtype == scale_b.dtype == torch.float32
    assert a.is_contiguous() and b.T.is_contiguous() and scale_a.numel() == scale_b.numel() == 1
    assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0 and out.dtype == out_dtype
    return out.copy_((a.float() @ b.float()) * (scale_a * scale_b))
