"""Attention of a block, forward and backward, in every way that there is."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage_train.models.arch import TransformerShape
from zimage_train.planning import devices

from gpu_parts import measuring
from gpu_parts.parts import WAYS, Way, pixels, split

SHAPE = TransformerShape()
CAPTION_TOKENS = 64
"""As scripts/bench.py has them."""
BLOCKS = SHAPE.n_layers + 2 * SHAPE.n_refiner_layers
"""The refiners have fewer tokens, so the time of all is an upper bound."""


@dataclass(frozen=True)
class Given:
    """What attention is given, (1, heads, tokens, width of a head), and the gradient that comes back to it."""

    query: Tensor
    key: Tensor
    value: Tensor
    back: Tensor


def measure(case: str, dry: bool) -> dict[str, Any]:
    """A way at a size: time, whether its bits repeat, and how far it is from fp32; or why it is not to be had."""
    side, way = split(case)
    device = measuring.device_of(dry)
    given = drawn(pixels(side), device)
    reference = measuring.joined(gradients(in_fp32(given)))
    try:
        with arranged(WAYS[way], device, dry):
            return one_way(given, WAYS[way], reference, device)
    except NotInstalled as missing:
        return {"not_installed": str(missing)}


def one_way(given: Given, way: Way, reference: Tensor, device: torch.device) -> dict[str, Any]:
    """Time and equality, inside what `arranged` has set."""

    def both() -> list[Tensor]:
        return gradients(given) if way.heads is None else gradients_by_heads(given, way.heads)

    taken = measuring.milliseconds(both, device)
    return {
        **taken,
        "ms_all_blocks": round(taken["ms"] * BLOCKS, 1),
        "same_bits": measuring.same_bits(lambda: measuring.joined(both())),
        "off_fp32": measuring.distance(measuring.joined(both()), reference),
        "picked": picked(given),
    }


# What it is given -------------------------------------------------------------------------------------------


def drawn(side: int, device: torch.device) -> Given:
    """Random values, laid out as the model has them: tokens first, then heads."""
    tokens = (side // 16) ** 2 + CAPTION_TOKENS
    draw = torch.Generator(device).manual_seed(1)

    def random_tensor() -> Tensor:
        size = (1, tokens, SHAPE.n_heads, SHAPE.dim // SHAPE.n_heads)
        return torch.randn(size, generator=draw, device=device).bfloat16().transpose(1, 2)

    query, key, value = (random_tensor().requires_grad_(True) for _ in range(3))
    return Given(query, key, value, random_tensor())


def in_fp32(given: Given) -> Given:
    """The same values in a precision that can judge the others."""
    query, key, value = (
        tensor.detach().float().requires_grad_(True) for tensor in (given.query, given.key, given.value)
    )
    return Given(query, key, value, given.back.float())


# How it is computed -----------------------------------------------------------------------------------------


def gradients(given: Given) -> list[Tensor]:
    """Of query, key and value, by whatever kernel is arranged."""
    out = F.scaled_dot_product_attention(given.query, given.key, given.value)
    return list(torch.autograd.grad(out, (given.query, given.key, given.value), given.back))


@torch.no_grad()
def gradients_by_heads(given: Given, heads: tuple[int, ...]) -> list[Tensor]:
    """The same, FlashAttention's backward being called on some heads after others.

    In fixed order it starts so many blocks a head that all heads together need two waves of them; fewer heads fill one.
    """
    run = on_cpu if given.query.device.type == "cpu" else on_gpu
    return run(given, heads)


def on_gpu(given: Given, heads: tuple[int, ...]) -> list[Tensor]:
    """By the operations that torch itself calls."""
    operations = torch.ops.aten
    forward = operations._scaled_dot_product_flash_attention(given.query, given.key, given.value)
    out, sums, starts_q, starts_k, most_q, most_k, seed, offset, _ = forward
    parts = []
    for group in slices(heads):
        inputs = [tensor[:, group] for tensor in (given.back, given.query, given.key, given.value, out)]
        rest = (starts_q, starts_k, most_q, most_k, 0.0, False, seed, offset)
        part_sums = sums[:, group].contiguous()
        parts.append(operations._scaled_dot_product_flash_attention_backward(*inputs, part_sums, *rest))
    return [torch.cat(tensor, 1) for tensor in zip(*parts, strict=True)]


def on_cpu(given: Given, heads: tuple[int, ...]) -> list[Tensor]:
    """A stand-in for dry runs."""
    operations = torch.ops.aten
    out, sums = operations._scaled_dot_product_flash_attention_for_cpu(given.query, given.key, given.value)
    parts = []
    for group in slices(heads):
        inputs = [tensor[:, group] for tensor in (given.back, given.query, given.key, given.value, out, sums)]
        parts.append(operations._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, False))
    return [torch.cat(tensor, 1) for tensor in zip(*parts, strict=True)]


def slices(heads: tuple[int, ...]) -> Iterator[slice]:
    """Adjacent slices of the heads."""
    begin = 0
    for number in heads:
        yield slice(begin, begin + number)
        begin += number


# What is arranged before ------------------------------------------------------------------------------------


class NotInstalled(Exception):
    """An implementation of FlashAttention is not there."""


@contextlib.contextmanager
def arranged(way: Way, device: torch.device, dry: bool) -> Iterator[None]:
    """Within the block attention is computed as `way` says; on a CPU by the only kernel that it has."""
    with contextlib.ExitStack() as stack:
        if way.implementation is not None:
            stack.enter_context(implemented_by(way.implementation))
        if way.fixed:
            stack.enter_context(devices.reproducible(device))
        if way.backend is not None and not dry:
            stack.enter_context(sdpa_kernel([getattr(SDPBackend, way.backend)]))
        yield


@contextlib.contextmanager
def implemented_by(name: str) -> Iterator[None]:
    """Within the block FlashAttention is that of another package.

    Raises:
        NotInstalled: torch does not know it, or the package is missing or does not suit torch.
    """
    try:
        torch_attention.activate_flash_attention_impl(name)
    except Exception as error:  # each package fails in its own way
        raise NotInstalled(f"{type(error).__name__}: {error}"[:500]) from error
    try:
        yield
    finally:
        torch_attention.restore_flash_attention_impl()


def picked(given: Given) -> str:
    """The kernel that torch takes as things are arranged."""
    return SDPBackend(torch._fused_sdp_choice(given.query, given.key, given.value)).name
