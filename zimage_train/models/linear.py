"""Linear layers of the transformer's blocks: a frozen, possibly quantised weight and its LoRA as a single operation.

`y = x W' + scale * (x A') B'` has a backward of its own that saves only x, which layers with the same input share. A
quantised weight is unpacked again in the backward, and x A' is computed again, since that is cheaper than keeping it.
The LoRA's weights are fp32 masters that are cast to the dtype of x for the products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_train.config.types import Quantization
from zimage_train.models import fp8, quantize

OP_NAME = "zimage_train::frozen_linear"
torch.library.define(OP_NAME, "(Tensor x, Tensor weight, Tensor? scales, Tensor? a, Tensor? b, float scale) -> Tensor")


def frozen_linear_kernels(
    x: Tensor, weight: Tensor, scales: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    """Return what `frozen_linear` does, as the operations that it consists of."""
    if scales is not None and fp8.is_fp8_product(scales):
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        fp8.multiply(fp8.scaled_rows(x.flatten(0, -2)), weight, scales, y.flatten(0, -2))
    else:
        y = F.linear(x, _dense(weight, scales, x.dtype))
    if a is None or b is None:
        return y
    rows = y.view(-1, y.shape[-1])
    # In place, so that the LoRA's share of the output (tokens, out) is never a tensor of its own.
    rows.addmm_(x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)
    return y


torch.library.impl(OP_NAME, "CompositeExplicitAutograd", frozen_linear_kernels)
frozen_linear = torch.ops.zimage_train.frozen_linear.default
"""The forward as an operation of the dispatcher, which selective checkpointing can save or recompute as a whole."""


def _dense(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scales is None else quantize.unpack(weight, scales, dtype)


def _grad_input(grad: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None or not fp8.is_fp8_product(scales):
        return grad @ _dense(weight, scales, grad.dtype)  # unpacked for the second time, and freed after the product
    grad_x = grad.new_empty(*grad.shape[:-1], weight.shape[1])
    fp8.multiply_backward(fp8.scaled_rows(grad.flatten(0, -2)), weight, scales, grad_x.flatten(0, -2), None)
    return grad_x


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor | None, a: Tensor | None, b: Tensor | None, scale):
        # The packed weight is saved, not the dense weight: a dense copy for each layer would cost what packing saves.
        # Without a LoRA, the backward to x needs the weight alone.
        ctx.save_for_backward(x if a is not None else None, weight, scales, a, b)
        ctx.scale = scale
        return frozen_linear(x, weight, scales, a, b, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad,) = grad_outputs
        x, weight, scales, a, b = ctx.saved_tensors
        grad_x = _grad_input(grad, weight, scales) if ctx.needs_input_grad[0] else None
        if a is None:
            return grad_x, None, None, None, None, None
        grad_rows, x_rows, a_cast = grad.flatten(0, -2), x.flatten(0, -2), a.to(grad.dtype)
        grad_inner = (grad_rows @ b.to(grad.dtype)) * ctx.scale  # (tokens, rank): the gradient with respect to x A'
        grad_a = (grad_inner.T @ x_rows).to(a.dtype)
        grad_b = (grad_rows.T @ (x_rows @ a_cast.T)).mul_(ctx.scale).to(b.dtype)
        if grad_x is not None:
            grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_inner, a_cast)
        return grad_x, None, None, grad_a, grad_b, None


class FrozenLinear(nn.Linear):
    """A linear layer without bias whose weight is never trained, in `dtype` or quantised to `kind`."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, kind: Quantization | None) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta", dtype=dtype)
        self.kind: Quantization | None = kind
        self.scratch: Tensor | None = None
        """Memory in which `dense` unpacks the weight; None: it allocates its own."""
        self.scales: nn.Parameter | None = None
        if kind is not None:
            data, scales = quantize.empty_quantized(outputs, inputs, kind, torch.device("meta"))
            self.weight = nn.Parameter(data, requires_grad=False)
            self.scales = nn.Parameter(scales, requires_grad=False)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return self.with_lora(input, None, None, 0.0)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in), unpacked to `dtype` if it is quantised.

        It is valid until the next call for a layer with the same `scratch`.
        """
        if self.scales is None or self.scratch is None or self.scratch.dtype != dtype:
            return _dense(self.weight, self.scales, dtype)
        out = self.scratch[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        quantize.unpack_into(self.weight, self.scales, out)
        return out

    def with_lora(self, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
        """Return `x W' + scale * (x A') B'` for x (..., in), A (rank, in) and B (out, rank)."""
        return _LinearFunction.apply(x, self.weight, self.scales, a, b, scale)

    def stored_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that hold the weight: itself, or the packed data and its scales."""
        return [parameter for parameter in (self.weight, self.scales) if isinstance(parameter, nn.Parameter)]

    def pack(self, weight: Tensor) -> list[Tensor]:
        """Return the values of `stored_parameters` for a dense `weight` (out, in)."""
        return [weight] if self.kind is None else list(quantize.pack(weight, self.kind))


def share_scratch(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give the quantised layers of `model` memory for the largest dense weight, which all of them use in turn."""
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear) and layer.kind is not None]
    if not layers:
        return
    numel = max(layer.out_features * layer.in_features for layer in layers)
    scratch = torch.empty(numel, dtype=dtype, device=device)
    for layer in layers:
        layer.scratch = scratch
