"""LoRA layers on plain frozen layers, against float64 arithmetic and exact expectations."""

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.errors import WeightsError
from zimage_train.lora import layers
from zimage_train.lora.adapters import attach_adapter
from zimage_train.lora.deltas import Factors, Kronecker
from zimage_train.lora.layers import LoraLayers, TrainedLinear
from zimage_train.lora.starts import zero_start
from zimage_train.models.linear import FrozenLinear
from zimage_train.rng import keyed_generator

Q, K, V = (f"layers.0.attention.to_{letter}" for letter in "qkv")
W1, W2, ADALN = "layers.1.feed_forward.w1", "layers.1.feed_forward.w2", "layers.1.adaLN_modulation"
SIZES = {Q: (8, 12), K: (10, 12), V: (14, 12), W1: (16, 12), W2: (12, 16), ADALN: (6, 12), "final": (4, 12)}
draw = torch.Generator().manual_seed(0)


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=draw)


def frozen_model() -> nn.Module:
    model = nn.Module()
    for name, (outputs, inputs) in SIZES.items():
        parent, *path = model, *name.split(".")
        for part in path[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = FrozenLinear(inputs, outputs, torch.float32, None).to_empty(device="cpu")
        layer.weight.data.copy_(random(outputs, inputs))
        parent.add_module(path[-1], layer)
    return model


def attached(modules: Iterable[str] = (Q, K), **settings: object) -> tuple[nn.Module, LoraLayers]:
    """A model with a LoRA that is not zero."""
    model = frozen_model()
    lora = layers.attach_lora(
        model, LoraSettings.model_validate({"rank": 3, "alpha": 1.5} | settings), list(modules), 7
    )
    for b in lora.b.values():
        b.data.add_(random(*b.shape))
    return model, lora


def layer_of(model: nn.Module, name: str) -> TrainedLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, TrainedLinear)
    return layer


def base_and_inner(model: nn.Module, lora: LoraLayers, x: Tensor) -> tuple[Tensor, Tensor]:
    """x W' and x A' of Q, in float64."""
    return x.double() @ layers.base_layer(model, Q).weight.double().T, x.double() @ lora.a[Q].detach().double().T


# Order in memory


def test_order_in_memory():
    """The A of a product follow each other, then their B, by block; what is in no product comes after its block's."""
    modules = [V, "final", ADALN, Q, W2, W1]
    groups = [group for group in layers.product_groups(modules) if group]
    assert groups == [[Q, V], ["final"], [W1], [W2], [ADALN]]
    order = [f"{Q}.A", f"{V}.A", f"{Q}.B", f"{V}.B"]
    order += [f"{name}.{part}" for name, part in itertools.product(("final", W1, W2, ADALN), "AB")]
    assert layers.memory_order(modules) == order
    _, lora = attached(modules)
    assert list(lora.flat.start) == order and lora.modules == modules


def test_state_has_every_a_first():
    _, lora = attached((K, Q))
    assert list(lora.state()) == [f"lora.{name}.{part}" for part, name in itertools.product("AB", (K, Q))]
    assert [len(parameter) for parameter in lora.parameters()] == [3, 10, 3, 8]
    named = lora.name_views(torch.arange(lora.flat.numel))
    assert list(named) == list(lora.state())
    starts = lora.flat.start
    assert {name: int(view.flatten()[0]) for name, view in named.items()} == {f"lora.{n}": starts[n] for n in starts}


# Start


def test_start_by_name_and_pattern():
    """Ranks, scales and starts are those of each module, whichever others have a LoRA."""
    model, lora = attached((Q, K, V), ranks={Q: 5, K: 2}, dropout=0.25, rank_dropout=0.5, module_dropout=0.125)
    assert {name: len(a) for name, a in lora.a.items()} == {Q: 5, K: 2, V: 3}
    assert lora.scales == {Q: 1.5 / 5, K: 1.5 / 2, V: 1.5 / 3} and not lora.cancels
    for name, a in lora.a.items():
        expected, b = torch.empty_like(a), torch.empty_like(lora.b[name])
        with torch.no_grad():
            zero_start(expected, b, keyed_generator(7, "lora", name))
        layer = layer_of(model, name)
        assert torch.equal(a, expected) and a.grad is not None and not a.grad.any()
        assert layer.lora_A["default"].weight is a and layer.lora_B["default"].weight is lora.b[name]
        assert layer.scaling["default"] == lora.scales[name] and layer.lora_dropout["default"].p == 0.25
        assert (layer.rank_dropout, layer.module_dropout) == (0.5, 0.125)
    assert attached(start="orthogonal", rank=4)[1].cancels
    for less in ({K: 2}, {K: 5}):
        assert {name: len(a) for name, a in attached((Q, K, V), ranks=less)[1].a.items()} == {Q: 3, V: 3} | less


def test_name_that_ends_alike():
    """A module whose name another ends with is refused, since peft would give both a LoRA."""
    model = frozen_model()
    model.add_module("to_q", FrozenLinear(12, 8, torch.float32, None).to_empty(device="cpu"))
    model.add_module("other", nn.ModuleDict({"to_q": FrozenLinear(12, 8, torch.float32, None).to_empty(device="cpu")}))
    with pytest.raises(WeightsError, match=r"layers\.0\.attention\.to_q: peft attached a LoRA where none"):
        layers.attach_lora(model, LoraSettings(rank=2), ["to_q", K], 1)


def test_fixed_loras():
    """Finished factors of several ranks and scales change the output as their deltas do."""
    lora = {Q: Factors(random(2, 12), random(8, 2), 0.5), V: Factors(random(4, 12), random(14, 4), -2.0)}
    model = frozen_model()
    fixed = layers.attach_fixed_lora(model, lora)
    x = random(5, 12)
    for name, factors in lora.items():
        expected = x.double() @ (layers.base_layer(model, name).weight.double() + dense(factors)).T
        assert torch.allclose(model.get_submodule(name)(x).double(), expected, atol=1e-4)
        delta = fixed.deltas()[name]
        assert isinstance(delta, Factors) and torch.equal(delta.a, factors.a), "the factors as they were"
        assert torch.allclose(delta.delta().double(), dense(factors), atol=1e-5)


def dense(factors: Factors) -> Tensor:
    return factors.scale * factors.b.detach().double() @ factors.a.detach().double()


# Forward


def test_forward_adds_the_change():
    model, lora = attached()
    x = random(2, 5, 12)
    base, inner = base_and_inner(model, lora, x)
    expected = base + 0.5 * inner @ lora.b[Q].detach().double().T
    for training in (True, False):
        assert torch.allclose(layer_of(model, Q).train(training)(x).double(), expected, atol=1e-4)
    assert torch.equal(model.get_submodule(V)(x), layers.base_layer(model, V)(x))
    assert not layer_of(model, Q).draws_masks


@pytest.mark.parametrize("inputs", [(2, 5, 12), (4, 12)])
@pytest.mark.parametrize(("ranks", "modules"), [(0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_masks_as_they_are_drawn(ranks: float, modules: float, inputs: tuple[int, ...]):
    """A mask of ranks for each sample is drawn, then one for the module; what is kept of ranks stands for all."""
    model, lora = attached(rank_dropout=ranks, module_dropout=modules)
    layer, x = layer_of(model, Q), random(*inputs)
    assert layer.draws_masks
    base, inner = base_and_inner(model, lora, x)
    outcomes = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found, state = layer(x), torch.get_rng_state()
        torch.manual_seed(seed)
        kept = torch.ones(())
        if ranks:
            kept = (torch.rand(len(x), *(1 for _ in inputs[1:-1]), 3) >= ranks).double() / (1.0 - ranks)
        is_on = torch.rand(()) >= modules if modules else torch.tensor(True)
        assert torch.equal(torch.get_rng_state(), state)
        expected = base + 0.5 * float(is_on) * (inner * kept) @ lora.b[Q].detach().double().T
        assert torch.allclose(found.double(), expected, atol=1e-4)
        outcomes.add(bool(is_on))
    assert outcomes == ({True, False} if modules else {True})
    plain = layer.eval()(x)
    assert torch.allclose(plain.double(), base + 0.5 * inner @ lora.b[Q].detach().double().T, atol=1e-4)


def test_input_dropout():
    """Dropout changes the input of the LoRA, and not that of the weight."""
    model, lora = attached(dropout=0.5)
    layer, x = layer_of(model, Q), random(3, 12)
    assert layer.draws_masks
    base, _ = base_and_inner(model, lora, x)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5).double()
    change = 0.5 * dropped @ lora.a[Q].detach().double().T @ lora.b[Q].detach().double().T
    assert torch.allclose(found.double(), base + change, atol=1e-4)


# Without it, and at another weight


def test_disabled_within_a_block():
    model, lora = attached()
    attach_adapter(model, LoraSettings(type="lokr", factor=2), [W1], 1).flat.whole.data.fill_(1.0)
    x = random(5, 12)
    names = (Q, K, W1)
    before = [model.get_submodule(name)(x) for name in names]
    with pytest.raises(RuntimeError, match="inside"), layers.without_lora(model):
        for name, output in zip(names, before, strict=True):
            assert torch.equal(model.get_submodule(name)(x), layers.base_layer(model, name)(x))
            assert not torch.equal(model.get_submodule(name)(x), output)
        assert lora.a[Q].requires_grad
        raise RuntimeError("inside")
    assert all(torch.equal(model.get_submodule(name)(x), output) for name, output in zip(names, before, strict=True))


def test_weight_within_a_block():
    """Changes of every kind are multiplied within the block, and come back after an error."""
    model, _ = attached()
    attach_adapter(model, LoraSettings(type="lokr", factor=2), [W1], 1).flat.whole.data.fill_(1.0)
    x, names = random(5, 12), (Q, K, W1)

    def changes() -> list[Tensor]:
        return [model.get_submodule(name)(x) - layers.base_layer(model, name)(x) for name in names]

    before = changes()
    with pytest.raises(RuntimeError, match="inside"), layers.lora_weight(model, -3.0):
        assert all(torch.allclose(found, -3.0 * one, atol=1e-4) for found, one in zip(changes(), before, strict=True))
        raise RuntimeError("inside")
    assert all(torch.equal(found, one) for found, one in zip(changes(), before, strict=True))


# States


def test_state_is_copied():
    _, lora = attached()
    other = {name: random(*tensor.shape) for name, tensor in lora.state().items()}
    lora.load_state(other, "here")
    assert all(torch.equal(tensor, other[name]) for name, tensor in lora.state().items())
    for name, factors in lora.deltas(other).items():
        assert isinstance(factors, Factors) and factors.scale == 0.5
        assert torch.equal(factors.a, other[f"lora.{name}.A"]) and torch.equal(factors.b, other[f"lora.{name}.B"])


def test_state_of_others_is_refused():
    """The first of the tensors that differ is named, with both shapes, and nothing is copied."""
    _, lora = attached()
    state = {name: torch.zeros_like(tensor) for name, tensor in lora.state().items()}
    own = {name: tensor.clone() for name, tensor in lora.state().items()}
    missing = {name: tensor for name, tensor in state.items() if not name.endswith(".B")}
    added = state | {"lora.x.A": torch.zeros(2, 5), "lora.w.A": torch.zeros(3, 4)}
    reshaped = state | {f"lora.{Q}.B": torch.zeros(8, 4), f"lora.{K}.B": torch.zeros(10, 5)}
    smaller = state | {f"lora.{K}.A": torch.zeros(2, 12)}
    for wrong, said in (
        (missing, rf"here: lora.{K}.B is missing in the checkpoint and \[10, 3\] in this run"),
        (added, r"here: lora.w.A is \[3, 4\] in the checkpoint and missing in this run"),
        (smaller, rf"here: lora.{K}.A is \[2, 12\] in the checkpoint and \[3, 12\] in this run"),
        (reshaped, rf"here: lora.{Q}.B is \[8, 4\] in the checkpoint and \[8, 3\] in this run"),
    ):
        with pytest.raises(WeightsError, match=said):
            lora.load_state(wrong, "here")
        assert all(torch.equal(tensor, own[name]) for name, tensor in lora.state().items())
    assert lora.fixed_state() == {}


def test_start_from_another_scale():
    """A LoRA of another scale is the start with the same change."""
    _, lora = attached()
    others = {name: Factors(random(3, 12), random(SIZES[name][0], 3), -4.0) for name in (Q, K)}
    expected = {name: dense(factors) for name, factors in others.items()}
    lora.initialize_from(others)
    for name, delta in lora.deltas().items():
        assert torch.allclose(delta.delta().double(), expected[name], atol=1e-4)
        assert torch.equal(lora.a[name], others[name].a)
    with pytest.raises(AssertionError):
        lora.initialize_from({Q: Kronecker((torch.ones(2, 3),), (torch.ones(4, 4),))})


# PiSSA


def test_start_that_is_subtracted():
    """PiSSA starts with the best approximation of the weight, which is subtracted from output and deltas."""
    model, plain = attached(rank=2, alpha=3.0)
    weights = {name: layers.base_layer(model, name).weight.detach().clone() for name in (Q, K)}
    lora = plain.subtract_weights(model, weights.__getitem__)
    x = random(5, 12)
    for name, weight in weights.items():
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        start = 1.5 * lora.b[name].detach().double() @ lora.a[name].detach().double()
        assert torch.allclose(start, u[:, :2] * s[:2] @ vh[:2], atol=1e-4)
        assert torch.allclose(model.get_submodule(name)(x), x @ weight.T, atol=1e-5)
    assert lora.cancels and lora.offsets.keys() == {Q, K} and not plain.offsets
    before = {name: dense(Factors(lora.a[name].clone(), lora.b[name].clone(), 1.5)) for name in weights}
    for view in lora.flat.views.values():
        view.data.add_(0.1 * random(*view.shape))
    state = {name: tensor.clone() for name, tensor in lora.state().items()}
    for found in (lora.deltas(), lora.deltas(state)):
        for name, weight in weights.items():
            change = dense(Factors(lora.a[name], lora.b[name], 1.5)) - before[name]
            assert found[name].rank == 4
            assert torch.allclose(found[name].delta().double(), change, atol=1e-4)
            assert torch.allclose(model.get_submodule(name)(x).double(), x.double() @ (weight + change).T, atol=1e-3)


def test_fixed_state_is_read_and_copied():
    model, plain = attached()
    lora = plain.subtract_weights(model, lambda name: layers.base_layer(model, name).weight)
    fixed = lora.fixed_state()
    assert list(fixed) == [f"fixed.{name}.{part}" for name, part in itertools.product((Q, K), "AB")]
    assert torch.equal(fixed[f"fixed.{Q}.A"], lora.a[Q]) and torch.equal(fixed[f"fixed.{Q}.B"], lora.b[Q])
    other = {name: random(*tensor.shape) for name, tensor in fixed.items()}
    lora.load_fixed_state(other)
    for name in (Q, K):
        offset = layer_of(model, name).offset
        assert offset is not None and torch.equal(offset[0], other[f"fixed.{name}.A"])
        assert torch.equal(offset[1], other[f"fixed.{name}.B"])


def test_orthogonal_start_is_reduced():
    """A start that cancels is exported with factors as small as the change, and is no change before training."""
    _, lora = attached(start="orthogonal", rank=4)
    for name in (Q, K):
        lora.b[name].data.mul_(0.01)
    for name, delta in lora.deltas().items():
        expected = dense(Factors(lora.a[name], lora.b[name], lora.scales[name]))
        assert torch.allclose(delta.delta().double(), expected, atol=1e-5)
        assert isinstance(delta, Factors) and torch.allclose(delta.b.T @ delta.b, delta.a @ delta.a.T, atol=1e-4), (
            "the factors have equal sizes"
        )
