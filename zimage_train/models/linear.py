"""The linear layers of the transformer's blocks: a frozen weight, perhaps quantised, and a LoRA beside it, as one.

`y = x W' + scale * (x A') B'` is one operation with a backward of its own. It keeps x, once for all layers that share
it, and nothing else: a quantised weight is unpacked again for the backward, and what the LoRA makes of x costs less to
compute than to keep. The weights of the LoRA are fp32 masters, computed with in the type of x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_train.config.types import Quantization
from zimage_train.models import quantize

NAME = "zimage_train::frozen_linear"
torch.library.define(NAME, "(Tensor x, Tensor weight, Tensor? scales, Tensor? a, Tensor? b, float scale) -> Tensor")


@torch.library.impl(NAME, "CompositeExplicitAutograd")
def _forward(x: Tensor, weight: Tensor, scales: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float):
    y = F.linear(x, _dense(weight, scales, x.dtype))
    if a is None or b is None:
        return y
    rows = y.view(-1, y.shape[-1])
    rows.addmm_(x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)
    return y


frozen_linear = torch.ops.zimage_train.frozen_linear.default
"""The forward as an operation that selective checkpointing sees, and can keep, as a whole."""


def _dense(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scales is None else quantize.unpack(weight, scales, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor | None, a: Tensor | None, b: Tensor | None, scale):
        ctx.save_for_backward(x if a is not None else None, weight, scales, a, b)
        ctx.scale = scale
        return frozen_linear(x, weight, scales, a, b, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad,) = grad_outputs
        x, weight, scales, a, b = ctx.saved_tensors
        grad_x = grad @ _dense(weight, scales, grad.dtype) if ctx.needs_input_grad[0] else None
        if a is None:
            return grad_x, None, None, None, None, None
        rows, inputs, narrow = grad.flatten(0, -2), x.flatten(0, -2), a.to(grad.dtype)
        inner = (rows @ b.to(grad.dtype)) * ctx.scale
        grad_a = (inner.T @ inputs).to(a.dtype)
        grad_b = (rows.T @ (inputs @ narrow.T)).mul_(ctx.scale).to(b.dtype)
        if grad_x is not None:
            grad_x.view(-1, grad_x.shape[-1]).addmm_(inner, narrow)
        return grad_x, None, None, grad_a, grad_b, None


class FrozenLinear(nn.Linear):
    """A linear layer without bias whose weight is never trained, in `dtype` or quantised to `kind`."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, kind: Quantization | None) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta", dtype=dtype)
        self.kind: Quantization | None = kind
        self.scales: nn.Parameter | None = None
        if kind is not None:
            data, scales = quantize.empty_quantized(outputs, inputs, kind, torch.device("meta"))
            self.weight = nn.Parameter(data, requires_grad=False)
            self.scales = nn.Parameter(scales, requires_grad=False)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return self.with_lora(input, None, None, 0.0)

    def with_lora(self, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
        """`x W' + scale * (x A') B'` for x (..., in), A (rank, in) and B (out, rank)."""
        return _Linear.apply(x, self.weight, self.scales, a, b, scale)

    def stored(self) -> list[nn.Parameter]:
        """What it stores: the weight as it is, or packed with its scales."""
        return [parameter for parameter in (self.weight, self.scales) if isinstance(parameter, nn.Parameter)]

    def pack(self, weight: Tensor) -> list[Tensor]:
        """A dense `weight` (out, in) as `stored` holds it."""
        return [weight] if self.kind is None else list(quantize.pack(weight, self.kind))
