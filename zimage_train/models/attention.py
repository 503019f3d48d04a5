"""Attention as a pair of calls, so that a block can keep its result and not what went into it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionKernel:
    """A kernel of scaled dot product attention for tensors (b, heads, t, d), with a bias (b, heads, t, t) or None."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Any]]
    """q, k, v, bias -> the result, and what else the backward needs: row sums and the state of the kernel."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """Gradient of the result, q, k, v, bias, result, what else -> the gradients of q, k and v."""


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
    result, *rest = aten._scaled_dot_product_flash_attention(q, k, v)
    return result, tuple(rest[:-1])  # the last is the mask of dropout, for debugging


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, rest: Any):
    row_sums, q_ends, k_ends, q_longest, k_longest, seed, offset = rest
    return aten._scaled_dot_product_flash_attention_backward(
        g, q, k, v, result, row_sums, q_ends, k_ends, q_longest, k_longest, 0.0, False, seed, offset
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
    result, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
    return result, tuple(rest)


def _efficient_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, rest: Any):
    wanted = [True, True, True, False]  # of q, k, v and bias
    return aten._scaled_dot_product_efficient_attention_backward(g, q, k, v, bias, result, *rest, 0.0, wanted)[:3]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _cpu_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, row_sums: Any):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, result, row_sums, 0.0, False, attn_mask=bias
    )


def _graph_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
    """Run whichever kernel torch chooses, and keep the graph that autograd makes of it, which holds q, k and v too."""
    with torch.enable_grad():
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        result = F.scaled_dot_product_attention(*leaves, attn_mask=bias)
    return result.detach(), (result, leaves)


def _graph_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, rest: Any):
    attended, leaves = rest
    return torch.autograd.grad(attended, leaves, g)


FLASH = AttentionKernel(_flash_forward, _flash_backward)
EFFICIENT = AttentionKernel(_efficient_forward, _efficient_backward)
FLASH_CPU = AttentionKernel(_cpu_forward, _cpu_backward)
ANY_KERNEL = AttentionKernel(_graph_forward, _graph_backward)


def choose_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> AttentionKernel:
    """Return the kernel that torch's scaled dot product attention would use for these tensors."""
    if q.device.type == "meta":  # where steps are counted, as a GPU would run them
        return FLASH if bias is None else EFFICIENT
    choice = torch._fused_sdp_choice(q, k, v, bias)
    if choice == SDPBackend.FLASH_ATTENTION.value:
        return FLASH if q.is_cuda else FLASH_CPU
    if choice == SDPBackend.EFFICIENT_ATTENTION.value:
        return EFFICIENT
    return ANY_KERNEL


def bias_of(mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Return the bias (b, heads, t, t) of a mask (b, t), which is False where a token must not be attended to.

    It is a view of (b, t) numbers: 0 where the mask is True, and minus infinity elsewhere.
    """
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), float("-inf"))
    return bias[:, None, None, :].expand(-1, heads, mask.shape[1], -1)
