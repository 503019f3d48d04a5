"""The frozen linear layer with its LoRA: its numbers against float64, its gradients, and what it keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora.layers import TrainedLinear, attach_lora, base_layer
from zimage_train.models import quantize
from zimage_train.models.linear import FrozenLinear

KINDS = (None, "fp8", "int8", "nf4")


def layer(kind, inputs: int = 128, outputs: int = 192, dtype: torch.dtype = torch.float32) -> FrozenLinear:
    made = FrozenLinear(inputs, outputs, dtype, kind).to_empty(device="cpu")
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) / inputs**0.5
    for parameter, value in zip(made.stored_parameters(), made.pack(weight), strict=True):
        parameter.data.copy_(value)
    return made


def dense(made: FrozenLinear) -> Tensor:
    """The weight as float64, unpacked here by the documented formula where it exists."""
    if made.scales is None:
        return made.weight.double()
    if made.kind == "nf4":
        return quantize.unpack(made.weight, made.scales, torch.float32).double()
    blocks = made.weight.float().double().unflatten(1, (made.scales.shape[1], -1))
    return (blocks * made.scales.double().unsqueeze(-1)).flatten(1)


def lora(inputs: int = 128, outputs: int = 192, rank: int = 8) -> tuple[nn.Parameter, nn.Parameter]:
    draw = torch.Generator().manual_seed(2)
    return nn.Parameter(torch.randn(rank, inputs, generator=draw)), nn.Parameter(
        torch.randn(outputs, rank, generator=draw)
    )


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_linear_equals_float64(kind):
    """Output and gradients are those of float64."""
    made, (a, b), x = layer(kind), lora(), inputs()
    y = made.with_lora(x, a, b, 0.5)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    y.backward(upstream)

    a64, b64, x64 = (one.detach().double().requires_grad_() for one in (a, b, x))
    y64 = x64 @ dense(made).T + 0.5 * (x64 @ a64.T) @ b64.T
    y64.backward(upstream.double())
    assert torch.allclose(y.double(), y64, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((x, x64), (a, a64), (b, b64)):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_without_a_lora(kind):
    """Without a LoRA it is a plain linear layer that passes gradients on."""
    made, x = layer(kind), inputs()
    made(x).sum().backward()
    assert torch.allclose(made(x).double(), x.double() @ dense(made).T, atol=1e-5)
    assert torch.allclose(x.grad.double(), dense(made).sum(0).expand(x.shape), atol=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in made.parameters())


def test_masters_stay_fp32_under_bf16():
    """Masters stay fp32 under bf16, and their gradients are as exact as bf16 allows."""
    made, (a, b), x = layer(None, dtype=torch.bfloat16), lora(), inputs(torch.bfloat16)
    y = made.with_lora(x, a, b, 1.0)
    y.sum().backward()
    a64 = a.detach().double().requires_grad_()
    (x.detach().double() @ dense(made).T + (x.detach().double() @ a64.T) @ b.detach().double().T).sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32
    assert ((a.grad.double() - a64.grad).norm() / a64.grad.norm()) < 0.01


def test_input_without_gradient():
    """An input without gradient gets none, and the LoRA still learns."""
    made, (a, b) = layer("int8"), lora()
    x = inputs().detach()
    made.with_lora(x, a, b, 1.0).sum().backward()
    assert x.grad is None and a.grad.abs().max() > 0 and b.grad.abs().max() > 0


@contextmanager
def kept(*ignored: Tensor) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd keeps within the block, but for those of `ignored`."""
    known = {one.untyped_storage()._cdata for one in ignored}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def size(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(one.nbytes() for one in storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_shared_input_is_kept_once(kind):
    """An input that three layers share is kept once, and nothing else is."""
    layers, (a, b), x = [layer(kind) for _ in range(3)], lora(), inputs()
    shared = x * 2
    weights = [tensor for one in layers for tensor in one.stored_parameters()]
    with kept(*weights, a, b) as found:
        outputs = [one.with_lora(shared, a, b, 1.0) for one in layers]
    assert size(found) == shared.nbytes
    assert len(outputs) == 3


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantized_layer_keeps_less(kind):
    """A quantised layer keeps less than bf16 in all, weights included.

    Naive fp8 keeps the unpacked weight as well, and takes more than bf16.
    """
    taken = {}
    for one in (None, kind):
        made, (a, b), x = layer(one, dtype=torch.bfloat16), lora(), inputs(torch.bfloat16)
        with kept(x, a, b) as found:
            made.with_lora(x, a, b, 1.0)
        taken[one] = size(found)
        assert taken[one] == sum(tensor.nbytes for tensor in made.stored_parameters())
    assert taken[kind] < taken[None] * (0.27 if kind == "nf4" else 0.52)


def test_it_equals_peft_on_a_plain_layer():
    class Model(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    made = layer(None)
    plain = nn.Linear(128, 192, bias=False)
    plain.weight.data.copy_(made.weight)
    theirs = Model(plain)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, target_modules=["inner"], init_lora_weights=False), theirs)
    ours = Model(made)
    attached = attach_lora(ours, LoraSettings(rank=4, alpha=2.0), ["inner"], 1)
    attached.a["inner"].data.copy_(theirs.inner.lora_A["default"].weight)
    attached.b["inner"].data.copy_(theirs.inner.lora_B["default"].weight)
    x = inputs()
    assert isinstance(ours.inner, TrainedLinear)
    assert torch.allclose(ours.inner(x), theirs.inner(x), atol=1e-5)
    ours.inner.enable_adapters(False)
    assert torch.equal(ours.inner(x), made(x))


def test_dropout_only_in_training():
    """Dropout is applied to the LoRA alone, and only in training."""
    model = nn.ModuleDict({"inner": layer(None)})
    attached = attach_lora(model, LoraSettings(rank=4, dropout=0.999999), ["inner"], 1)
    attached.b["inner"].data.fill_(1.0)
    x, base = inputs(), base_layer(model, "inner")
    assert torch.allclose(model["inner"](x), base(x), atol=1e-6)
    model.eval()
    assert not torch.allclose(model["inner"](x), base(x), atol=1e-2)
