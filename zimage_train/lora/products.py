"""The matrix products of a transformer block: frozen linear layers with the same input, together with their LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from zimage_train.lora.layers import ADAPTER_NAME, TrainedLinear
from zimage_train.models import fp8
from zimage_train.models.linear import FrozenLinear


@dataclass(frozen=True)
class Product:
    """Frozen linear layers with the same input and, for those that have one, a LoRA."""

    layers: list[FrozenLinear]
    ranks: list[int]
    """0: no LoRA."""
    scales: list[float]
    a_start: int
    """Index of the first element of the A of all layers, which follow each other, in the factors of the block."""
    b_starts: list[int]

    @cached_property
    def is_fp8(self) -> bool:
        """Return whether the frozen weights are multiplied in fp8."""
        return self.layers[0].kind == "fp8_fast"

    @cached_property
    def rank(self) -> int:
        return sum(self.ranks)

    @cached_property
    def columns(self) -> list[slice]:
        """The columns of each layer in the input of every B."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for rank, end in zip(self.ranks, ends, strict=True)]

    def a(self, factors: Tensor) -> Tensor:
        """Return the A of all layers (sum of ranks, in), as a view of the block's factors or of their gradients."""
        width = self.layers[0].in_features
        return factors[self.a_start : self.a_start + self.rank * width].view(self.rank, width)

    def b(self, factors: Tensor, index: int) -> Tensor:
        """Return the B of a layer (out, rank), as a view of the block's factors or of their gradients."""
        height, rank, start = self.layers[index].out_features, self.ranks[index], self.b_starts[index]
        return factors[start : start + height * rank].view(height, rank)

    def forward(self, x: Tensor, factors: Tensor, outputs: list[Tensor], inner: Tensor | None) -> None:
        """Compute the `outputs` of the layers (b, t, out), and `inner` (b * t, sum of ranks), the input of every B."""
        rows = x.flatten(0, -2)
        rows_fp8 = fp8.scaled_rows(rows) if self.is_fp8 else None
        if inner is not None:
            torch.mm(rows, self.a(factors).T, out=inner)
        for index, (layer, output) in enumerate(zip(self.layers, outputs, strict=True)):
            y = output.flatten(0, -2)
            if rows_fp8 is not None:
                assert layer.scales is not None
                fp8.multiply(rows_fp8, layer.weight, layer.scales, y)
            else:
                torch.mm(rows, layer.dense(x.dtype).T, out=y)
            if inner is not None and self.ranks[index]:
                b = self.b(factors, index)
                # In place, so that the LoRA's share of the output is never a tensor of its own.
                y.addmm_(inner[:, self.columns[index]], b.T, alpha=self.scales[index])

    def backward(
        self, grads: list[Tensor], x: Tensor, inner: Tensor | None, factors: Tensor, out: Tensor, needs_x: bool = True
    ) -> Tensor | None:
        """Return the gradient of x, and write those of the factors into `out`, which is laid out as they are."""
        rows, grad_rows = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        grad_x = grad_inner = None
        if inner is not None:
            grad_inner = torch.empty_like(inner)
            for index, grad in enumerate(grad_rows):
                if not self.ranks[index]:
                    continue
                columns, scale, b = self.columns[index], self.scales[index], self.b(factors, index)
                _scaled_product(grad, b, scale, grad_inner[:, columns])
                _scaled_product(grad.T, inner[:, columns], scale, self.b(out, index))
            torch.mm(grad_inner.T, rows, out=self.a(out))
            if needs_x and not self.is_fp8:
                grad_x = grad_inner @ self.a(factors)
        if not needs_x:
            return None
        if self.is_fp8:
            grad_x = self._through_fp8(grad_rows, rows)
            if grad_inner is not None:
                grad_x.addmm_(grad_inner, self.a(factors))
            return grad_x.view(x.shape)
        for grad, layer in zip(grad_rows, self.layers, strict=True):
            weight = layer.dense(grad.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        assert grad_x is not None
        return grad_x.view(x.shape)

    def _through_fp8(self, grads: list[Tensor], rows: Tensor) -> Tensor:
        """Return what reaches x, which is like `rows`, through the frozen weights alone."""
        through = None
        for grad, layer in zip(grads, self.layers, strict=True):
            assert layer.scales is not None
            part = torch.empty_like(rows)  # a product in fp8 cannot be added to what is there
            fp8.multiply_backward(fp8.scaled_rows(grad), layer.weight, layer.scales, part, layer.scratch)
            through = part if through is None else through.add_(part)
        assert through is not None
        return through


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """Write `scale * left @ right` into `out`, as one kernel."""
    torch.addmm(out, left, right, beta=0.0, alpha=scale, out=out)


def find_product(name: str, block: nn.Module, group: tuple[str, ...], starts: Mapping[str, int], begin: int) -> Product:
    """Return the layers `group` of a block, whose names in the model begin with `name`.

    Args:
        starts: factor -> index of its first element among those of the model.
        begin: that of the first factor of the block.
    """
    layers, ranks, scales, a_starts, b_starts = [], [], [], [], []
    for leaf in group:
        layer = block.get_submodule(leaf)
        if isinstance(layer, TrainedLinear):
            layers.append(layer.get_base_layer())
            ranks.append(layer.r[ADAPTER_NAME])
            scales.append(layer.scaling[ADAPTER_NAME])
            a_starts.append(starts[f"{name}{leaf}.A"] - begin)
            b_starts.append(starts[f"{name}{leaf}.B"] - begin)
        else:
            layers.append(layer)
            ranks.append(0)
            scales.append(0.0)
            b_starts.append(0)
    return Product(layers, ranks, scales, min(a_starts, default=0), b_starts)
