"""Context managers that attach an adapter to a loaded model, and restore the model's modules afterwards."""

import contextlib
from collections.abc import Iterator
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from zimage_train.lora import layers, module_kinds
from zimage_train.lora.deltas import Deltas, Factors
from zimage_train.lora.kronecker import replace_module


@contextlib.contextmanager
def with_lora(model: nn.Module, deltas: Deltas) -> Iterator[None]:
    """Attach `deltas` to `model` within the block, and put the original modules back after it."""
    # The factors of a LoRA get the layers that train them, so that a preview has the arithmetic of the training.
    lora = {module: delta for module, delta in deltas.items() if isinstance(delta, Factors)}
    try:
        if lora:
            layers.attach_fixed_lora(model, lora)
        module_kinds.attach_fixed(model, {module: delta for module, delta in deltas.items() if module not in lora})
        yield
    finally:
        _detach(model)


@contextlib.contextmanager
def replaced_lora(model: nn.Module, deltas: Deltas) -> Iterator[None]:
    """Attach `deltas` to `model` within the block in place of its current adapter, which is put back after it."""
    # The layers themselves are kept, not copies of their factors: the optimizer's state belongs to these parameters.
    layers_before: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers_before[name] = cast(nn.Module, module)
    peft_config = getattr(model, "peft_config", None)
    _detach(model)
    try:
        with with_lora(model, deltas):
            yield
    finally:
        for name, module in layers_before.items():
            replace_module(model, name, module)
        if peft_config is not None:
            model.peft_config = peft_config


def _detach(model: nn.Module) -> None:
    """Put the frozen modules back in place of the layers of adapters around them, and remove peft's config."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            replace_module(model, name, module.get_base_layer())
    # With a config left in place, peft would take the next LoRA for a second adapter of the model, and warn.
    if hasattr(model, "peft_config"):
        del model.peft_config
