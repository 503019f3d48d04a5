"""The kinds of adapters that can be trained."""

from collections.abc import Mapping

from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.lora import kronecker, layers, module_kinds
from zimage_train.lora.layers import AdapterLayers


def attach_adapter(
    model: nn.Module,
    settings: LoraSettings,
    modules: list[str],
    seed: int,
    norms: Mapping[str, Tensor] | None = None,
) -> AdapterLayers:
    """Attach a new adapter of the kind `settings.type` to `modules`, whose change is zero.

    Args:
        norms: as `module_kinds.attach_modules`.
    """
    if settings.type == "lokr":
        return kronecker.attach_lokr(model, settings, modules, seed)
    if settings.type != "lora":
        return module_kinds.attach_modules(model, settings, modules, seed, norms)
    return layers.attach_lora(model, settings, modules, seed)
