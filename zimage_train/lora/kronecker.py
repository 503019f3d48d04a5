"""LoKr: the change of a weight (out, in) as scale * kron(W1, W2), which is never formed.

With out = l k and in = m n, a row x of the input is a matrix X (m, n), and its output is W1 X W2', a matrix (l, k). So
the change costs l m n + l n k multiplications a row instead of l k m n.

Reference: LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/lokr.py
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora.deltas import Deltas, Kronecker
from zimage_train.lora.kronecker_shapes import KroneckerShape, shapes_of
from zimage_train.lora.layers import AdapterLayers, product_groups
from zimage_train.optim.flat import FlatParameters
from zimage_train.rng import keyed_generator


@dataclass(frozen=True)
class KroneckerTerm:
    """The matrices of a LoKr by part (`KroneckerShape.parts`) in the dtype of the products, or their gradients."""

    parts: dict[str, Tensor]
    scale: float

    def factor(self, name: Literal["w1", "w2"]) -> Tensor:
        """Return W1 or W2 whole."""
        if name in self.parts:
            return self.parts[name]
        return self.parts[f"{name}_a"] @ self.parts[f"{name}_b"]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the change for the rows x (t, in) to y (..., out), in place."""
        w1, w2 = self.factor("w1"), self.factor("w2")
        # The sum is formed within the larger of the two products.
        y.view(-1, len(w2)).addmm_(_times_w1(w1, x).flatten(0, 1), w2.T, alpha=self.scale)

    def backward(self, x: Tensor, grad: Tensor, grads: "KroneckerTerm", grad_x: Tensor | None) -> None:
        """Write the gradients of the matrices into `grads`, and add that of the rows x to `grad_x`, in place.

        `grad` (..., out) and `grad_x` (..., in) may have more dimensions than x (t, in).

        What the forward had between its two products is formed again: it may be as large as x or the output.
        """
        w1, w2 = self.factor("w1"), self.factor("w2")
        rows = grad.view(-1, len(w2))
        grads._write("w2", (rows.T @ _times_w1(w1, x).flatten(0, 1)).mul_(self.scale), self)
        through = (rows @ w2).view(len(x), len(w1), -1)
        matrices = x.view(len(x), w1.shape[1], -1)
        # A small matrix for each row, and then their sum; as a single product, both sides would have to be laid out
        # anew, which moves more.
        grads._write("w1", torch.bmm(through, matrices.transpose(1, 2)).sum(0).mul_(self.scale), self)
        if grad_x is not None:
            grad_x.view(matrices.shape).baddbmm_(w1.T.expand(len(x), *w1.T.shape), through, alpha=self.scale)

    def _write(self, name: str, grad: Tensor, term: "KroneckerTerm") -> None:
        """Write `grad` of a whole factor of `term`, or what of it reaches the two whose product the factor is."""
        if name in self.parts:
            self.parts[name].copy_(grad)
            return
        torch.mm(grad, term.parts[f"{name}_b"].T, out=self.parts[f"{name}_a"])
        torch.mm(term.parts[f"{name}_a"].T, grad, out=self.parts[f"{name}_b"])


def _times_w1(w1: Tensor, x: Tensor) -> Tensor:
    """Return W1 X of each row x, (t, l, n). W1 is seen once for each row, without a copy."""
    return torch.bmm(w1.expand(len(x), *w1.shape), x.view(len(x), w1.shape[1], -1))


class _AddFunction(torch.autograd.Function):
    """y + the change for x; only x and the matrices are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, names: Sequence[str], scale: float, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(x, *matrices)
        ctx.names, ctx.scale = names, scale
        ctx.mark_dirty(y)
        term = KroneckerTerm(_cast(names, matrices, x.dtype), scale)
        term.add(x.flatten(0, -2).contiguous(), y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad,) = grad_outputs
        grad = grad.contiguous()
        x, *matrices = ctx.saved_tensors
        term = KroneckerTerm(_cast(ctx.names, matrices, x.dtype), ctx.scale)
        grads = KroneckerTerm({name: torch.empty_like(part) for name, part in term.parts.items()}, ctx.scale)
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        term.backward(x.flatten(0, -2).contiguous(), grad, grads, grad_x)
        casts = [grads.parts[name].to(matrix.dtype) for name, matrix in zip(ctx.names, matrices, strict=True)]
        return grad_x, grad, None, None, *casts


def _cast(names: Sequence[str], matrices: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: matrix.to(dtype) for name, matrix in zip(names, matrices, strict=True)}


class KroneckerLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer and the LoKr that is trained beside it."""

    def __init__(self, base: nn.Module, parts: Mapping[str, nn.Parameter], scale: float) -> None:
        super().__init__()
        self.base_layer = base
        self.parts = nn.ParameterDict(parts)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_base_layer()(x)
        if self.disable_adapters:
            return y
        names = sorted(self.parts)
        return _AddFunction.apply(x, y, names, self.scale, *(self.parts[name] for name in names))


@dataclass(frozen=True)
class KroneckerLayers(AdapterLayers):
    """The trainable LoKr of a model: W1 and W2 of each module, or the two matrices whose product W2 is."""

    scale: float
    shapes: Mapping[str, KroneckerShape]

    @property
    def modules(self) -> list[str]:
        return list(self.shapes)

    def deltas(self, state: Mapping[str, Tensor] | None = None) -> Deltas:
        tensors = state or self.state()
        deltas: Deltas = {}
        for module, shape in self.shapes.items():
            parts = {part: tensors[f"lora.{module}.{part}"] for part in shape.parts}
            second = (parts["w2"],) if shape.rank is None else (parts["w2_a"], parts["w2_b"])
            deltas[module] = Kronecker((parts["w1"],), second, self.scale)
        return deltas

    @torch.no_grad()
    def initialize_from(self, deltas: Deltas) -> None:
        for module, delta in deltas.items():
            assert isinstance(delta, Kronecker)
            w1, w2 = delta.whole
            views = {part: self.flat.views[f"{module}.{part}"] for part in self.shapes[module].parts}
            # This model multiplies by its own scale, so the quotient of the two keeps the delta as it is.
            views["w1"].copy_(w1 * (delta.scale / self.scale))
            if self.shapes[module].rank is None:
                views["w2"].copy_(w2)
            else:
                views["w2_a"].copy_(delta.w2[0])
                views["w2_b"].copy_(delta.w2[1])


def attach_lokr(model: nn.Module, settings: LoraSettings, modules: list[str], seed: int) -> KroneckerLayers:
    """Attach a new LoKr to `modules`: every matrix uniform in +-1/sqrt(columns) but the last, which is zero, all fp32.

    As LyCORIS initialises it. Each matrix is a function of the seed, the module and its own name alone.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for module in modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        sizes[module] = (layer.out_features, layer.in_features)
    shapes = shapes_of(settings, sizes, modules)
    parts: dict[str, tuple[int, int]] = {}
    for module, shape in shapes.items():
        parts |= {f"{module}.{part}": size for part, size in shape.parts.items()}
    order: list[str] = []
    for module in chain.from_iterable(product_groups(modules)):
        order += [f"{module}.{part}" for part in shapes[module].parts]
    device = cast(Tensor, model.get_submodule(modules[0]).weight).device
    flat = FlatParameters(parts, order, device)
    for module, shape in shapes.items():
        views = {part: flat.views[f"{module}.{part}"] for part in shape.parts}
        replace_module(model, module, KroneckerLinear(model.get_submodule(module), views, settings.scale))
        with torch.no_grad():
            for part, view in list(views.items())[:-1]:
                draw = keyed_generator(seed, "lora", f"{module}.{part}")
                view.copy_((torch.rand(view.shape, generator=draw) * 2.0 - 1.0) / math.sqrt(view.shape[1]))
    flat.allocate_grads()
    return KroneckerLayers(flat, settings.scale, shapes)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` into the model in place of the module `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
