"""AI Toolkit's optimizers and learning-rate schedules by name, with their defaults there."""

from collections.abc import Callable
from typing import Any, NamedTuple

from zimage_train.compat.aitoolkit.job import AIToolkitJob

Values = dict[str, Any]
DEFAULT_EPS = 1e-6
"""AI Toolkit passes it to the optimizers that have an eps, in place of the default of their libraries."""


class OptimizerMapping(NamedTuple):
    """The optimizer for a name of AI Toolkit, with the defaults there."""

    name: str
    weight_decay: float = 0.0
    eps: float | None = DEFAULT_EPS
    note: str = ""


_EIGHT_BIT = "is an 8-bit Adam of AI Toolkit's own with decoupled weight decay; here it is that of bitsandbytes"
_AUTOMAGIC = "finds its rates in another way here: a rate for each tensor, raised while its gradients agree"
OPTIMIZERS = {
    "adam": OptimizerMapping("adam"),
    "adamw": OptimizerMapping("adamw", 0.01),
    "adam8bit": OptimizerMapping("adam8bit"),
    "adamw8bit": OptimizerMapping("adamw8bit", 0.01),
    "adam8": OptimizerMapping("adam8bit", note=_EIGHT_BIT),
    "adamw8": OptimizerMapping("adamw8bit", note=_EIGHT_BIT),
    "ademamix8bit": OptimizerMapping("ademamix8bit", 0.01),
    "lion": OptimizerMapping("lion", eps=None),
    "lion8bit": OptimizerMapping("lion8bit", eps=None),
    "adagrad": OptimizerMapping("adagrad", eps=None),
    "adafactor": OptimizerMapping("adafactor", eps=None),
    "prodigy": OptimizerMapping("prodigy"),
    "prodigy8bit": OptimizerMapping("prodigy8bit"),
    "automagic": OptimizerMapping("automagic", eps=None, note=_AUTOMAGIC),
    "automagic2": OptimizerMapping("automagic", eps=None, note=_AUTOMAGIC),
}
"""AI Toolkit's name -> the optimizer. The weight decay is the default of the library that AI Toolkit uses."""
PREFIXES = ("prodigy8bit", "prodigy")
"""AI Toolkit takes every name with such a prefix for that optimizer."""
ADAFACTOR_SWITCHES = ("relative_step", "scale_parameter", "warmup_init")
"""Parameters that AI Toolkit sets to false, as they are here; true is an unknown parameter."""
MIN_PRODIGY_LR = 0.1
MAX_AUTOMAGIC_LR, AUTOMAGIC_LR = 1e-3, 1e-6


def optimizer_section(job: AIToolkitJob) -> Values:
    train = job.values["train"]
    name = train["optimizer"].lower()
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = prefix
            break
    mapping = OPTIMIZERS.get(name)
    if mapping is None:
        message = f"is {train['optimizer']!r} (is not possible here)"
        job.refuse("train.optimizer", message, f"use one of {', '.join(OPTIMIZERS)}", "unsupported-setting")
        return {}
    if mapping.note:
        job.note("train.optimizer", f"{name} {mapping.note}")
    params = dict(train["optimizer_params"])
    if name == "adafactor":
        params = {key: value for key, value in params.items() if key not in ADAFACTOR_SWITCHES or value}
    weight_decay = params.pop("weight_decay", mapping.weight_decay)
    defaults = {} if mapping.eps is None else {"eps": mapping.eps}
    return {"name": mapping.name, "lr": used_lr(job), "weight_decay": weight_decay, "params": defaults | params}


def used_lr(job: AIToolkitJob) -> float:
    """Return the learning rate: `train.lr`, unless the optimizer estimates the rate and is given that of another."""
    train = job.values["train"]
    lr, name = train["lr"], train["optimizer"].lower()
    if name.startswith("prodigy") and lr < MIN_PRODIGY_LR:
        job.note("train.lr", f"is {lr:g}, and 1 here: prodigy finds the rate itself; AI Toolkit multiplies the two")
        return 1.0
    if name.startswith("automagic") and lr > MAX_AUTOMAGIC_LR:
        job.note("train.lr", f"is {lr:g}, and {AUTOMAGIC_LR:g} here, as there: automagic finds the rate itself")
        return AUTOMAGIC_LR
    return lr


def _constant(job: AIToolkitJob, params: Values, lr: float) -> Values:
    if params.get("factor", 1) != 1:
        hint = "change train.lr instead"
        job.refuse("train.lr_scheduler_params.factor", "scales the whole run", hint, "unsupported-setting")
    return {"name": "constant"}


def _cosine(job: AIToolkitJob, params: Values, lr: float) -> Values:
    return {"name": "cosine", "params": {"end_factor": params.get("eta_min", 0.0) / lr}}


def _cosine_with_restarts(job: AIToolkitJob, params: Values, lr: float) -> Values:
    job.note("train.lr_scheduler", "cosine_with_restarts never restarts there, so it becomes cosine")
    return _cosine(job, params, lr)


def _linear(job: AIToolkitJob, params: Values, lr: float) -> Values:
    start, end = params.get("start_factor"), params.get("end_factor")
    if start is None and end is None:
        job.note("train.lr_scheduler", "linear falls to 0 here; AI Toolkit's rises from a third of lr to lr")
    elif start is None:
        job.note("train.lr_scheduler", "linear begins at lr here; AI Toolkit's begins at a third of it")
    elif start != 1:
        hint = "set it to 1, or use constant_with_warmup"
        job.refuse("train.lr_scheduler_params.start_factor", f"is {start}", hint, "unsupported-setting")
    if end is None:
        end = 0.0 if start is None else 1.0
    return {"name": "linear", "params": {"end_factor": end}}


def _constant_with_warmup(job: AIToolkitJob, params: Values, lr: float) -> Values:
    steps = params.get("num_warmup_steps", 1000)
    return {"name": "constant_with_warmup", "warmup_steps": steps} if steps else {"name": "constant"}


def _step(job: AIToolkitJob, params: Values, lr: float) -> Values:
    _note_fails_there(job, "step")
    step_params: Values = {}
    if "step_size" in params:
        step_params["every"] = params["step_size"]
    step_params["factor"] = params.get("gamma", 0.1)
    return {"name": "step", "params": step_params}


def _polynomial(job: AIToolkitJob, params: Values, lr: float) -> Values:
    _note_fails_there(job, "polynomial")
    polynomial_params = {"power": params.get("power", 1.0), "end_factor": params.get("lr_end", 1e-7) / lr}
    return {"name": "polynomial", "warmup_steps": params.get("num_warmup_steps", 0), "params": polynomial_params}


def _note_fails_there(job: AIToolkitJob, name: str) -> None:
    job.note("train.lr_scheduler", f"{name} stops AI Toolkit and works here")


ConvertSchedule = Callable[[AIToolkitJob, Values, float], Values]
"""Returns the settings of a schedule for (job, parameters, learning rate)."""
SCHEDULES: dict[str, tuple[ConvertSchedule, tuple[str, ...]]] = {
    "constant": (_constant, ("factor",)),
    "constant_with_warmup": (_constant_with_warmup, ("num_warmup_steps",)),
    "cosine": (_cosine, ("eta_min",)),
    "cosine_with_restarts": (_cosine_with_restarts, ("eta_min", "T_mult", "T_0")),
    "linear": (_linear, ("start_factor", "end_factor")),
    "step": (_step, ("step_size", "gamma")),
    "polynomial": (_polynomial, ("power", "lr_end", "num_warmup_steps")),
}
"""AI Toolkit's name -> the conversion of the schedule, and the parameters that it has there."""


def schedule_section(job: AIToolkitJob, lr: float) -> Values:
    train = job.values["train"]
    name, params = train["lr_scheduler"], dict(train["lr_scheduler_params"])
    if name not in SCHEDULES:
        hint = f"use one of {', '.join(SCHEDULES)}, or set schedule.name in the imported config"
        job.refuse("train.lr_scheduler", f"is {name!r} (is not possible here)", hint, "unsupported-setting")
        return {}
    if params.pop("total_iters", None) is not None:
        job.note("train.lr_scheduler_params.total_iters", "is left out: train.steps counts, there too")
    convert, param_names = SCHEDULES[name]
    is_valid = True
    for key, value in params.items():
        if key not in param_names:
            job.refuse(f"train.lr_scheduler_params.{key}", f"is unknown to {name}", "leave it out", "unknown-key")
            is_valid = False
        elif not isinstance(value, int | float):
            job.refuse(f"train.lr_scheduler_params.{key}", "is no number", "correct it")
            is_valid = False
    return convert(job, params, lr) if is_valid else {}
