"""The matrix products of a transformer block: frozen linear layers with the same input, together with their adapter."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from zimage_train.lora.kronecker import KroneckerLinear, KroneckerTerm
from zimage_train.lora.layers import ADAPTER_NAME, TrainedLinear
from zimage_train.models import fp8
from zimage_train.models.linear import FrozenLinear


@dataclass(frozen=True)
class Product(ABC):
    """Frozen linear layers with the same input, and what is trained beside them."""

    layers: list[FrozenLinear]

    @cached_property
    def is_fp8(self) -> bool:
        """Return whether the frozen weights are multiplied in fp8."""
        return self.layers[0].kind == "fp8_fast"

    @property
    @abstractmethod
    def rank(self) -> int:
        """The width of what the forward keeps for the backward, per token, beside x; 0: nothing."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """The number of values that are trained."""

    @abstractmethod
    def forward(self, x: Tensor, factors: Tensor, outputs: list[Tensor], inner: Tensor | None) -> None:
        """Compute the `outputs` of the layers (b, t, out), and `inner` (b * t, rank), which the backward needs.

        Args:
            factors: what is trained in the block, as a single tensor in the dtype of x.
        """

    @abstractmethod
    def backward(
        self, grads: list[Tensor], x: Tensor, inner: Tensor | None, factors: Tensor, out: Tensor, needs_x: bool = True
    ) -> Tensor | None:
        """Return the gradient of x, and write those of the factors into `out`, which is laid out as they are."""

    def _multiply(self, rows: Tensor, outputs: list[Tensor]) -> None:
        """Write the products of the frozen weights with the rows of x into `outputs` (b * t, out)."""
        rows_fp8 = fp8.scaled_rows(rows) if self.is_fp8 else None
        for layer, y in zip(self.layers, outputs, strict=True):
            if rows_fp8 is not None:
                assert layer.scales is not None
                fp8.multiply(rows_fp8, layer.weight, layer.scales, y)
            else:
                torch.mm(rows, layer.dense(rows.dtype).T, out=y)

    def _multiply_backward(self, grads: list[Tensor], rows: Tensor, added: Tensor | None) -> Tensor:
        """Return what reaches the rows of x through the frozen weights, with `added`, which may be overwritten."""
        if self.is_fp8:
            through = self._through_fp8(grads, rows)
            return through if added is None else through.add_(added)
        for grad, layer in zip(grads, self.layers, strict=True):
            weight = layer.dense(grad.dtype)
            added = grad @ weight if added is None else added.addmm_(grad, weight)
        assert added is not None
        return added

    def _through_fp8(self, grads: list[Tensor], rows: Tensor) -> Tensor:
        through = None
        for grad, layer in zip(grads, self.layers, strict=True):
            assert layer.scales is not None
            part = torch.empty_like(rows)  # a product in fp8 cannot be added to what is there
            fp8.multiply_backward(fp8.scaled_rows(grad), layer.weight, layer.scales, part, layer.scratch)
            through = part if through is None else through.add_(part)
        assert through is not None
        return through


@dataclass(frozen=True)
class LoraProduct(Product):
    """Layers of which some have a LoRA, and maybe none."""

    ranks: list[int]
    """0: no LoRA."""
    loras: list[TrainedLinear | None]
    a_start: int
    """Index of the first element of the A of all layers, which follow each other, in the factors of the block."""
    b_starts: list[int]
    offset: tuple[list[Tensor], list[Tensor]] | None = None
    """Fixed A and B of each layer, whose products are subtracted, in the dtype of x; they lie where the layers have
    them. None: there is nothing to subtract."""

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def scales(self) -> list[float]:
        """The scales of the layers' LoRAs at this moment, which `layers.lora_weight` changes."""
        return [0.0 if lora is None else lora.scaling[ADAPTER_NAME] for lora in self.loras]

    @property
    def numel(self) -> int:
        outputs = sum(layer.out_features * rank for layer, rank in zip(self.layers, self.ranks, strict=True))
        return self.rank * self.layers[0].in_features + outputs

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
        rows, results = x.flatten(0, -2), [output.flatten(0, -2) for output in outputs]
        if inner is not None:  # the input of every B
            torch.mm(rows, self.a(factors).T, out=inner)
        self._multiply(rows, results)
        if inner is None:
            return
        fixed = None if self.offset is None else (rows @ torch.cat(self.offset[0]).T, self.offset[1])
        scales = self.scales
        for index, y in enumerate(results):
            if self.ranks[index]:
                b = self.b(factors, index)
                if fixed is not None:
                    # One product, which sums in fp32: the two nearly cancel.
                    columns, (fixed_inner, fixed_b) = self.columns[index], fixed
                    both = torch.cat([inner[:, columns], fixed_inner[:, columns]], dim=1)
                    y.addmm_(both, torch.cat([b, -fixed_b[index]], dim=1).T, alpha=scales[index])
                    continue
                # In place, so that the LoRA's share of the output is never a tensor of its own.
                y.addmm_(inner[:, self.columns[index]], b.T, alpha=scales[index])

    def backward(
        self, grads: list[Tensor], x: Tensor, inner: Tensor | None, factors: Tensor, out: Tensor, needs_x: bool = True
    ) -> Tensor | None:
        rows, grad_rows = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        grad_x = grad_inner = None
        if inner is not None:
            grad_inner, scales = torch.empty_like(inner), self.scales
            for index, grad in enumerate(grad_rows):
                if not self.ranks[index]:
                    continue
                columns, scale, b = self.columns[index], scales[index], self.b(factors, index)
                _scaled_product(grad, b, scale, grad_inner[:, columns])
                _scaled_product(grad.T, inner[:, columns], scale, self.b(out, index))
            torch.mm(grad_inner.T, rows, out=self.a(out))
        if not needs_x:
            return None
        a = self.a(factors)
        if self.offset is not None and grad_inner is not None:
            a = torch.cat([a, *self.offset[0]])
            fixed_grad = self._grad_of_fixed_inner(grad_rows, torch.empty_like(grad_inner))
            grad_inner = torch.cat([grad_inner, fixed_grad], dim=1)
        if grad_inner is not None and not self.is_fp8:
            grad_x = grad_inner @ a
        grad_x = self._multiply_backward(grad_rows, rows, grad_x)
        if grad_inner is not None and self.is_fp8:
            grad_x.addmm_(grad_inner, a)
        return grad_x.view(x.shape)

    def _grad_of_fixed_inner(self, grads: list[Tensor], out: Tensor) -> Tensor:
        assert self.offset is not None
        for index, grad in enumerate(grads):
            if self.ranks[index]:
                _scaled_product(grad, self.offset[1][index], -self.scales[index], out[:, self.columns[index]])
        return out


@dataclass(frozen=True)
class KroneckerProduct(Product):
    """Layers of which some have a LoKr, and at least one."""

    terms: list[KroneckerLinear | None]
    starts: list[dict[str, int]]
    """Part of the LoKr of each layer -> index of its first element in the factors of the block."""

    @property
    def rank(self) -> int:
        return 0  # what its two products have between them is as large as the output, and is formed again

    @property
    def numel(self) -> int:
        count = 0
        for term in self.terms:
            if term is not None:
                count += sum(part.numel() for part in term.parts.values())
        return count

    def forward(self, x: Tensor, factors: Tensor, outputs: list[Tensor], inner: Tensor | None) -> None:
        rows, results = x.flatten(0, -2), [output.flatten(0, -2) for output in outputs]
        self._multiply(rows, results)
        for index, y in enumerate(results):
            term = self._term(index, factors)
            if term is not None:
                term.add(rows, y)

    def backward(
        self, grads: list[Tensor], x: Tensor, inner: Tensor | None, factors: Tensor, out: Tensor, needs_x: bool = True
    ) -> Tensor | None:
        rows, grad_rows = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        grad_x = self._multiply_backward(grad_rows, rows, None) if needs_x else None
        for index, grad in enumerate(grad_rows):
            term, term_grads = self._term(index, factors), self._term(index, out)
            if term is not None and term_grads is not None:
                term.backward(rows, grad, term_grads, grad_x)
        return None if grad_x is None else grad_x.view(x.shape)

    def _term(self, index: int, factors: Tensor) -> KroneckerTerm | None:
        """Return the LoKr of a layer, whose matrices are views of the block's factors or of their gradients."""
        layer = self.terms[index]
        if layer is None:
            return None
        parts: dict[str, Tensor] = {}
        for name, start in self.starts[index].items():
            part = layer.parts[name]
            parts[name] = factors[start : start + part.numel()].view(part.shape)
        return KroneckerTerm(parts, layer.scale)


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """Write `scale * left @ right` into `out`, as one kernel."""
    torch.addmm(out, left, right, beta=0.0, alpha=scale, out=out)


def find_product(name: str, block: nn.Module, group: tuple[str, ...], starts: Mapping[str, int], begin: int) -> Product:
    """Return the layers `group` of a block, whose names in the model begin with `name`.

    Args:
        starts: factor -> index of its first element among those of the model.
        begin: that of the first factor of the block.
    """
    found = {leaf: block.get_submodule(leaf) for leaf in group}
    if any(isinstance(layer, KroneckerLinear) for layer in found.values()):
        return _kronecker_product(name, found, starts, begin)
    layers, ranks, loras, a_starts, b_starts = [], [], [], [], []
    fixed_a: list[Tensor] = []
    fixed_b: list[Tensor] = []
    for leaf, layer in found.items():
        if isinstance(layer, TrainedLinear):
            layers.append(layer.get_base_layer())
            ranks.append(layer.r[ADAPTER_NAME])
            loras.append(layer)
            a_starts.append(starts[f"{name}{leaf}.A"] - begin)
            b_starts.append(starts[f"{name}{leaf}.B"] - begin)
            if layer.offset is not None:
                fixed_a.append(layer.offset[0])
                fixed_b.append(layer.offset[1])
        else:
            layers.append(layer)
            ranks.append(0)
            loras.append(None)
            b_starts.append(0)
            fixed_b.append(torch.empty(0))
    offset = (fixed_a, fixed_b) if fixed_a else None
    return LoraProduct(layers, ranks, loras, min(a_starts, default=0), b_starts, offset)


def _kronecker_product(
    name: str, found: Mapping[str, nn.Module], starts: Mapping[str, int], begin: int
) -> KroneckerProduct:
    layers: list[FrozenLinear] = []
    terms: list[KroneckerLinear | None] = []
    term_starts: list[dict[str, int]] = []
    for leaf, layer in found.items():
        term = layer if isinstance(layer, KroneckerLinear) else None
        frozen = layer if term is None else term.get_base_layer()
        assert isinstance(frozen, FrozenLinear)
        layers.append(frozen)
        terms.append(term)
        parts = () if term is None else term.parts
        term_starts.append({part: starts[f"{name}{leaf}.{part}"] - begin for part in parts})
    return KroneckerProduct(layers, terms, term_starts)
