"""The products of a block with the adapters beside them, against dense float64 arithmetic."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora import layers
from zimage_train.lora.adapters import attach_adapter
from zimage_train.lora.products import KroneckerProduct, LoraProduct, Product, find_product
from zimage_train.models.linear import FrozenLinear

QKV = ("attention.to_q", "attention.to_k", "attention.to_v")
OUTPUTS = {QKV[0]: 24, QKV[1]: 16, QKV[2]: 32}
IN = 48
NAME = "layers.3."
SUBSETS = list(itertools.chain.from_iterable(itertools.combinations(QKV, count) for count in range(4)))
LORA = LoraSettings(rank=4, alpha=6.0, ranks={"attention.to_k": 2, "attention.to_v": 5})
LOKR = LoraSettings(type="lokr", factor=2, rank=2, alpha=3.0)


def random(*size: int) -> Tensor:
    return 0.3 * torch.randn(size, generator=draw)


draw = torch.Generator().manual_seed(0)


class Case:
    """Three frozen layers of a block, some with an adapter, and another module whose factors come first."""

    def __init__(self, lora: LoraSettings, adapted: tuple[str, ...], kind=None, offset: bool = False) -> None:
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({"2": self.block(kind), "3": self.block(kind)})
        self.weights = {leaf: self.weight(leaf) for leaf in QKV}
        modules = ["layers.2.attention.to_q", *(NAME + leaf for leaf in adapted)]
        ranks = {NAME + leaf: rank for leaf, rank in lora.ranks.items() if leaf in adapted}
        self.attached = attach_adapter(self.model, lora.model_copy(update={"ranks": ranks}), modules, 1)
        if offset:
            assert isinstance(self.attached, layers.LoraLayers)
            self.attached = self.attached.subtract_weights(
                self.model, lambda name: self.weight(name.split(".", 2)[2], name.split(".")[1])
            )
        for view in self.attached.flat.views.values():
            view.data.add_(random(*view.shape))
        flat = self.attached.flat
        names = [name for name in flat.start if name.startswith(NAME)]
        self.begin = min((flat.start[name] for name in names), default=0)
        self.product = find_product(NAME, self.model.get_submodule("layers.3"), QKV, flat.start, self.begin)
        self.factors = flat.whole.detach()[self.begin : self.begin + self.product.numel]
        assert self.product.numel == sum(flat.views[name].numel() for name in names)

    @staticmethod
    def block(kind) -> nn.Module:
        block = nn.Module()
        block.attention = nn.Module()
        for leaf, outputs in OUTPUTS.items():
            layer = FrozenLinear(IN, outputs, torch.float32, kind).to_empty(device="cpu")
            for parameter, value in zip(layer.stored_parameters(), layer.pack(random(outputs, IN)), strict=True):
                parameter.data.copy_(value)
            setattr(block.attention, leaf.partition(".")[2], layer)
        return block

    def weight(self, leaf: str, block: str = "3") -> Tensor:
        layer = layers.base_layer(self.model, f"layers.{block}.{leaf}")
        assert isinstance(layer, FrozenLinear)
        return layer.dense(torch.float32)

    def leaves(self) -> dict[str, Tensor]:
        views = self.attached.flat.views
        return {name: view.detach().double().requires_grad_() for name, view in views.items() if name.startswith(NAME)}

    def dense(self, leaf: str, leaves: Mapping[str, Tensor]) -> Tensor:
        """The weight with its change in float64, from the matrices alone."""
        weight, module = self.weights[leaf].double(), NAME + leaf
        if f"{module}.A" in leaves:
            scale = self.attached.scales[module]
            offset = self.attached.offsets.get(module)
            fixed = 0.0 if offset is None else offset.b.double() @ offset.a.double()
            return weight + scale * (leaves[f"{module}.B"] @ leaves[f"{module}.A"] - fixed)
        if f"{module}.w1" in leaves:
            w2 = (
                leaves[f"{module}.w2_a"] @ leaves[f"{module}.w2_b"]
                if f"{module}.w2_a" in leaves
                else leaves[f"{module}.w2"]
            )
            change = torch.einsum("ij,pq->ipjq", leaves[f"{module}.w1"], w2)
            return weight + self.attached.scale * change.reshape(weight.shape)
        return weight


def run(
    case: Case, x: Tensor, grads: list[Tensor], needs_x: bool
) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor]]:
    """The outputs, the gradient of x and those of the factors, of memory in which something else was before."""
    product: Product = case.product
    outputs = [torch.full((*x.shape[:-1], outputs), 9.0) for outputs in OUTPUTS.values()]
    inner = torch.full((x.shape[0] * x.shape[1], product.rank), 9.0) if product.rank else None
    out = torch.full_like(case.factors, 9.0)
    product.forward(x, case.factors, outputs, inner)
    grad_x = product.backward(grads, x, inner, case.factors, out, needs_x)
    flat = case.attached.flat
    whole = torch.full_like(flat.whole.detach(), 7.0)
    whole[case.begin : case.begin + len(out)] = out
    return outputs, grad_x, {name: part for name, part in flat.split(whole).items() if name.startswith(NAME)}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.detach()).norm() / expected.detach().norm())


def check(case: Case, tolerance: float) -> None:
    """Compare everything with float64."""
    x, grads = random(2, 5, IN), [random(2, 5, outputs) for outputs in OUTPUTS.values()]
    leaves, x64 = case.leaves(), x.double().requires_grad_()
    expected = [x64 @ case.dense(leaf, leaves).T for leaf in QKV]
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for needs_x in (True, False):
        outputs, grad_x, found = run(case, x, grads, needs_x)
        assert all(relative(*pair) < tolerance for pair in zip(outputs, expected, strict=True))
        for name, leaf in leaves.items():
            assert relative(found[name], leaf.grad) < tolerance, name
        assert (grad_x is None) != needs_x
        assert grad_x is None or (grad_x.shape == x.shape and relative(grad_x, x64.grad) < tolerance)
    assert (
        case.product.backward(
            grads,
            x,
            torch.empty(10, case.product.rank) if case.product.rank else None,
            case.factors,
            torch.empty_like(case.factors),
        )
        is not None
    )


@pytest.mark.parametrize("adapted", SUBSETS, ids=len)
@pytest.mark.parametrize("lora", [LORA, LOKR], ids=["lora", "lokr"])
def test_product_of_some_layers(lora: LoraSettings, adapted: tuple[str, ...]):
    """Outputs and gradients are those of the dense weights, whichever layers have an adapter."""
    case = Case(lora, adapted)
    assert isinstance(case.product, KroneckerProduct if adapted and lora is LOKR else LoraProduct)
    ranks = [{QKV[0]: 4, QKV[1]: 2, QKV[2]: 5}[leaf] for leaf in adapted]
    assert case.product.rank == (sum(ranks) if lora is LORA else 0)
    check(case, 2e-6)


@pytest.mark.parametrize("adapted", SUBSETS[1:], ids=len)
def test_product_less_its_start(adapted: tuple[str, ...]):
    """What PiSSA subtracts is subtracted, for each layer what is its own."""
    check(Case(LORA, adapted, offset=True), 1e-5)


@pytest.mark.parametrize("lora", [LORA, LOKR], ids=["lora", "lokr"])
@pytest.mark.parametrize("adapted", [(), QKV[:1], QKV])
def test_product_in_fp8(lora: LoraSettings, adapted: tuple[str, ...]):
    """Products in fp8 are right to fp8's two digits."""
    case = Case(lora, adapted, "fp8_fast")
    assert case.product.is_fp8
    check(case, 0.1)
    assert not Case(lora, adapted, "int8").product.is_fp8


def test_scales_of_the_moment():
    """The weight of the LoRA within `lora_weight` counts in every layer."""
    case = Case(LORA, QKV[1:])
    assert isinstance(case.product, LoraProduct)
    assert case.product.scales == [0.0, 3.0, 1.2]
    x, grads = random(2, 5, IN), [random(2, 5, outputs) for outputs in OUTPUTS.values()]
    with layers.lora_weight(case.model, -2.0):
        assert case.product.scales == [0.0, -6.0, -2.4]
        outputs, _, _ = run(case, x, grads, True)
    leaves = case.leaves()
    for leaf, output in zip(QKV, outputs, strict=True):
        weight = case.weights[leaf].double()
        expected = x.double() @ (weight - 2.0 * (case.dense(leaf, leaves).detach() - weight)).T
        assert relative(output, expected) < 2e-6


@pytest.mark.parametrize("lora", [LORA, LOKR], ids=["lora", "lokr"])
def test_product_of_one_layer(lora: LoraSettings):
    """A layer that shares its input with no other has a product of its own."""
    case, x, grad = Case(lora, QKV[:1]), random(2, 5, IN), random(2, 5, 24)
    start = case.attached.flat.start
    alone = find_product(NAME, case.model.get_submodule("layers.3"), QKV[:1], start, case.begin)
    assert alone.numel == case.product.numel == sum(leaf.numel() for leaf in case.leaves().values())
    leaves, output = case.leaves(), torch.empty(2, 5, 24)
    inner = torch.empty(10, alone.rank) if alone.rank else None
    alone.forward(x, case.factors, [output], inner)
    assert relative(output, x.double() @ case.dense(QKV[0], leaves).T) < 2e-6
    grad_x = alone.backward([grad], x, inner, case.factors, torch.empty_like(case.factors))
    assert grad_x is not None and relative(grad_x, grad.double() @ case.dense(QKV[0], leaves)) < 2e-6
