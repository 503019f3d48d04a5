"""Attention as a pair of calls, so that a block can keep its result and not what went into it."""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
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
    """q, k, v, bias -> the result, and what else the backward needs: row sums, if any, and the state of the kernel."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """Gradient of the result, q, k, v, bias, result, what else -> the gradients of q, k and v."""


def active_flash() -> str | None:
    """Return the implementation that stands in for torch's FlashAttention 2, such as "FA3", or None."""
    # Older versions of torch have no other implementation.
    current: Callable[[], str | None] = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    return current()


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
    result, *rest = aten._scaled_dot_product_flash_attention(q, k, v)
    return result, tuple(rest[:-1])  # the last is the mask of dropout, for debugging


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, rest: Any):
    groups = (q.shape[1],)
    if torch.are_deterministic_algorithms_enabled() and active_flash() is None:
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
        groups = head_groups(q.shape[0], q.shape[1], q.shape[2], multiprocessors)
    return in_head_groups(_flash_backward_at_once, groups, g, q, k, v, bias, result, rest)


def _flash_backward_at_once(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
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
    result, row_sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    return result, (row_sums,)


def _cpu_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, result: Tensor, rest: Any):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, result, rest[0], 0.0, False, attn_mask=bias
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


def in_head_groups(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    groups: Sequence[int],
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    result: Tensor,
    rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v by a call of `backward` for each group of heads; `groups` has their sizes."""
    if len(groups) == 1:
        return backward(g, q, k, v, bias, result, rest)
    row_sums, *others = rest
    parts = []
    for end, size in zip(accumulate(groups), groups, strict=True):
        heads = slice(end - size, end)
        of_group = [tensor[:, heads] for tensor in (g, q, k, v)]
        own_bias = None if bias is None else bias[:, heads]
        own_rest = (row_sums[:, heads].contiguous(), *others)
        parts.append(backward(*of_group, own_bias, result[:, heads], own_rest))
    gq, gk, gv = map(_join_heads, zip(*parts, strict=True))
    return gq, gk, gv


def _join_heads(parts: Sequence[Tensor]) -> Tensor:
    """Return (b, heads, t, d) of groups of heads, with the heads of a token side by side, as a kernel returns them."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=2).transpose(1, 2)


TILE = 128
"""Keys that a thread block of FlashAttention 2's backward takes at a time, for heads of 128."""
LEAST_GAIN = 0.95
"""Groups are used if they take less than this share of the time of a single call."""


@cache
def head_groups(batch: int, heads: int, tokens: int, multiprocessors: int) -> tuple[int, ...]:
    """Return the numbers of heads to run the backward of FlashAttention 2 on in turn, if the order of sums is fixed.

    In that mode it starts `ceil(multiprocessors / (batch * heads))` thread blocks for each head, between which the keys
    are divided. Where that is a little more than there are multiprocessors, a second wave leaves most of them idle: 30
    heads on 132 make 150. Two groups such as 8 and 22 fill the waves.
    """

    def units(group: int) -> int:
        """Return the time of a call, in tiles that a multiprocessor works through."""
        blocks = math.ceil(multiprocessors / (batch * group))
        tiles = math.ceil(tokens / TILE)
        free_at = [0] * multiprocessors
        for _ in range(batch * group):
            for index in range(blocks):
                own_tiles = math.ceil((tiles - index) / blocks) if index < tiles else 0
                heapq.heappush(free_at, heapq.heappop(free_at) + own_tiles)
        return max(free_at)

    at_once = units(heads)
    if heads == 1:
        return (heads,)
    first = min(range(1, heads // 2 + 1), key=lambda size: units(size) + units(heads - size))
    if units(first) + units(heads - first) < LEAST_GAIN * at_once:
        return (first, heads - first)
    return (heads,)


def bias_of(mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Return the bias (b, heads, t, t) of a mask (b, t), which is False where a token must not be attended to.

    It is a view of (b, t) numbers: 0 where the mask is True, and minus infinity elsewhere.
    """
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), float("-inf"))
    return bias[:, None, None, :].expand(-1, heads, mask.shape[1], -1)
