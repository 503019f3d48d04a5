"""Optimizers, the learning rate as a function of the step, and optimizer state as plain tensors and numbers."""

import contextlib
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from zimage_train.config import schema
from zimage_train.errors import Problem, WeightsError

PRODIGY_LEAST_LR = 0.1


def build(settings: schema.Optimizer, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `settings` names, over `parameters`."""
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.params.items()}
    make = OPTIMIZERS[settings.name]
    return make(list(parameters), lr=base_lr(settings), weight_decay=settings.weight_decay, **params)


def base_lr(settings: schema.Optimizer) -> float:
    """The learning rate before the schedule; Prodigy multiplies its own estimate by it, so less than 0.1 means 1."""
    if settings.name == "prodigy" and settings.lr < PRODIGY_LEAST_LR:
        return 1.0
    return settings.lr


def _adamw8bit(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **settings)


def _prodigy(parameters: list[Parameter], **settings: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints which weight decay it uses
        return Prodigy(parameters, **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
}


def lr_factor(schedule: schema.Schedule, step: int, steps: int) -> float:
    """The factor on the learning rate in `step` (1 to `steps`): linear warm-up, then the schedule."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    progress = (step - 1 - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
    return SCHEDULES[schedule.name](progress, schedule.params)


def _cosine(progress: float, params: dict[str, Any]) -> float:
    end = params.get("end_factor", 0.0)
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, dict[str, Any]], float]] = {
    "constant": lambda progress, params: 1.0,
    "cosine": _cosine,
}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def used_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that the next step will use; for Prodigy its estimate d times the group's."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def load_state(
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
        optimizer.state[parameter][key] = tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
