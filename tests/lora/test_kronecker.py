"""LoKrs on plain linear layers: how they begin, what they add and return, and how they start from others."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora.deltas import Factors, Kronecker
from zimage_train.lora.kronecker import KroneckerLayers, KroneckerLinear, attach_lokr
from zimage_train.rng import keyed_generator

WHOLE = LoraSettings(type="lokr", factor=2)
LOW_RANK = LoraSettings(type="lokr", factor=2, rank=3, alpha=1.5)
BOTH = pytest.mark.parametrize("lora", [WHOLE, LOW_RANK], ids=["whole", "low rank"])
SIZES = {"x": (40, 60), "y.z": (36, 48)}


def attached(
    lora: LoraSettings, modules: tuple[str, ...] = ("x", "y.z"), seed: int = 7
) -> tuple[nn.Module, KroneckerLayers]:
    torch.manual_seed(1)
    model = nn.Module()
    model.x, model.y = nn.Linear(60, 40, bias=False), nn.Module()
    model.y.z = nn.Linear(48, 36, bias=False)
    model.requires_grad_(False)
    return model, attach_lokr(model, lora, list(modules), seed)


def trained(layers: KroneckerLayers, module: str) -> Tensor:
    """The dense change of a module in float64, by einsum."""
    state = {name.removeprefix(f"lora.{module}."): tensor.double() for name, tensor in layers.state().items()}
    w2 = state["w2"] if "w2" in state else state["w2_a"] @ state["w2_b"]
    return layers.scale * torch.einsum("ij,pq->ipjq", state["w1"], w2).reshape(SIZES[module])


@BOTH
def test_start_of_every_matrix(lora: LoraSettings):
    """All matrices but the last are uniform in +-1/sqrt(columns), by the seed and their name alone."""
    model, layers = attached(lora)
    _, alone = attached(lora, ("y.z",))
    names = ("w1", "w2") if lora.rank is None else ("w1", "w2_a", "w2_b")
    assert layers.modules == ["x", "y.z"] and alone.modules == ["y.z"]
    assert list(layers.state()) == [f"lora.{module}.{name}" for module, name in itertools.product(("x", "y.z"), names)]
    for name, tensor in layers.state().items():
        if name.endswith(names[-1]):
            assert not tensor.any()
            continue
        draw = torch.rand(tensor.shape, generator=keyed_generator(7, "lora", name.removeprefix("lora.")))
        assert torch.allclose(tensor, (2 * draw - 1) / math.sqrt(tensor.shape[1]))
        assert name not in alone.state() or torch.equal(alone.state()[name], tensor)
    layer = model.get_submodule("y.z")
    assert isinstance(layer, KroneckerLinear) and layer.scale == layers.scale == lora.scale


@BOTH
def test_forward_and_gradients(lora: LoraSettings):
    """Output and gradients are those of the dense change, of any batch and of rows that do not lie in a row."""
    model, layers = attached(lora)
    layers.flat.whole.data.normal_(generator=torch.Generator().manual_seed(3))
    base = model.x.get_base_layer().weight.double()
    for shape, needs in (((2, 3, 60), True), ((5, 60), True), ((2, 3, 60), False)):
        x = torch.randn(shape).transpose(0, -2).requires_grad_(needs)
        leaves = {name: view.detach().double().requires_grad_() for name, view in layers.flat.views.items()}
        parts = {name.removeprefix("x."): leaf for name, leaf in leaves.items() if name.startswith("x.")}
        w2 = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
        change = layers.scale * torch.einsum("ij,pq->ipjq", parts["w1"], w2).reshape(40, 60)
        x64 = x.detach().double().requires_grad_()
        expected = x64 @ (base + change).T
        y = model.x(x)
        assert torch.allclose(y.double(), expected, atol=1e-4)
        grad = torch.randn(y.transpose(0, -1).shape).transpose(0, -1)
        expected.backward(grad.double())
        layers.flat.zero_grad()
        y.backward(grad)
        for name, leaf in parts.items():
            found = layers.flat.views[f"x.{name}"].grad
            assert found is not None and torch.allclose(found.double(), leaf.grad, rtol=1e-4, atol=1e-3), name
        assert (x.grad is None) == (not needs)
        if needs:
            assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-3)


@BOTH
def test_deltas_and_start_from_others(lora: LoraSettings):
    """A LoKr of another scale is the start with the same change, and `deltas` returns that."""
    _, layers = attached(lora)
    draw = torch.Generator().manual_seed(4)
    layers.flat.whole.data.normal_(generator=draw)
    for module, delta in layers.deltas().items():
        assert delta.rank == (lora.rank or 0)
        assert torch.allclose(delta.delta().double(), trained(layers, module), atol=1e-5)
    own = {name: tensor.clone() for name, tensor in layers.state().items()}
    others = {
        module: Kronecker(delta.w1, tuple(torch.randn(part.shape, generator=draw) for part in delta.w2), 5.0)
        for module, delta in layers.deltas().items()
    }
    expected = {module: delta.delta().double() for module, delta in others.items()}
    layers.initialize_from(others)
    for module in others:
        assert torch.allclose(trained(layers, module), expected[module], atol=1e-4)
    before = layers.deltas(own)["x"]
    assert torch.equal(before.w1[0], own["lora.x.w1"])
    with pytest.raises(AssertionError):
        layers.initialize_from({"x": Factors(torch.zeros(1, 60), torch.zeros(40, 1), 1.0)})


def test_one_module_alone():
    model, layers = attached(WHOLE, ("x",))
    assert torch.equal(model.x(torch.ones(1, 60)), model.x.get_base_layer()(torch.ones(1, 60)))
    model.x._disable_adapters = True
    layers.flat.whole.data.fill_(1.0)
    assert torch.equal(model.x(torch.ones(1, 60)), model.x.get_base_layer()(torch.ones(1, 60)))
