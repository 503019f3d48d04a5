"""The matrices that a LoRA begins with."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora import lora_file
from zimage_train.lora.starts import orthogonal_start
from zimage_train.rng import keyed_generator

from steps import unfused


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
