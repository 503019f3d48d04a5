"""Kinds of adapters whose layers run as modules of their own, and finished deltas of any kind, for sampling.

Blocks with such layers are not fused. Each kind is a `TrainedModule` with its parameters and its forward.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora.deltas import (
    Delta,
    Deltas,
    DeltaSum,
    Dora,
    Factors,
    Hadamard,
    Kronecker,
    Rotation,
    cayley,
    row_norms,
)
from zimage_train.lora.kronecker import KroneckerTerm, replace_module
from zimage_train.lora.layers import AdapterLayers, product_groups
from zimage_train.lora.module_shapes import part_shapes
from zimage_train.models.linear import FrozenLinear
from zimage_train.optim.flat import FlatParameters
from zimage_train.rng import keyed_generator

Parts = Mapping[str, Tensor]
"""Part -> tensor, as `module_shapes.part_shapes` names them."""


class TrainedModule(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its trained parts."""

    def __init__(self, base: nn.Module, parts: Mapping[str, nn.Parameter], scale: float) -> None:
        super().__init__()
        self.base_layer = base
        self.parts = nn.ParameterDict(parts)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.get_base_layer()(x) if self.disable_adapters else self.changed(x)

    zeros: ClassVar[tuple[str, ...]]
    """The parts that begin at zero, so that a new adapter changes nothing."""

    @abstractmethod
    def changed(self, x: Tensor) -> Tensor:
        """Return the output for x with the change."""

    @staticmethod
    @abstractmethod
    def delta(parts: Parts, scale: float, norms: Tensor | None) -> Delta:
        """Return the delta of the trained `parts`, which shares memory with them.

        `norms` are those of the rows of the weight that it is used on, for kinds that need them.
        """

    @staticmethod
    @abstractmethod
    def parts_of(delta: Delta, scale: float, norms: Tensor | None) -> Parts:
        """Return the parts whose delta is `delta` at `scale`."""


class _HadamardFunction(torch.autograd.Function):
    """The change of a LoHa for x. The dense delta is formed again in the backward: kept, it would be a second model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(x, *matrices)
        ctx.scale = scale
        b1, a1, b2, a2 = (matrix.to(x.dtype) for matrix in matrices)
        return F.linear(x, (b1 @ a1).mul_(b2 @ a2).mul_(scale))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad,) = grad_outputs
        x, *matrices = ctx.saved_tensors
        b1, a1, b2, a2 = (matrix.to(x.dtype) for matrix in matrices)
        first, second = b1 @ a1, b2 @ a2
        grad_x = grad @ (first * second).mul_(ctx.scale) if ctx.needs_input_grad[0] else None
        dense = (grad.flatten(0, -2).T @ x.flatten(0, -2)).mul_(ctx.scale)
        through = second.mul_(dense)
        grads = [through @ a1.T, b1.T @ through]
        through = first.mul_(dense)
        grads += [through @ a2.T, b2.T @ through]
        casts = [one.to(matrix.dtype) for one, matrix in zip(grads, matrices, strict=True)]
        return grad_x, None, *casts


class HadamardLinear(TrainedModule):
    """A frozen linear layer and the LoHa that is trained beside it."""

    zeros = ("w2_b",)

    def changed(self, x: Tensor) -> Tensor:
        matrices = [self.parts[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
        return self.get_base_layer()(x) + _HadamardFunction.apply(x, self.scale, *matrices)

    @staticmethod
    def delta(parts: Parts, scale: float, norms: Tensor | None) -> Hadamard:
        return Hadamard((parts["w1_a"], parts["w1_b"]), (parts["w2_a"], parts["w2_b"]), scale)

    @staticmethod
    def parts_of(delta: Delta, scale: float, norms: Tensor | None) -> Parts:
        assert isinstance(delta, Hadamard)
        first = delta.w1[0].float() * (delta.scale / scale)
        return {"w1_a": first, "w1_b": delta.w1[1], "w2_a": delta.w2[0], "w2_b": delta.w2[1]}


class DoraLinear(TrainedModule):
    """A frozen linear layer and the DoRA that is trained beside it: (1 + gain) (W + B A), row by row.

    The gain is trained in place of the magnitude ||W|| (1 + gain), so that weight decay pulls towards no change, and
    W is not needed. A file has the magnitude for the weight that the adapter is used on, without the training adapter.
    """

    zeros = ("B", "gain")

    def changed(self, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        a, b = self.parts["A"], self.parts["B"]
        if isinstance(base, FrozenLinear):
            y = base.with_lora(x, a, b, self.scale)
        else:
            y = base(x) + self.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return y * (1.0 + self.parts["gain"]).to(x.dtype)

    @staticmethod
    def delta(parts: Parts, scale: float, norms: Tensor | None) -> Dora:
        assert norms is not None
        return Dora(Factors(parts["A"], parts["B"], scale), norms * (1.0 + parts["gain"].detach()))

    @staticmethod
    def parts_of(delta: Delta, scale: float, norms: Tensor | None) -> Parts:
        assert isinstance(delta, Dora) and norms is not None
        factors = delta.factors
        gain = delta.magnitude.to(norms.device) / norms - 1.0
        return {"A": factors.a, "B": factors.b.float() * (factors.scale / scale), "gain": gain}


class RotatedLinear(TrainedModule):
    """A frozen linear layer and the OFT that is trained behind it: each group of outputs is multiplied by a rotation.

    The parts above the diagonals of the skew-symmetric matrices are trained, (groups, rows (rows - 1) / 2).
    """

    zeros = ("above",)

    def changed(self, x: Tensor) -> Tensor:
        y, blocks = self.get_base_layer()(x), _from_above(self.parts["above"])
        return y + _turn(y, cayley(blocks - blocks.mT))

    @staticmethod
    def delta(parts: Parts, scale: float, norms: Tensor | None) -> Rotation:
        return Rotation(_from_above(parts["above"]))

    @staticmethod
    def parts_of(delta: Delta, scale: float, norms: Tensor | None) -> Parts:
        assert isinstance(delta, Rotation)
        blocks = delta.blocks.float()
        rows, columns = torch.triu_indices(blocks.shape[1], blocks.shape[1], 1, device=blocks.device)
        return {"above": (blocks - blocks.mT)[:, rows, columns]}


def _from_above(above: Tensor) -> Tensor:
    """Return matrices (groups, rows, rows) that are zero except above the diagonal, where they hold `above`."""
    size = (1 + math.isqrt(1 + 8 * above.shape[1])) // 2
    rows, columns = torch.triu_indices(size, size, 1, device=above.device)
    blocks = above.new_zeros(above.shape[0], size, size)
    blocks[:, rows, columns] = above
    return blocks


def _turn(y: Tensor, turns: Tensor) -> Tensor:
    """Return the change to outputs y (..., out) whose groups are each multiplied by I + `turns` (groups, rows, rows).

    The change alone, since in bf16 I + `turns` would be rounded to I where a rotation is small.
    """
    groups = y.unflatten(-1, turns.shape[:2])
    return torch.einsum("...gr,grs->...gs", groups, turns.to(y.dtype)).flatten(-2)


KINDS: dict[str, type[TrainedModule]] = {"loha": HadamardLinear, "dora": DoraLinear, "oft": RotatedLinear}
"""By `lora.type`."""


@dataclass(frozen=True)
class ModuleLayers(AdapterLayers):
    """The trainable parts of a model whose layers are `kind`."""

    scale: float
    """Factor on the change of every module."""
    kind: type[TrainedModule]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Module -> part -> shape."""
    norms: Mapping[str, Tensor]
    """Module -> norms of the rows of the weight that the adapter is used on; empty for kinds that need none."""

    @property
    def modules(self) -> list[str]:
        return list(self.shapes)

    def deltas(self, state: Mapping[str, Tensor] | None = None) -> Deltas:
        tensors = state or self.state()
        deltas: Deltas = {}
        for module, parts in self.shapes.items():
            trained = {part: tensors[f"lora.{module}.{part}"] for part in parts}
            deltas[module] = self.kind.delta(trained, self.scale, self.norms.get(module))
        return deltas

    @torch.no_grad()
    def initialize_from(self, deltas: Deltas) -> None:
        for module, delta in deltas.items():
            # This model multiplies by its own scale, so the quotient of the two keeps the delta as it is.
            for part, tensor in self.kind.parts_of(delta, self.scale, self.norms.get(module)).items():
                self.flat.views[f"{module}.{part}"].copy_(tensor)


def attach_modules(
    model: nn.Module, settings: LoraSettings, modules: list[str], seed: int, norms: Mapping[str, Tensor] | None
) -> ModuleLayers:
    """Attach a new adapter of `settings.type`: matrices uniform in +-1/sqrt(columns), or zero (`zeros`), in fp32.

    As peft initialises them. Each matrix is a function of the seed, the module and its own name alone.

    Args:
        norms: as `ModuleLayers.norms`; None takes those of the weights in the model.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    parts: dict[str, tuple[int, ...]] = {}
    for module in chain.from_iterable(product_groups(modules)):
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        shapes[module] = part_shapes(settings, layer.out_features, layer.in_features)
        parts |= {f"{module}.{part}": size for part, size in shapes[module].items()}
    device = cast(Tensor, model.get_submodule(modules[0]).weight).device
    flat, kind = FlatParameters(parts, list(parts), device), KINDS[settings.type]
    if norms is None and settings.needs_norms:
        norms = {module: row_norms(_dense(model.get_submodule(module))) for module in modules}
    for module in modules:
        views = {part: flat.views[f"{module}.{part}"] for part in shapes[module]}
        replace_module(model, module, kind(model.get_submodule(module), views, settings.scale))
        with torch.no_grad():
            for part in views.keys() - set(kind.zeros):
                view = views[part]
                draw = keyed_generator(seed, "lora", f"{module}.{part}")
                view.copy_((torch.rand(view.shape, generator=draw) * 2.0 - 1.0) / math.sqrt(view.shape[1]))
    flat.allocate_grads()
    moved = {module: tensor.to(device) for module, tensor in (norms or {}).items()}
    return ModuleLayers(flat, settings.scale, kind, {module: shapes[module] for module in modules}, moved)


def _dense(layer: nn.Module) -> Tensor:
    """Return the weight of a frozen layer, unpacked if it is quantised."""
    return layer.dense(torch.float32) if isinstance(layer, FrozenLinear) else cast(Tensor, layer.weight)


class FixedLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer and finished deltas beside it, for sampling: of any kinds, at most one of them a LoRA."""

    def __init__(self, base: nn.Module, delta: Delta, device: torch.device) -> None:
        super().__init__()
        self.base_layer = base
        self._lora: Factors | None = None
        self._kronecker: list[KroneckerTerm] = []
        self._hadamard: list[Hadamard] = []
        self._of_output: list[Dora | Rotation] = []
        for part in delta.parts if isinstance(delta, DeltaSum) else (delta,):
            if isinstance(part, Factors):
                self._lora = Factors(part.a.to(device), part.b.to(device).float() * part.scale, 1.0)
            elif isinstance(part, Kronecker):
                w1, w2 = part.whole
                self._kronecker.append(KroneckerTerm({"w1": w1.to(device), "w2": w2.to(device)}, part.scale))
            elif isinstance(part, Dora):
                factors = Factors(part.factors.a.to(device), part.factors.b.to(device), part.factors.scale)
                self._of_output.append(Dora(factors, part.magnitude.to(device), part.strength))
            elif isinstance(part, Rotation):
                self._of_output.append(Rotation(part.blocks.to(device), part.strength))
            else:
                assert isinstance(part, Hadamard)
                (b1, a1), (b2, a2) = part.w1, part.w2
                moved = Hadamard((b1.to(device), a1.to(device)), (b2.to(device), a2.to(device)), part.scale)
                self._hadamard.append(moved)

    def forward(self, x: Tensor) -> Tensor:
        base, lora = self.get_base_layer(), self._lora
        if self.disable_adapters or lora is None:
            y = base(x)
        elif isinstance(base, FrozenLinear):
            y = base.with_lora(x, lora.a, lora.b, 1.0)
        else:
            y = base(x) + F.linear(F.linear(x, lora.a.to(x.dtype)), lora.b.to(x.dtype))
        if self.disable_adapters:
            return y
        for change in self._of_output:
            # The frozen output once more: `y` may have a LoRA in it, and later kinds add to it in place.
            frozen = y if lora is None and len(self._of_output) == 1 else base(x)
            y = y + (self._change_by(change, x, frozen) if isinstance(change, Dora) else _turn(frozen, change.turns))
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        for term in self._kronecker:
            cast = KroneckerTerm({name: part.to(x.dtype) for name, part in term.parts.items()}, term.scale)
            cast.add(rows, y.view(-1, y.shape[-1]))
        for hadamard in self._hadamard:
            (b1, a1), (b2, a2) = hadamard.w1, hadamard.w2
            y = y + _HadamardFunction.apply(x, hadamard.scale, b1, a1, b2, a2)
        return y

    def _change_by(self, dora: Dora, x: Tensor, y: Tensor) -> Tensor:
        """Return the change of a DoRA to the frozen output y of x."""
        gain = dora.gain(_dense(self.get_base_layer())).squeeze(1).to(x.dtype)
        a, b = dora.factors.a.to(x.dtype), dora.factors.b.to(x.dtype)
        lora = dora.factors.scale * F.linear(F.linear(x, a), b)
        return dora.strength * ((gain - 1.0) * y + gain * lora)


def attach_fixed(model: nn.Module, deltas: Deltas) -> None:
    """Attach finished deltas of any kind to the model, for sampling."""
    device = next(model.parameters()).device
    for module, delta in deltas.items():
        replace_module(model, module, FixedLinear(model.get_submodule(module), delta, device))
