"""Context managers that attach a LoRA to a loaded model, and restore the model's modules afterwards."""

import contextlib
from collections.abc import Iterator
from typing import cast

from peft.tuners.lora import LoraLayer
from torch import nn

from zimage_train.lora import layers
from zimage_train.lora.deltas import Lora


@contextlib.contextmanager
def with_lora(model: nn.Module, lora: Lora) -> Iterator[None]:
    """Attach `lora` to `model` within the block, and put the original modules back after it."""
    try:
        if lora:
            layers.attach_fixed_lora(model, lora)
        yield
    finally:
        _detach(model)


@contextlib.contextmanager
def replaced_lora(model: nn.Module, lora: Lora) -> Iterator[None]:
    """Attach `lora` to `model` within the block in place of its current LoRA, which is put back after it."""
    # The layers themselves are kept, not copies of their factors: the optimizer's state belongs to these parameters.
    layers_before: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layers_before[name] = cast(nn.Module, module)
    peft_config = getattr(model, "peft_config", None)
    _detach(model)
    try:
        with with_lora(model, lora):
            yield
    finally:
        for name, module in layers_before.items():
            _set_submodule(model, name, module)
        if peft_config is not None:
            model.peft_config = peft_config


def _detach(model: nn.Module) -> None:
    """Put the frozen modules back in place of the LoRA layers around them, and remove peft's config."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            _set_submodule(model, name, module.get_base_layer())
    # With a config left in place, peft would take the next LoRA for a second adapter of the model, and warn.
    if hasattr(model, "peft_config"):
        del model.peft_config


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
