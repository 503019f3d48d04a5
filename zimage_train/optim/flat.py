"""Trained tensors back to back in one buffer, as their gradients are, so that a single kernel changes them all."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


class FlatParameters:
    """Named fp32 parameters that are views of a single buffer, whose gradients are views of another.

    `whole` is the buffer as a parameter of its own, for an optimizer that treats every element alike. Gradients are
    added up in place and set to zero by `zero_grad`; a gradient must never be replaced by another tensor or by None,
    since the buffer would not see it.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], order: Sequence[str], device: torch.device) -> None:
        """Allocate parameters of `shapes`, which lie in memory in `order`."""
        self.shapes = dict(shapes)
        self.start: dict[str, int] = {}
        """Name -> index of its first element in the buffer."""
        self.numel = 0
        for name in order:
            self.start[name] = self.numel
            self.numel += math.prod(shapes[name])
        assert self.start.keys() == self.shapes.keys()
        self.whole = Parameter(torch.zeros(self.numel, dtype=torch.float32, device=device))
        self.views = {name: self.leaf(self.start[name], shape) for name, shape in self.shapes.items()}
        """Name -> parameter, in the order of `shapes`."""

    def leaf(self, start: int, shape: tuple[int, ...]) -> Parameter:
        """Return a parameter that is the part of the buffer from element `start`."""
        leaf = Parameter(self.whole.detach()[start : start + math.prod(shape)].view(shape))
        if self.whole.grad is not None:
            leaf.grad = self.whole.grad[start : start + math.prod(shape)].view(shape)
        return leaf

    def allocate_grads(self) -> None:
        """Allocate the gradients, which are zero."""
        self.whole.grad = torch.zeros_like(self.whole)
        for name, tensor in self.split(self.whole.grad).items():
            self.views[name].grad = tensor

    @property
    def grads(self) -> Tensor:
        """Return the buffer of the gradients."""
        assert self.whole.grad is not None, "allocate_grads was not called"
        return self.whole.grad

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        self.grads.zero_()

    def clip_grads(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradients, whose L2 norm is `norm`, down to `max_norm`; smaller gradients stay as they are.

        As torch.nn.utils.clip_grad_norm_ does it, with 1e-6 added to the norm.
        """
        # Multiplied by 1 where nothing is to be clipped, since a branch would make the CPU wait for the norm.
        self.grads.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

    def split(self, buffer: Tensor, block: int = 1) -> dict[str, Tensor]:
        """Return the part of each parameter of `buffer` (..., numel / block), by name and in the order of `shapes`.

        With `block` 1 the parts have the shapes of the parameters, else they have a number for each block of elements.
        """
        parts = {}
        for name, shape in self.shapes.items():
            start, count = self.start[name] // block, math.prod(shape) // block
            part = buffer[..., start : start + count]
            parts[name] = part.view(*buffer.shape[:-1], *shape) if block == 1 else part
        return parts

    def join(self, parts: Mapping[str, Tensor], block: int = 1) -> Tensor:
        """Return the buffer whose parts `split` returned, as a new tensor."""
        rows = []
        for name in self.start:
            part = parts[name]
            leading = part.shape[: part.ndim - (len(self.shapes[name]) if block == 1 else 1)]
            rows.append(part.reshape(*leading, -1))
        return torch.cat(rows, dim=-1)

    def has_blocks(self, block: int, least: int) -> bool:
        """Return whether every parameter consists of whole blocks of `block` elements, and of at least `least`."""
        numels = [math.prod(shape) for shape in self.shapes.values()]
        return all(numel % block == 0 and numel >= least for numel in numels)
