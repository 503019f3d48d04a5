"""AI Toolkit's optimizers and schedules by name, with the defaults that each of them has there."""

from collections.abc import Callable
from typing import Any, NamedTuple

from zimage_train.compat.aitoolkit.job import AIToolkitJob

Values = dict[str, Any]
EPS = 1e-6


class OptimizerMapping(NamedTuple):
    """An optimizer here, and what one of AI Toolkit's names brings with it."""

    name: str
    weight_decay: float = 0.0
    eps: float | None = EPS
    note: str = ""


_EIGHT_BIT = "is an 8-bit Adam of AI Toolkit's own with decoupled weight decay; here it is that of bitsandbytes"
_AUTOMAGIC = "finds its rates in another way here: one for each tensor, raised while its gradients agree"
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
"""Weight decay is each library's default, which holds there unless optimizer_params says otherwise."""
PREFIXES = ("prodigy8bit", "prodigy")
"""Every name that begins so is that optimizer there."""
ADAFACTOR_SWITCHES = ("relative_step", "scale_parameter", "warmup_init")
LEAST_PRODIGY_LR = 0.1
MOST_AUTOMAGIC_LR, AUTOMAGIC_LR = 1e-3, 1e-6


def optimizer(job: AIToolkitJob) -> Values:
    there = job.values["train"]
    name = there["optimizer"].lower()
    name = next((prefix for prefix in PREFIXES if name.startswith(prefix)), name)
    kind = OPTIMIZERS.get(name)
    if kind is None:
        todo = f"use one of {', '.join(OPTIMIZERS)}"
        job.refuse("train.optimizer", f"is {there['optimizer']!r} (is not possible here)", todo)
        return {}
    if kind.note:
        job.note("train.optimizer", f"{name} {kind.note}")
    params = dict(there["optimizer_params"])
    if name == "adafactor":
        params = {key: value for key, value in params.items() if key not in ADAFACTOR_SWITCHES or value}
    weight_decay = params.pop("weight_decay", kind.weight_decay)
    eps = {} if kind.eps is None else {"eps": kind.eps}
    return {"name": kind.name, "lr": used_lr(job), "weight_decay": weight_decay, "params": eps | params}


def used_lr(job: AIToolkitJob) -> float:
    """`train.lr`, or 1 for a Prodigy that is given less than 0.1."""
    there = job.values["train"]
    lr = there["lr"]
    if there["optimizer"].lower().startswith("prodigy") and lr < LEAST_PRODIGY_LR:
        job.note("train.lr", f"is {lr:g}, and 1 here: prodigy finds the rate itself; AI Toolkit multiplies the two")
        return 1.0
    if there["optimizer"].lower().startswith("automagic") and lr > MOST_AUTOMAGIC_LR:
        job.note("train.lr", f"is {lr:g}, and {AUTOMAGIC_LR:g} here, as there: automagic finds the rate itself")
        return AUTOMAGIC_LR
    return lr


def _constant(job: AIToolkitJob, params: Values, lr: float) -> Values:
    if params.get("factor", 1) != 1:
        job.refuse("train.lr_scheduler_params.factor", "scales the whole run", "change train.lr instead")
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
        job.refuse("train.lr_scheduler_params.start_factor", f"is {start}", "set it to 1, or use constant_with_warmup")
    default = 0.0 if start is None else 1.0
    return {"name": "linear", "params": {"end_factor": default if end is None else end}}


def _constant_with_warmup(job: AIToolkitJob, params: Values, lr: float) -> Values:
    steps = params.get("num_warmup_steps", 1000)
    return {"name": "constant_with_warmup", "warmup_steps": steps} if steps else {"name": "constant"}


def _step(job: AIToolkitJob, params: Values, lr: float) -> Values:
    _stops_there(job, "step")
    every = {"every": params["step_size"]} if "step_size" in params else {}
    return {"name": "step", "params": every | {"factor": params.get("gamma", 0.1)}}


def _polynomial(job: AIToolkitJob, params: Values, lr: float) -> Values:
    _stops_there(job, "polynomial")
    shape = {"power": params.get("power", 1.0), "end_factor": params.get("lr_end", 1e-7) / lr}
    return {"name": "polynomial", "warmup_steps": params.get("num_warmup_steps", 0), "params": shape}


def _stops_there(job: AIToolkitJob, name: str) -> None:
    job.note("train.lr_scheduler", f"{name} stops AI Toolkit and works here")


Schedule = Callable[[AIToolkitJob, Values, float], Values]
SCHEDULES: dict[str, tuple[Schedule, tuple[str, ...]]] = {
    "constant": (_constant, ("factor",)),
    "constant_with_warmup": (_constant_with_warmup, ("num_warmup_steps",)),
    "cosine": (_cosine, ("eta_min",)),
    "cosine_with_restarts": (_cosine_with_restarts, ("eta_min", "T_mult", "T_0")),
    "linear": (_linear, ("start_factor", "end_factor")),
    "step": (_step, ("step_size", "gamma")),
    "polynomial": (_polynomial, ("power", "lr_end", "num_warmup_steps")),
}
"""What makes a schedule of ours of one there, and the parameters it reads."""


def schedule(job: AIToolkitJob, lr: float) -> Values:
    there = job.values["train"]
    name, params = there["lr_scheduler"], dict(there["lr_scheduler_params"])
    if name not in SCHEDULES:
        todo = f"use one of {', '.join(SCHEDULES)}, or set schedule.name in the imported config"
        job.refuse("train.lr_scheduler", f"is {name!r} (is not possible here)", todo)
        return {}
    if params.pop("total_iters", None) is not None:
        job.note("train.lr_scheduler_params.total_iters", "is left out: train.steps counts, there too")
    make, known = SCHEDULES[name]
    wrong = [key for key, value in params.items() if key not in known or not isinstance(value, int | float)]
    for key in wrong:
        what, todo = ("is no number", "correct it") if key in known else (f"is unknown to {name}", "leave it out")
        job.refuse(f"train.lr_scheduler_params.{key}", what, todo)
    return {} if wrong else make(job, params, lr)
