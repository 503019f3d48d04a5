"""The matrices that a LoRA begins with."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.lora import arithmetic, fused_block, lora_file, targets
from zimage_train.lora.layers import LoraLayers, attach_lora, without_lora
from zimage_train.lora.starts import orthogonal_start
from zimage_train.models import checkpointing
from zimage_train.models.transformer import velocity
from zimage_train.rng import keyed_generator

from steps import CPU, gradients, unfused


@pytest.mark.parametrize("rank", [2, 8, 10])
def test_orthogonal_as_in_peft(monkeypatch: pytest.MonkeyPatch, rank: int):
    """With the same draws, peft begins with the same matrices."""
    original, draw = torch.randn, torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch, "randn", lambda *shape: original(*shape, generator=draw))
    model = nn.ModuleDict({"inner": nn.Linear(24, 16, bias=False)})
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["inner"], init_lora_weights="orthogonal"), model, "x")
    monkeypatch.undo()
    a, b = torch.empty(rank, 24), torch.empty(16, rank)
    orthogonal_start(a, b, torch.Generator().manual_seed(3))
    assert torch.allclose(a, model["inner"].lora_A["x"].weight, atol=1e-5)
    assert torch.allclose(b, model["inner"].lora_B["x"].weight, atol=1e-5)
    assert b.abs().max() > 0.01


def test_orthogonal_start_of_a_model():
    """B A is zero in each module, A and B are not, and depend on the seed and the module's name alone."""
    _, attached = unfused("none", groups=("feed_forward",), lora=LoraSettings(rank=4, start="orthogonal"))
    _, more = unfused("none", lora=LoraSettings(rank=4, ranks={"attention": 6}, start="orthogonal"))
    for module, a in attached.a.items():
        assert torch.equal(a, more.a[module])
    draw = keyed_generator(1, "lora", "layers.2.attention.to_k")
    a, b = torch.empty(6, 96), torch.empty(more.b["layers.2.attention.to_k"].shape)
    orthogonal_start(a, b, draw)
    assert torch.equal(a, more.a["layers.2.attention.to_k"])
    product, size = b.double() @ a.double(), b.double().norm() * a.double().norm()
    assert product.norm() < 1e-7 * size and size > 1
    gradient_of_a = b.T @ torch.ones(len(b), 96)
    assert gradient_of_a.abs().min() > 0, "A learns from the first step on"


def test_what_cancels_survives_bf16(tmp_path):
    """A small change on top of an orthogonal start is exported in bf16 as itself, not as what rounding leaves of it."""
    _, attached = unfused("none", lora=LoraSettings(rank=4, alpha=8.0, start="orthogonal"))
    draw = torch.Generator().manual_seed(7)
    exact = {}
    for module, a in attached.a.items():
        orthogonal_start(a.data, attached.b[module].data, draw)
        a.data.add_(1e-4 * torch.randn(a.shape, generator=draw))
        exact[module] = 2.0 * attached.b[module].detach().double() @ a.detach().double()
    path = tmp_path / "lora.safetensors"
    lora_file.export_lora(path, attached.deltas(), "bf16", {"format": "pt"})
    for module, factors in lora_file.read_lora(path).items():
        found = factors.scale * factors.b.double() @ factors.a.double()
        assert factors.rank == 4
        assert (found - exact[module]).norm() < 5e-3 * exact[module].norm()
        plain = attached.b[module].bfloat16().double() @ attached.a[module].bfloat16().double() * 2.0
        assert (plain - exact[module]).norm() > 0.3 * exact[module].norm(), "rounding A and B does lose it"


RANKS = {"attention": 6}
PISSA = LoraSettings(rank=4, ranks=RANKS, alpha=8.0, start="pissa")


def begun(mode: str, fused: bool, kind: str | None = None, streamed: int = 0, dtype: str = "fp32"):
    """The miniature with a LoRA that begins as the principal part of its weights."""
    frozen = load_frozen(mini.TURBO / "transformer", None, dtype, CPU, kind, streamed)
    modules = targets.select_modules(["attention", "feed_forward"], frozen.shape.linears)
    attached = attach_lora(frozen.model, PISSA, modules, 1).subtract_weights(frozen.model, frozen.dense_weight)
    by_tokens = checkpointing.checkpoint_by_tokens(lambda tokens: mode, False)
    if fused:
        fused_block.fuse_blocks(frozen.model, attached, frozen.offloader, lambda tokens: mode, by_tokens)
    elif mode != "none":
        frozen.model.enable_gradient_checkpointing(by_tokens)
    return frozen, attached


def perturb(attached: LoraLayers, size: float = 0.02) -> None:
    draw = torch.Generator().manual_seed(5)
    for view in attached.flat.views.values():
        view.data.add_(size * torch.randn(view.shape, generator=draw))


def test_pissa_as_in_peft():
    """After the same change of A and B, peft's layers on their residual weights have the same output; and at first."""
    ours, attached = begun("none", fused=False)
    theirs = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    pattern = {r".*attention\.to_.*": 6}
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern=pattern, target_modules=attached.modules, init_lora_weights="pissa"
    )
    inject_adapter_in_model(config, theirs.model, "default")
    x, draw = {}, torch.Generator().manual_seed(8)
    for changed in (False, True):
        for module in attached.modules:
            layer, other = ours.model.get_submodule(module), theirs.model.get_submodule(module)
            if changed:
                # Singular vectors have no sign of their own, so the change is made of the factors themselves.
                attached.a[module].data.mul_(1.1)
                other.lora_A["default"].weight.data.mul_(1.1)
            x = torch.randn(2, 3, layer.in_features, generator=draw)
            found, wanted = layer(x), other(x)
            assert (found - wanted).norm() < 1e-4 * wanted.norm()
            plain = layer.get_base_layer()(x)
            assert ((found - plain).norm() > 1e-3 * plain.norm()) == changed


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_pissa_fused_as_modules(mode: str, kind: str | None):
    """Fused blocks give the loss and the gradients of modules, also where weights are quantised."""
    fused, modules = begun(mode, fused=True, kind=kind), begun("none", fused=False, kind=kind)
    for _, attached in (fused, modules):
        perturb(attached)
    loss, *grads = gradients(*fused)
    wanted_loss, *wanted = gradients(*modules)
    assert torch.allclose(loss, wanted_loss, rtol=1e-5)
    for one, other in zip(grads, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() and other.norm() > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pissa_starts_at_the_model(fused: bool, dtype: str):
    """At step 0 the model predicts what it does without the LoRA, to the rounding of its dtype, and learns."""
    frozen, attached = begun("none", fused, dtype=dtype)
    found = gradients(frozen, attached)
    with without_lora(frozen.model), torch.no_grad():
        plain = gradients_of_nothing(frozen)
    assert torch.allclose(found[0], plain, rtol=1e-6 if dtype == "fp32" else 1e-2)
    assert all(grad.any() for grad in found[1:]), "A and B both learn from the first step on"
    for delta in attached.deltas().values():
        assert delta.norm() < 1e-7, "the start cancels to the last bit"


def gradients_of_nothing(frozen) -> torch.Tensor:
    """The loss that `gradients` has, without a backward."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 8, 8, generator=draw)
    prompts = [torch.randn(n, frozen.shape.cap_feat_dim, generator=draw).to(frozen.model.dtype) for n in (5, 40)]
    return velocity(frozen.model, x, torch.rand(2, generator=draw), prompts).square().mean()


def test_pissa_of_streamed_weights():
    """Streamed and quantised weights begin with the same factors as those on the device."""
    for kind in (None, "int8"):
        _, here = begun("full", fused=True, kind=kind)
        _, streamed = begun("full", fused=True, kind=kind, streamed=3)
        assert torch.equal(here.flat.whole, streamed.flat.whole) and here.flat.whole.any()
        fixed, other = here.fixed_state(), streamed.fixed_state()
        assert fixed.keys() == other.keys() and len(fixed) == 84
        assert all(torch.equal(fixed[name], other[name]) for name in fixed)


def test_pissa_exports_the_difference(tmp_path):
    """The file is the LoRA less its start, of twice the rank, in float64; also after rounding to bf16."""
    _, attached = begun("none", fused=False)
    before = {module: (a.detach().double(), attached.b[module].detach().double()) for module, a in attached.a.items()}
    before = {module: tuple(part.clone() for part in parts) for module, parts in before.items()}
    perturb(attached, 1e-3)
    path = tmp_path / "lora.safetensors"
    lora_file.export_lora(path, attached.deltas(), "bf16", {"format": "pt"})
    for module, factors in lora_file.read_lora(path).items():
        rank = 6 if "attention" in module else 4
        a0, b0 = before[module]
        wanted = 8.0 / rank * (attached.b[module].double() @ attached.a[module].double() - b0 @ a0)
        found = factors.scale * factors.b.double() @ factors.a.double()
        assert factors.rank == 2 * rank
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


def test_pissa_keeps_its_fixed_factors(monkeypatch: pytest.MonkeyPatch):
    """A run that is continued has the fixed factors of its checkpoint, whatever another machine would decompose."""
    _, first = begun("none", fused=False)
    perturb(first)
    saved = {name: tensor.clone() for name, tensor in (first.state() | first.fixed_state()).items()}
    original = arithmetic.factorize
    monkeypatch.setattr(arithmetic, "factorize", lambda weight, *rest: original(weight.flip(0) * 0.5, *rest))
    frozen, second = begun("full", fused=True)
    second.load_state({name: tensor for name, tensor in saved.items() if name.startswith("lora.")}, "here")
    assert any(first.deltas()[module].distance(delta) > 0.1 for module, delta in second.deltas().items())
    second.load_fixed_state({name: tensor for name, tensor in saved.items() if name.startswith("fixed.")})
    for module, delta in second.deltas().items():
        assert first.deltas()[module].distance(delta) < 1e-6
    monkeypatch.undo()
    wanted_frozen, wanted = begun("full", fused=True)
    perturb(wanted)
    found, expected = gradients(frozen, second), gradients(wanted_frozen, wanted)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True)), "the fused blocks use them"
