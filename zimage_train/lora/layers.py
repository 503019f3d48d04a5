"""LoRA layers in the frozen transformer, through peft: fp32 master weights, keyed initialisation, exact modules."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from zimage_train.config.lora import LoraSettings
from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import arithmetic
from zimage_train.lora.deltas import Deltas, Factors, Lora
from zimage_train.lora.starts import orthogonal_start, zero_start
from zimage_train.lora.targets import ranks_of
from zimage_train.models.arch import BLOCK_PRODUCTS
from zimage_train.models.linear import FrozenLinear
from zimage_train.optim.flat import FlatParameters
from zimage_train.rng import keyed_generator

ADAPTER_NAME = "default"
BLOCK = re.compile(r"\w+\.\d+\.")
"""Matches the prefix of a block of the transformer, such as `layers.0.`."""


class TrainedLinear(peft_lora.Linear):
    """peft's LoRA layer on a `FrozenLinear`, computed as a single operation; see `models.linear`."""

    rank_dropout = 0.0
    module_dropout = 0.0
    offset: tuple[Tensor, Tensor] | None = None
    """Fixed A and B whose product is subtracted, in the dtype of the model; None: there is nothing to subtract."""

    @property
    def draws_masks(self) -> bool:
        """Whether its forward in training is random."""
        has_dropout = not isinstance(self.lora_dropout[ADAPTER_NAME], nn.Identity)
        return has_dropout or self.rank_dropout > 0 or self.module_dropout > 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        assert isinstance(base, FrozenLinear)
        if self.disable_adapters:
            return base(x)
        a = cast(nn.Linear, self.lora_A[ADAPTER_NAME]).weight
        b = cast(nn.Linear, self.lora_B[ADAPTER_NAME]).weight
        scale = self.scaling[ADAPTER_NAME]
        if self.offset is not None:
            # In one product, which sums in fp32: the two nearly cancel, and rounding each would lose the difference.
            a = torch.cat([a, self.offset[0].to(a.dtype)], dim=0)
            b = torch.cat([b, -self.offset[1].to(b.dtype)], dim=1)
        # Dropout changes the input of the LoRA but not of the base, and the single operation takes the same x for both.
        if not self.training or not self.draws_masks:
            return base.with_lora(x, a, b, scale)
        inner = F.linear(self.lora_dropout[ADAPTER_NAME](x), a.to(x.dtype))
        if self.rank_dropout > 0:
            # The ranks of a sample, for all its tokens; those that are kept stand for all.
            shape = (len(x), *(1,) * (x.ndim - 2), inner.shape[-1])
            inner = inner * (torch.rand(shape, device=x.device) >= self.rank_dropout)
            scale /= 1.0 - self.rank_dropout
        change = F.linear(inner, b.to(x.dtype)) * scale
        if self.module_dropout > 0:
            # A factor and not a branch, for which the CPU would wait for the GPU.
            change = change * (torch.rand((), device=x.device) >= self.module_dropout)
        return base(x) + change


@dataclass(frozen=True)
class AdapterLayers(ABC):
    """The trainable matrices of an adapter in a model, fp32."""

    flat: FlatParameters
    """The matrices by `module.part`."""

    @property
    @abstractmethod
    def modules(self) -> list[str]:
        """The modules that it changes."""

    @abstractmethod
    def deltas(self, state: Mapping[str, Tensor] | None = None) -> Deltas:
        """Return the current deltas, whose matrices may share memory with the model, or those of `state`."""

    @abstractmethod
    def initialize_from(self, deltas: Deltas) -> None:
        """Start from `deltas`, which have the same modules and sizes."""

    def parameters(self) -> list[nn.Parameter]:
        """Return every trainable parameter, in a fixed order."""
        return list(self.flat.views.values())

    def state(self) -> dict[str, Tensor]:
        """Return name -> tensor, as a checkpoint stores them; the tensors share memory with the model."""
        return self.name_views(self.flat.whole.detach())

    def name_views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return name -> view of `buffer`, which is laid out as the matrices are."""
        return {f"lora.{name}": tensor for name, tensor in self.flat.split(buffer).items()}

    def fixed_state(self) -> dict[str, Tensor]:
        """Return name -> fixed tensor that another machine could not make again to the bit."""
        return {}

    def load_fixed_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `fixed_state` into the model."""
        for name, tensor in self.fixed_state().items():
            tensor.copy_(state[name])

    def load_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Copy `state` into the model.

        Raises:
            WeightsError: it has other modules or another rank.
        """
        current = self.state()
        differing = sorted(current.keys() ^ state.keys())
        if not differing:
            differing = [name for name in current if current[name].shape != state[name].shape]
        if differing:
            name = differing[0]
            saved = list(state[name].shape) if name in state else "missing"
            expected = list(current[name].shape) if name in current else "missing"
            message = f"{name} is {saved} in the checkpoint and {expected} in this run"
            raise WeightsError(
                Problem(where, message, "use the rank and targets that it was made with", "other-modules")
            )
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(state[name])


@dataclass(frozen=True)
class LoraLayers(AdapterLayers):
    """The trainable LoRA factors of a model: `a[module]` (rank, in) and `b[module]` (out, rank), fp32."""

    scales: Mapping[str, float]
    """Module -> the factor on its change; ranks may differ, and so may these."""
    cancels: bool = False
    """Whether B A begins as a sum of products that cancel, of which little would be left if A and B were rounded."""
    offsets: Mapping[str, Factors] = field(default_factory=dict)
    """Module -> fixed factors whose change is subtracted from its own, if any."""

    @cached_property
    def a(self) -> dict[str, nn.Parameter]:
        return {name.removesuffix(".A"): view for name, view in self.flat.views.items() if name.endswith(".A")}

    @cached_property
    def b(self) -> dict[str, nn.Parameter]:
        return {name.removesuffix(".B"): view for name, view in self.flat.views.items() if name.endswith(".B")}

    @property
    def modules(self) -> list[str]:
        return list(self.a)

    def name_views(self, buffer: Tensor) -> dict[str, Tensor]:
        # Every A, then every B, as checkpoints have them.
        tensors = super().name_views(buffer)
        a = {name: tensor for name, tensor in tensors.items() if name.endswith(".A")}
        return a | {name: tensor for name, tensor in tensors.items() if name.endswith(".B")}

    @torch.no_grad()
    def initialize_from(self, deltas: Deltas) -> None:
        for module, factors in deltas.items():
            assert isinstance(factors, Factors)
            self.a[module].copy_(factors.a)
            # This model multiplies by its own scale, so the quotient of the two keeps the delta as it is.
            self.b[module].copy_(factors.b.float() * (factors.scale / self.scales[module]))

    @torch.no_grad()
    def subtract_weights(self, model: nn.Module, weight_of: Callable[[str], Tensor]) -> "LoraLayers":
        """Return these layers with the principal part of each weight as their start, which is also subtracted.

        This is PiSSA (arXiv 2404.02948) with W left as it is: instead of W less its principal part, the change is the
        LoRA less its start.

        Args:
            weight_of: module -> the weight (out, in) that it is used with.
        """
        offsets: dict[str, Factors] = {}
        for module, a in self.a.items():
            weight, b, scale = weight_of(module), self.b[module], self.scales[module]
            principal, *_ = arithmetic.factorize(weight.float(), len(a), 1.0, module)
            # In the dtype of the products, so that the start cancels to the last bit.
            fixed_a, fixed_b = ((part / scale**0.5).to(weight.dtype) for part in (principal.a, principal.b))
            a.copy_(fixed_a)
            b.copy_(fixed_b)
            layer = cast(TrainedLinear, model.get_submodule(module))
            layer.offset = (fixed_a.to(a.device), fixed_b.to(a.device))
            offsets[module] = Factors(*layer.offset, scale)
        return replace(self, offsets=offsets, cancels=True)

    def fixed_state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module, factors in self.offsets.items():
            tensors |= {f"fixed.{module}.A": factors.a, f"fixed.{module}.B": factors.b}
        return tensors

    def deltas(self, state: Mapping[str, Tensor] | None = None) -> Deltas:
        tensors = state or self.state()
        deltas: Deltas = {}
        for module in self.a:
            a, b = tensors[f"lora.{module}.A"], tensors[f"lora.{module}.B"]
            if module in self.offsets:
                a = torch.cat([a, self.offsets[module].a.to(a)], dim=0)
                b = torch.cat([b, -self.offsets[module].b.to(b)], dim=1)
            deltas[module] = factors = Factors(a, b, self.scales[module])
            if self.cancels:  # other factors of the same change, which are as small as it is
                deltas[module], *_ = arithmetic.reduce_rank(factors, factors.rank, 1.0, module)
        return deltas


def attach_lora(model: nn.Module, settings: LoraSettings, modules: list[str], seed: int) -> LoraLayers:
    """Attach a new LoRA to `modules`, whose change is zero: A and B as `settings.start` says, both fp32.

    Args:
        seed: they are a function of the seed and the module's name alone, so other targets do not change it.

    Raises:
        WeightsError: peft attached it to other modules than requested.
    """
    ranks = ranks_of(settings, modules)
    scales = {module: settings.scale_at(rank) for module, rank in ranks.items()}
    attached = replace(_inject(model, ranks, scales, settings.dropout), cancels=settings.start != "zero")
    attached.flat.allocate_grads()
    for module in modules:
        layer = cast(TrainedLinear, model.get_submodule(module))
        layer.rank_dropout, layer.module_dropout = settings.rank_dropout, settings.module_dropout
    start = orthogonal_start if settings.start == "orthogonal" else zero_start
    with torch.no_grad():
        for module, a in attached.a.items():
            start(a, attached.b[module], keyed_generator(seed, "lora", module))
    return attached


def attach_fixed_lora(model: nn.Module, lora: Lora) -> LoraLayers:
    """Attach finished LoRA factors to the model, for sampling; ranks and scales may differ between modules."""
    attached = _inject(model, {module: factors.rank for module, factors in lora.items()}, dict.fromkeys(lora, 1.0))
    with torch.no_grad():
        for module, factors in lora.items():
            attached.a[module].copy_(factors.a)
            attached.b[module].copy_(factors.b.float() * factors.scale)
    return attached


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Disable the LoRA within the block; the model computes what its frozen weights alone do."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # Not peft's `enable_adapters(False)`, which also sets requires_grad of the factors.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def lora_weight(model: nn.Module, weight: float) -> Iterator[None]:
    """Multiply the change that the LoRA makes by `weight` within the block.

    A backward within the block gives the gradients at this weight, in every path: all of them read the
    scale of a layer when they run, and no factor changes.
    """
    scales: list[tuple[BaseTunerLayer, float]] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            scales.append((module, _scale_of(module)))
    try:
        for layer, scale in scales:
            _set_scale(layer, weight * scale)
        yield
    finally:
        for layer, scale in scales:
            _set_scale(layer, scale)


def _scale_of(layer: BaseTunerLayer) -> float:
    return layer.scaling[ADAPTER_NAME] if isinstance(layer, LoraLayer) else cast(Any, layer).scale


def _set_scale(layer: BaseTunerLayer, scale: float) -> None:
    if isinstance(layer, LoraLayer):
        layer.scaling[ADAPTER_NAME] = scale
    else:
        cast(Any, layer).scale = scale


def base_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the frozen module `name`, without the layer of an adapter that may wrap it."""
    module = model.get_submodule(name)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _inject(model: nn.Module, ranks: dict[str, int], scales: Mapping[str, float], dropout: float = 0.0) -> LoraLayers:
    """Wrap the modules of `ranks` in LoRA layers, and return their factors, which are not initialised."""
    # peft takes a global rank, and a pattern for each module that has another.
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
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    # peft matches the names of targets by suffix, so a short name would also match in other blocks.
    differing = sorted(layers.keys() ^ ranks.keys())
    if differing:
        message = "peft attached a LoRA where none was requested, or none where a LoRA was"
        raise WeightsError(Problem(differing[0], message, code="other-shape"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ranks:
        for part in ("A", "B"):
            shapes[f"{name}.{part}"] = tuple(_linear(layers[name], part).weight.shape)
    device = cast(Tensor, layers[next(iter(ranks))].get_base_layer().weight).device
    flat = FlatParameters(shapes, memory_order(list(ranks)), device)
    for name in ranks:
        for part in ("A", "B"):
            _linear(layers[name], part).weight = flat.views[f"{name}.{part}"]
        layers[name].scaling[ADAPTER_NAME] = scales[name]
    return LoraLayers(flat, scales)


def _linear(layer: LoraLayer, part: str) -> nn.Linear:
    """Return the linear layer of `layer` whose weight is A or B."""
    return cast(nn.Linear, getattr(layer, f"lora_{part}")[ADAPTER_NAME])


def memory_order(modules: list[str]) -> list[str]:
    """Return the names of the factors of `modules` in the order in which they lie in memory.

    The factors of a block are next to each other. So are the A of modules with the same input, which together are the A
    of a single product.
    """
    order: list[str] = []
    for group in product_groups(modules):
        order += [f"{module}.A" for module in group]
        order += [f"{module}.B" for module in group]
    return order


def product_groups(modules: list[str]) -> list[list[str]]:
    """Return `modules` by product, as `BLOCK_PRODUCTS` has them; those of a block follow each other."""
    by_block: dict[str, list[str]] = {}
    for module in modules:
        prefix = BLOCK.match(module)
        by_block.setdefault(prefix[0] if prefix else "", []).append(module)
    groups: list[list[str]] = []
    for block, members in by_block.items():
        for product in BLOCK_PRODUCTS:
            groups.append([block + name for name in product if block + name in members])
        in_products = set(chain.from_iterable(groups))
        groups += [[module] for module in members if module not in in_products]
    return groups
