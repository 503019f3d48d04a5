"""One LoRA after the other on a model that is loaded once; in between it is the bare model again."""

import contextlib
from collections.abc import Iterator
from typing import cast

from peft.tuners.lora import LoraLayer
from torch import nn

from zimage_train.lora import layers
from zimage_train.lora.lora_file import Lora


@contextlib.contextmanager
def with_lora(model: nn.Module, lora: Lora) -> Iterator[None]:
    """Within the block `lora` is on `model`; after it every module is the very one that was there before."""
    try:
        if lora:
            layers.attach_fixed_lora(model, lora)
        yield
    finally:
        _detach(model)


@contextlib.contextmanager
def replaced_lora(model: nn.Module, lora: Lora) -> Iterator[None]:
    """Within the block `lora` is on `model` in place of the LoRA that it has; after it that one is back, untouched."""
    own = {name: cast(nn.Module, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    noted = getattr(model, "peft_config", None)
    _detach(model)
    try:
        with with_lora(model, lora):
            yield
    finally:
        for name, module in own.items():
            _put(model, name, module)
        if noted is not None:
            model.peft_config = noted


def _detach(model: nn.Module) -> None:
    """Put the frozen modules back in place of those that surround them, and forget what peft noted on the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            _put(model, name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
