"""Optimizers of the libraries by name, and their state as plain tensors and numbers."""

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from zimage_train.config import schema
from zimage_train.errors import Problem, WeightsError
from zimage_train.optim.automagic import Automagic
from zimage_train.optim.schedules import base_lr


def build_optimizer(settings: schema.OptimizerSettings, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `settings` names, over `parameters`."""
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.params.items()}
    make = OPTIMIZER_FACTORIES[settings.name]
    return make(list(parameters), lr=base_lr(settings), weight_decay=settings.weight_decay, **params)


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        return getattr(optim, name)(parameters, **settings)

    return make


def _paged_adamw8bit(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Its state may move to main memory when the card is full; without a card there is nothing to page."""
    return _bitsandbytes("AdamW8bit")(parameters, is_paged=parameters[0].is_cuda, **settings)


def _prodigy(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints which weight decay it uses
        return Prodigy(parameters, **settings)


def _prodigy8bit(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    from zimage_train.optim.prodigy8bit import Prodigy8bit

    with contextlib.redirect_stdout(io.StringIO()):
        return Prodigy8bit(parameters, **settings)


def _adafactor(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    """At the given rate: its own relative steps are made for weights that do not begin at zero, as a LoRA's do."""
    from transformers.optimization import Adafactor

    return Adafactor(parameters, scale_parameter=False, relative_step=False, warmup_init=False, **settings)


OPTIMIZER_FACTORIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adam8bit": _bitsandbytes("Adam8bit"),
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw8bit": _paged_adamw8bit,
    "ademamix": _bitsandbytes("AdEMAMix"),
    "ademamix8bit": _bitsandbytes("AdEMAMix8bit"),
    "lion": _bitsandbytes("Lion"),
    "lion8bit": _bitsandbytes("Lion8bit"),
    "prodigy": _prodigy,
    "prodigy8bit": _prodigy8bit,
    "adafactor": _adafactor,
    "adagrad": torch.optim.Adagrad,
    "automagic": Automagic,
}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that the next step will use: for Prodigy its estimate d times the group's, for Automagic the
    mean over the tensors."""
    if isinstance(optimizer, Automagic):
        return optimizer.mean_lr()
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the optimizer remembers: tensors by name, and numbers that survive JSON exactly."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim.{index}.{key}"] = value.detach().clone()
            else:
                scalars.setdefault(str(index), {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"kind": type(optimizer).__name__, "state": scalars, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any], where: str
) -> None:
    """Restore what `state` returned.

    Raises:
        WeightsError: it belongs to another optimizer.
    """
    parameters = _parameters(optimizer)
    saved_groups = numbers["groups"]
    if numbers["kind"] != type(optimizer).__name__ or len(saved_groups) != len(optimizer.param_groups):
        what = f"holds the state of {numbers['kind']}, and this run uses {type(optimizer).__name__}"
        raise WeightsError(Problem(where, what, "use the optimizer that it was made with"))
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) else value
    for key, values in numbers["state"].items():
        optimizer.state[parameters[int(key)]].update(values)
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        parameter = parameters[int(index)]
        on_cpu = key == "step" and tensor.ndim == 0  # torch keeps the step of AdamW on the CPU
        value = tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)
        if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:  # or it would stay on the card
            value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # pyright: ignore
        optimizer.state[parameter][key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
