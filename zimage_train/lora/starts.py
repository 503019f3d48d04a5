"""The matrices that a LoRA begins with (`lora.start`)."""

import math

import torch
from torch import Generator, Tensor


def zero_start(a: Tensor, b: Tensor, draw: Generator) -> None:
    """Write A uniform in +-1/sqrt(in), as peft initialises it, and B zero."""
    bound = 1.0 / math.sqrt(a.shape[1])
    a.copy_((torch.rand(a.shape, generator=draw) * 2.0 - 1.0) * bound)
    b.zero_()


def orthogonal_start(a: Tensor, b: Tensor, draw: Generator) -> None:
    """Write A and B that are not zero, though B A is: they are made of two halves of an orthogonal matrix (rank, rank).

    As peft's init_lora_weights="orthogonal" does; its rows of one half are orthogonal to those of the other.
    """
    rank = len(a)
    # In fp64, so that B A is zero but for the rounding to fp32.
    q = torch.linalg.qr(torch.randn(rank, rank, generator=draw).double()).Q
    a_part = torch.randn(a.shape[1], rank // 2, generator=draw).double()
    b_part = torch.randn(rank // 2, b.shape[0], generator=draw).double()
    a.copy_((a_part @ q[0::2]).T / 10.0)
    b.copy_(b_part.T @ q[1::2] / 10.0)
