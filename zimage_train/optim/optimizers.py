"""Optimizers by name, and conversion of their state to plain tensors and numbers."""

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
    """Return the optimizer that `settings` names, for `parameters`."""
    # YAML has lists only, while the optimizers compare or unpack tuples, such as betas.
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.params.items()}
    factory = OPTIMIZER_FACTORIES[settings.name]
    return factory(list(parameters), lr=base_lr(settings), weight_decay=settings.weight_decay, **params)


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return a factory of bitsandbytes' optimizer `name`, which imports the library only when it is called."""

    def create(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        return getattr(optim, name)(parameters, **settings)

    return create


def _paged_adamw8bit(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Create an 8-bit AdamW whose state CUDA may move to CPU memory when the GPU is full; not paged on a CPU."""
    return _bitsandbytes("AdamW8bit")(parameters, is_paged=parameters[0].is_cuda, **settings)


def _prodigy(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt prints which kind of weight decay it uses
        return Prodigy(parameters, **settings)


def _prodigy8bit(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    from zimage_train.optim.prodigy8bit import Prodigy8bit

    with contextlib.redirect_stdout(io.StringIO()):
        return Prodigy8bit(parameters, **settings)


def _adafactor(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Create an Adafactor that uses the given learning rate as it is."""
    from transformers.optimization import Adafactor

    # Adafactor's relative step sizes are proportional to the RMS of a weight, which is 0 for a LoRA's B at first.
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
    """Return the learning rate of the next step.

    For Prodigy this is its estimate d times the group's rate, for Automagic the mean over the tensors.
    """
    if isinstance(optimizer, Automagic):
        return optimizer.mean_lr()
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's whole state: tensors by name, and the other values, which JSON stores exactly.

    Tensors are named `optim.<index of the parameter>.<key>`.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim.{index}.{key}"] = value.detach().clone()
            else:
                scalars.setdefault(str(index), {})[key] = value
    groups = []
    for group in optimizer.param_groups:
        # Prodigy keeps its state here, not per parameter: d, d0, d_max, d_numerator, k.
        groups.append({key: value for key, value in group.items() if key != "params"})
    return tensors, {"kind": type(optimizer).__name__, "state": scalars, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any], where: str
) -> None:
    """Restore the state that `optimizer_state` returned.

    Raises:
        WeightsError: it is the state of another optimizer.
    """
    parameters = _parameters(optimizer)
    saved_groups = numbers["groups"]
    if numbers["kind"] != type(optimizer).__name__ or len(saved_groups) != len(optimizer.param_groups):
        message = f"holds the state of {numbers['kind']}, but this run uses {type(optimizer).__name__}"
        raise WeightsError(
            Problem(where, message, "use the optimizer that the checkpoint was saved with", "damaged-checkpoints")
        )
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) else value
    for key, values in numbers["state"].items():
        optimizer.state[parameters[int(key)]].update(values)
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        parameter = parameters[int(index)]
        # torch keeps the step of AdamW on the CPU, so that reading it does not synchronise with the GPU.
        on_cpu = key == "step" and tensor.ndim == 0
        value = tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)
        # Only a buffer that bitsandbytes allocates itself is paged; any other tensor would stay on the GPU. It pages
        # the moments, which have the parameter's shape, and not the small tensors beside them (absmax, code).
        if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
            value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # pyright: ignore
        optimizer.state[parameter][key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
