"""A LoRA, batches and velocities in float64, with which the tests calculate a loss by themselves."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.lora import layers, targets
from zimage_train.lora.layers import AdapterLayers, LoraLayers
from zimage_train.training.batches import Batch, BatchExtras

CPU = torch.device("cpu")
LAST = (".B", ".w2", ".w2_b")
"""The last matrix of each change, which is negative where the change is."""


def trainable(dropout: float = 0.0) -> tuple[FrozenTransformer, LoraLayers]:
    """The miniature with a LoRA whose B is not zero, so that gradients reach A too."""
    frozen = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    modules = targets.select_modules(["attention", "feed_forward"], frozen.shape.linears)
    attached = layers.attach_lora(frozen.model, LoraSettings(rank=4, dropout=dropout), modules, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for b in attached.b.values():
            b.copy_(torch.randn(b.shape, generator=draw) * 0.02)
    frozen.model.train()
    return frozen, attached


def batch(size: int, lengths: tuple[int, ...] = (9, 40, 70, 3)) -> Batch:
    """Samples with captions of different padded lengths."""
    draw = torch.Generator().manual_seed(4)
    return Batch(
        x0=torch.randn(size, 16, 8, 12, generator=draw),
        noise=torch.randn(size, 16, 8, 12, generator=draw),
        sigma=torch.rand(size, generator=draw),
        weight=torch.rand(size, generator=draw) + 0.5,
        prompts=[torch.randn(length, 64, generator=draw) for length in lengths[:size]],
    )


def with_extras(data: Batch, **extras: Any) -> Batch:
    return replace(data, extras=BatchExtras(**extras))


def raw_velocity(frozen: FrozenTransformer, data: Batch, embeds: list[torch.Tensor]) -> torch.Tensor:
    """The velocity (b, 16, h, w) in float64, by the model's own conventions."""
    found = []
    for index, one in enumerate(embeds):
        sigma = float(data.sigma[index])
        x = (1 - sigma) * data.x0[index].double() + sigma * data.noise[index].double()
        with torch.no_grad():
            raw = frozen.model([x.float().unsqueeze(1)], torch.tensor([1 - sigma]), [one], return_dict=False)[0][0]
        found.append(-raw.squeeze(1).double())
    return torch.stack(found)


def without_b(attached: LoraLayers, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `run` gives with B set to zero: the model without its LoRA, found another way than by switching it off."""
    state = {name: tensor.clone() for name, tensor in attached.state().items()}
    for name in state:
        if name.endswith(".B"):
            attached.state()[name].zero_()
    result = run()
    for name, tensor in attached.state().items():
        tensor.copy_(state[name])
    return result


@contextlib.contextmanager
def scaled_last(attached: AdapterLayers, factor: float):
    """The adapter with another last matrix: a change of another size without `lora_weight`."""
    before = attached.flat.whole.detach().clone()
    with torch.no_grad():
        for name, view in attached.flat.views.items():
            if name.endswith(LAST):
                view.mul_(factor)
    try:
        yield
    finally:
        attached.flat.whole.detach().copy_(before)
