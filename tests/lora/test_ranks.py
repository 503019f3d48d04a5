"""Ranks by group and by pattern: which modules get which, and that every part of a run agrees on them."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.errors import ConfigError
from zimage_train.lora import lora_file, targets
from zimage_train.lora.layers import ADAPTER_NAME, LoraLayers, attach_lora
from zimage_train.models.transformer import velocity
from zimage_train.planning.workload import adapter_parameters

from steps import CPU, gradients, trained, unfused

GROUPS = ["attention", "feed_forward"]
RANKS = {"attention": 8, "layers.[01][.]feed.+": 2}
SETTINGS = LoraSettings(rank=4, ranks=RANKS, alpha=3.0)


def linears() -> dict[str, tuple[int, int]]:
    return load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).shape.linears


def expected_rank(module: str) -> int:
    """The rank by the names, without a pattern."""
    if ".attention." in module:
        return 8
    return 2 if module.split(".")[1] in "01" else 4


def randomized(attached: LoraLayers) -> None:
    draw = torch.Generator().manual_seed(3)
    for b in attached.b.values():
        b.data.normal_(generator=draw).mul_(0.05)


def test_each_module_has_its_rank():
    frozen, attached = unfused("none", lora=SETTINGS)
    assert isinstance(attached, LoraLayers)
    assert {name: a.shape[0] for name, a in attached.a.items()} == {name: expected_rank(name) for name in attached.a}
    assert {name: b.shape[1] for name, b in attached.b.items()} == {name: expected_rank(name) for name in attached.b}
    assert {expected_rank(name) for name in attached.a} == {2, 4, 8}
    for delta in attached.deltas().values():
        assert delta.scale == 3.0 / delta.rank
    assert targets.count_ranks(SETTINGS, attached.modules) == {
        rank: [expected_rank(name) for name in attached.a].count(rank) for rank in (2, 4, 8)
    }
    assert attached.flat.numel == adapter_parameters(SETTINGS, frozen.shape, attached.modules)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same(rslora: bool):
    """peft with its rank_pattern and use_rslora predicts the same with the same factors."""
    settings = SETTINGS.model_copy(update={"rslora": rslora})
    ours = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    modules = targets.select_modules(GROUPS, ours.shape.linears)
    attached = attach_lora(ours.model, settings, modules, 1)
    randomized(attached)
    theirs = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    pattern = {r".*attention\.to_.*": 8, r".*layers\.[01]\.feed_forward.*": 2}
    config = LoraConfig(r=4, lora_alpha=3, rank_pattern=pattern, target_modules=modules, use_rslora=rslora)
    inject_adapter_in_model(config, theirs.model, ADAPTER_NAME)
    for name, module in theirs.model.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_A[ADAPTER_NAME].weight.data.copy_(attached.a[name])
            module.lora_B[ADAPTER_NAME].weight.data.copy_(attached.b[name])
    x, sigma = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    prompt = [torch.randn(9, ours.shape.cap_feat_dim)]
    found = velocity(ours.model, x, sigma, prompt)
    wanted = velocity(theirs.model, x, sigma, prompt)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    attached.flat.whole.data.zero_()
    assert (found - velocity(ours.model, x, sigma, prompt)).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize(
    ("alpha", "rslora", "scales"),
    [
        (None, False, {2: 1.0, 4: 1.0, 8: 1.0}),
        (3.0, False, {2: 1.5, 4: 0.75, 8: 0.375}),
        (None, True, {2: 2**0.5, 4: 2.0, 8: 8**0.5}),
        (3.0, True, {2: 3 / 2**0.5, 4: 1.5, 8: 3 / 8**0.5}),
    ],
)
def test_scales(alpha: float | None, rslora: bool, scales: dict[int, float], tmp_path):
    """The scale of each rank, in float64 from the file as every program reads it: alpha there is the rank."""
    settings = LoraSettings(rank=4, ranks=RANKS, alpha=alpha, rslora=rslora)
    _, attached = unfused("none", lora=settings)
    path = tmp_path / "lora.safetensors"
    lora_file.export_lora(path, attached.deltas(), "fp32", {"format": "pt"})
    tensors = load_file(path)
    for name in attached.a:
        a, b = attached.a[name].detach().double(), attached.b[name].detach().double()
        in_file = [f"diffusion_model.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        stored_a, stored_b = (tensors[key].double() for key in in_file)
        alpha_in_file = tensors.get(f"diffusion_model.{name}.alpha")
        assert alpha_in_file is None or float(alpha_in_file) == len(stored_a)
        wanted = scales[len(a)] * (b @ a)
        assert (stored_b @ stored_a - wanted).norm() <= 1e-6 * wanted.norm() > 0


@pytest.mark.parametrize("mode", ["none", "w1w3", "full"])
def test_fused_blocks_with_several_ranks(mode: str):
    """Layers of one product may differ in rank, and the blocks stay fused."""
    ranks = {".+to_k": 8, ".+w3": 1, "layers.1[.].+(to_q|w2)": 6}
    settings = LoraSettings(rank=4, ranks=ranks, alpha=3.0)
    loss, *grads = gradients(*trained(mode, lora=settings))
    wanted_loss, *wanted = gradients(*unfused("none", lora=settings))
    assert torch.allclose(loss, wanted_loss, rtol=1e-6)
    for one, other in zip(grads, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() and other.norm() > 0


def test_equal_ranks_change_nothing():
    plain, other = unfused("none", lora=LoraSettings(rank=4)), unfused("none", lora=SETTINGS)
    same = unfused("none", lora=LoraSettings(rank=4, ranks={"attention": 4}))
    assert torch.equal(plain[1].flat.whole, same[1].flat.whole)
    # The A of a module is drawn for its name, so modules that keep their rank keep their start.
    kept = [name for name in other[1].modules if expected_rank(name) == 4]
    assert kept and all(torch.equal(plain[1].a[name], other[1].a[name]) for name in kept)


@pytest.mark.parametrize(
    ("ranks", "messages"),
    [
        ({"atention": 8}, ["'atention' matches none of the", "a group is one of attention"]),
        ({"adaln": 8}, ["'adaln' matches none of the"]),
        ({"to_q": 8}, ["'to_q' matches none"]),  # the whole name must match
        ({"attention": 8, "layers.1[.].+": 2}, ["'attention' and 'layers.1[.].+' both match layers.1.attention.to_q"]),
        ({"x": 8, "attention": 8, ".+to_k": 2}, ["'x' matches none", "'attention' and '.+to_k' both match"]),
    ],
)
def test_patterns_that_do_not_match_once(ranks: dict[str, int], messages: list[str]):
    modules = targets.select_modules(GROUPS, linears())
    with pytest.raises(ConfigError) as caught:
        targets.ranks_of(LoraSettings(ranks=ranks), modules)
    assert all(message in str(caught.value) for message in messages), caught.value
    assert len(caught.value.problems) == len(messages) - (len(messages) == 2 and "group" in messages[1])
