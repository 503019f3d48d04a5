"""Optimizers by name, and conversion of their state to plain tensors and numbers."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from zimage_train.config import schema
from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName
from zimage_train.errors import Problem, WeightsError
from zimage_train.optim.automagic import Automagic
from zimage_train.optim.flat import FlatParameters
from zimage_train.optim.schedules import base_lr

Groups = list[dict[str, Any]]
"""Parameter groups, as optimizers of torch take them."""
LR_FACTOR = "lr_factor"
"""Key of a parameter group: factor of its learning rate on that of the step."""
LEAST_8BIT_ELEMENTS = 4096
"""bitsandbytes keeps the state of smaller tensors in fp32."""


def build_optimizer(
    settings: schema.OptimizerSettings, parameters: list[Parameter], factors: Sequence[float] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer that `settings` names, for `parameters`.

    Args:
        factors: of the learning rate of each parameter; those of one factor are a group. Empty: all have 1.
    """
    # YAML has lists only, while the optimizers compare or unpack tuples, such as betas.
    params = {key: _with_tuples(value) for key, value in settings.params.items()}
    factory, lr = OPTIMIZER_FACTORIES[settings.name], base_lr(settings)
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if factors:
        by_factor: dict[float, list[Parameter]] = {}
        for parameter, factor in zip(parameters, factors, strict=True):
            by_factor.setdefault(factor, []).append(parameter)
        groups = []
        for factor, members in sorted(by_factor.items()):
            groups.append({"params": members, "lr": lr * factor, LR_FACTOR: factor})
    return factory(groups, lr=lr, weight_decay=settings.weight_decay, **params)


def _with_tuples(value: Any) -> Any:
    """Return `value` with tuples for its lists, and for the lists in these."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def lr_factors(flat: FlatParameters, by_module: Mapping[str, float], lora_plus: float) -> list[float]:
    """Return the factor of the learning rate of each parameter of `flat`, or an empty list if all are 1.

    Args:
        by_module: factor of the parameters `module.part` of each module.
        lora_plus: factor of every B besides.
    """
    factors: list[float] = []
    for name in flat.views:
        module, _, part = name.rpartition(".")
        factors.append(by_module[module] * (lora_plus if part == "B" else 1.0))
    return factors if set(factors) != {1.0} else []


def parameters_for(name: OptimizerName, flat: FlatParameters) -> list[Parameter]:
    """Return what the optimizer `name` is to update: the whole buffer of `flat` if that gives the same bits.

    Otherwise, where the update of an element depends on its tensor, it is each parameter for itself.
    """
    block = OPTIMIZERS[name].state_block
    is_same = block == 1 or (block is not None and flat.has_blocks(block, LEAST_8BIT_ELEMENTS))
    return [flat.whole] if is_same else list(flat.views.values())


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return a factory of bitsandbytes' optimizer `name`, which imports the library only when it is called."""

    def create(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        return getattr(optim, name)(groups, **settings)

    return create


def _paged_adamw8bit(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """Create an 8-bit AdamW whose state CUDA may move to CPU memory when the GPU is full; not paged on a CPU."""
    return _bitsandbytes("AdamW8bit")(groups, is_paged=groups[0]["params"][0].is_cuda, **settings)


def _prodigy(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt prints which kind of weight decay it uses
        return Prodigy(groups, **settings)


def _prodigy8bit(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    from zimage_train.optim.prodigy8bit import Prodigy8bit

    with contextlib.redirect_stdout(io.StringIO()):
        return Prodigy8bit(groups, **settings)


def _adafactor(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """Create an Adafactor that uses the given learning rate as it is."""
    from transformers.optimization import Adafactor

    # Adafactor's relative step sizes are proportional to the RMS of a weight, which is 0 for a LoRA's B at first.
    return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False, **settings)


def _adamw_schedulefree(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW(groups, **settings)


def _stable_adamw(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import StableAdamW

    return StableAdamW(groups, kahan_sum=False, **settings)  # which is for parameters in 16 bits


def _adopt(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """Create an ADOPT with the weight decay of AdamW."""
    from pytorch_optimizer import ADOPT

    return ADOPT(groups, weight_decouple=True, **settings)


def _came(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import CAME

    return CAME(groups, **settings)


def _muon(groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """Create a Muon for matrices, with updates as large as those of AdamW, so that it takes AdamW's learning rates."""
    from pytorch_optimizer import Muon

    # Without the adjustment, updates of a LoRA's B would be sqrt(outputs / rank) times as large as those of its A.
    return Muon([{**settings, **group, "use_muon": True, "use_adjusted_lr": True} for group in groups])


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
    "adamw_schedulefree": _adamw_schedulefree,
    "stable_adamw": _stable_adamw,
    "adopt": _adopt,
    "came": _came,
    "muon": _muon,
}


@contextlib.contextmanager
def averaged_weights(name: OptimizerName, optimizer: torch.optim.Optimizer, flat: FlatParameters) -> Iterator[None]:
    """Within the block, `flat` holds the weights that are the result of a training; without averages, its own.

    The weights that are trained are put back from a copy: moving them back would round differently, and a run would
    depend on when it was looked at.
    """
    if not OPTIMIZERS[name].averages_weights:
        yield
        return
    trained = flat.whole.detach().to("cpu", copy=True)  # where there is room for it beside previews
    modes = [group["train_mode"] for group in optimizer.param_groups]
    optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        with torch.no_grad():
            flat.whole.copy_(trained)
        for group, mode in zip(optimizer.param_groups, modes, strict=True):
            group["train_mode"] = mode


def count_lr_factors(optimizer: torch.optim.Optimizer) -> dict[float, int]:
    """Return factor of the learning rate -> number of the parameters that have it, or nothing if it has no factors."""
    groups = [group for group in optimizer.param_groups if LR_FACTOR in group]
    return {group[LR_FACTOR]: len(group["params"]) for group in groups}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the next step, without the factors of groups.

    For Prodigy this is its estimate d times the group's rate, for Automagic the mean over the tensors, with factors.
    """
    if isinstance(optimizer, Automagic):
        return optimizer.mean_lr()
    group = optimizer.param_groups[0]
    return float(group["lr"]) / group.get(LR_FACTOR, 1.0) * float(group.get("d", 1.0))


def optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's whole state: tensors by name, and the other values, which JSON stores exactly.

    Tensors are named `optim.<index of the parameter>.<key>`, also if the optimizer works on the whole buffer of `flat`.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for key, values in _state_by_key(optimizer, flat).items():
        for index, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optim.{index}.{key}"] = value.detach().clone()
            else:
                scalars.setdefault(str(index), {})[key] = value
    groups = []
    for group in optimizer.param_groups:
        # Prodigy keeps its state here, not per parameter: d, d0, d_max, d_numerator, k.
        groups.append({key: value for key, value in group.items() if key != "params"})
    return tensors, {"kind": type(optimizer).__name__, "state": scalars, "groups": groups}


def _state_by_key(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> dict[str, dict[int, Any]]:
    """Return key -> index of the parameter -> state, for the parameters of `flat`."""
    state: dict[str, dict[int, Any]] = {}
    for index, parameter in enumerate(_parameters(optimizer, flat)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if parameter is not flat.whole:
                state.setdefault(key, {})[index] = value
            elif _block_of(key, value) is None:
                state[key] = dict.fromkeys(range(len(flat.shapes)), value)
            else:
                state[key] = dict(enumerate(flat.split(value, _block_of(key, value) or 1).values()))
    return state


def _block_of(key: str, value: Any) -> int | None:
    """Return how many elements of a parameter share a number of the state `key`, or None if all share the value."""
    if not isinstance(value, Tensor) or value.ndim == 0 or key.startswith("qmap"):
        return None
    return 256 if key.startswith("absmax") else 1


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    flat: FlatParameters,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
    where: str,
) -> None:
    """Restore the state that `optimizer_state` returned.

    Raises:
        WeightsError: it is the state of another optimizer.
    """
    parameters = _parameters(optimizer, flat)
    saved_groups = numbers["groups"]
    if numbers["kind"] != type(optimizer).__name__ or len(saved_groups) != len(optimizer.param_groups):
        message = f"holds the state of {numbers['kind']}, but this run uses {type(optimizer).__name__}"
        raise WeightsError(
            Problem(where, message, "use the optimizer that the checkpoint was saved with", "damaged-checkpoints")
        )
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        for key, value in saved.items():
            group[key] = _with_tuples(value)
    by_key: dict[str, dict[int, Any]] = {}
    for index, values in numbers["state"].items():
        for key, value in values.items():
            by_key.setdefault(key, {})[int(index)] = value
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        by_key.setdefault(key, {})[int(index)] = tensor
    for key, values in by_key.items():
        if parameters[0] is not flat.whole:
            for index, value in values.items():
                _set_state(optimizer, parameters[index], key, value)
            continue
        block = _block_of(key, values[0])
        whole = values[0] if block is None else flat.join(dict(zip(flat.shapes, _in_order(values), strict=True)), block)
        _set_state(optimizer, flat.whole, key, whole)


def _in_order(values: dict[int, Any]) -> list[Any]:
    return [values[index] for index in sorted(values)]


def _set_state(optimizer: torch.optim.Optimizer, parameter: Parameter, key: str, value: Any) -> None:
    """Put a copy of `value` into the state of `parameter`, where the optimizer would have put it."""
    if isinstance(value, Tensor):
        # torch keeps the step of AdamW on the CPU, so that reading it does not synchronise with the GPU.
        on_cpu = key == "step" and value.ndim == 0
        value = value.clone() if on_cpu else value.to(parameter.device, copy=True)
        # Only a buffer that bitsandbytes allocates itself is paged; any other tensor would stay on the GPU. It pages
        # the moments, which have the parameter's shape, and not the small tensors beside them (absmax, code).
        if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
            value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # pyright: ignore
    optimizer.state[parameter][key] = value


def _parameters(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> list[Parameter]:
    """Return the parameters of the optimizer in the order of `flat`, whatever its groups are."""
    is_whole = optimizer.param_groups[0]["params"][0] is flat.whole
    return [flat.whole] if is_whole else list(flat.views.values())
