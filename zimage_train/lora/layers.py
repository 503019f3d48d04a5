"""LoRA modules in the frozen transformer, through peft: fp32 masters, deterministic start, exact counts."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora.lora_file import Factors, Lora
from zimage_train.models.linear import FrozenLinear
from zimage_train.rng import keyed_generator

ADAPTER_NAME = "default"


class TrainedLinear(peft_lora.Linear):
    """peft's LoRA layer on a `FrozenLinear`, computed as one operation; see there."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        assert isinstance(base, FrozenLinear)
        if self.disable_adapters:
            return base(x)
        a, b = (cast(nn.Linear, part[ADAPTER_NAME]).weight for part in (self.lora_A, self.lora_B))
        scale = self.scaling[ADAPTER_NAME]
        dropout = self.lora_dropout[ADAPTER_NAME]
        if isinstance(dropout, nn.Identity) or not self.training:
            return base.with_lora(x, a, b, scale)
        return base(x) + F.linear(F.linear(dropout(x), a.to(x.dtype)), b.to(x.dtype)) * scale


@dataclass(frozen=True)
class LoraLayers:
    """The trainable factors in a model: `a[module]` (rank, in) and `b[module]` (out, rank), fp32."""

    a: dict[str, nn.Parameter]
    b: dict[str, nn.Parameter]
    scale: float

    def parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter, in one fixed order."""
        return [parameter for module in self.a for parameter in (self.a[module], self.b[module])]

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor, as a checkpoint keeps them."""
        a = {f"lora.{module}.A": parameter.detach() for module, parameter in self.a.items()}
        return a | {f"lora.{module}.B": parameter.detach() for module, parameter in self.b.items()}

    def load_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Copy `state` in.

        Raises:
            WeightsError: it is of other modules or another rank.
        """
        own = self.state()
        different = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
        if different:
            found = list(state[different[0]].shape) if different[0] in state else "nothing"
            expected = list(own[different[0]].shape) if different[0] in own else "nothing"
            what = f"{different[0]} is {found} there and {expected} in this run"
            raise WeightsError(Problem(where, what, "use the rank and targets that it was made with"))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    @torch.no_grad()
    def initialize_from(self, lora: Lora) -> None:
        """Take over the change that `lora` makes, of the same modules and ranks."""
        for module, factors in lora.items():
            self.a[module].copy_(factors.a)
            self.b[module].copy_(factors.b.float() * (factors.scale / self.scale))

    def factors(self, state: Mapping[str, Tensor] | None = None) -> Lora:
        """The current LoRA, sharing memory with the model; or the one that `state` holds."""
        held = state or self.state()
        return {module: Factors(held[f"lora.{module}.A"], held[f"lora.{module}.B"], self.scale) for module in self.a}


def attach_lora(
    model: nn.Module, modules: list[str], rank: int, alpha: float | None, dropout: float, seed: int
) -> LoraLayers:
    """Put a fresh LoRA on `modules`: A uniform in +-1/sqrt(in) (peft's own law), B zero, both fp32.

    The start depends on (seed, module name) only, not on what else was drawn.

    Raises:
        WeightsError: peft attached to other modules than asked for.
    """
    scale = 1.0 if alpha is None else alpha / rank
    attached = _inject(model, dict.fromkeys(modules, rank), scale, dropout)
    with torch.no_grad():
        for module, a in attached.a.items():
            bound = 1.0 / math.sqrt(a.shape[1])
            a.copy_((torch.rand(a.shape, generator=keyed_generator(seed, "lora", module)) * 2.0 - 1.0) * bound)
            attached.b[module].zero_()
    return attached


def attach_fixed_lora(model: nn.Module, lora: Lora) -> LoraLayers:
    """Put finished LoRA factors on the model, for sampling."""
    attached = _inject(model, {module: factors.rank for module, factors in lora.items()}, 1.0, 0.0)
    with torch.no_grad():
        for module, factors in lora.items():
            attached.a[module].copy_(factors.a)
            attached.b[module].copy_(factors.b.float() * factors.scale)
    return attached


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model as it is without its LoRA, for as long as the block runs."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def base_layer(model: nn.Module, name: str) -> nn.Module:
    """The frozen module `name`, also where a LoRA now surrounds it."""
    module = model.get_submodule(name)
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _inject(model: nn.Module, ranks: dict[str, int], scale: float, dropout: float) -> LoraLayers:
    default = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != default}
    config = LoraConfig(
        r=default,
        lora_alpha=default,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(ranks),
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    config._register_custom_module({FrozenLinear: TrainedLinear})
    inject_adapter_in_model(config, model, ADAPTER_NAME)
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if found.keys() != ranks.keys():
        different = sorted(found.keys() ^ ranks.keys())
        raise WeightsError(
            Problem(different[0], "peft attached a LoRA where none was asked for, or none where one was")
        )
    a, b = {}, {}
    for name in ranks:
        layer = found[name]
        device = layer.get_base_layer().weight.device
        for part, store in (("lora_A", a), ("lora_B", b)):
            linear = getattr(layer, part)[ADAPTER_NAME].to(device=device, dtype=torch.float32)
            linear.weight.requires_grad_(True)
            store[name] = linear.weight
        layer.scaling[ADAPTER_NAME] = scale
    return LoraLayers(a, b, scale)
