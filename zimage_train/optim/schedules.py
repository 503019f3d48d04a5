"""The learning rate as a function of the step: a factor from 0 to 1, by name (torch-free).

Each schedule takes the steps since the warm-up, how many there are in all, and its parameters. The end factor is
reached after the last step, so no step is spent at a rate of zero.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import OptimizerSettings, ScheduleSettings

Params = Mapping[str, Any]
MIN_PRODIGY_LR = 0.1


def base_lr(settings: OptimizerSettings) -> float:
    """The learning rate before the schedule; Prodigy multiplies its own estimate by it, so less than 0.1 means 1."""
    if OPTIMIZERS[settings.name].finds_lr and settings.lr < MIN_PRODIGY_LR:
        return 1.0
    return settings.lr


def lr_factor(schedule: ScheduleSettings, step: int, steps: int) -> float:
    """The factor on the learning rate in `step` (1 to `steps`): linear warm-up, then the schedule."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    done, total = step - 1 - schedule.warmup_steps, max(steps - schedule.warmup_steps, 1)
    return SCHEDULE_FUNCTIONS[schedule.name](done, total, schedule.params)


def schedule_stretches(schedule: ScheduleSettings) -> bool:
    """Whether other steps in all mean another rate in each of them."""
    return schedule.name not in ("constant", "constant_with_warmup", "step")


def _constant(done: int, total: int, params: Params) -> float:
    return 1.0


def _cosine(done: int, total: int, params: Params) -> float:
    return _to_end(0.5 * (1.0 + math.cos(math.pi * done / total)), params)


def _cosine_with_restarts(done: int, total: int, params: Params) -> float:
    """Loshchilov and Hutter 2017, with cycles of equal length."""
    within = done * params.get("cycles", 1) % total / total
    return _to_end(0.5 * (1.0 + math.cos(math.pi * within)), params)


def _polynomial(done: int, total: int, params: Params) -> float:
    """The straight line, with the default power."""
    return _to_end((1.0 - done / total) ** params.get("power", 1.0), params)


def _step(done: int, total: int, params: Params) -> float:
    return params.get("factor", 0.1) ** (done // params["every"])


def _rex(done: int, total: int, params: Params) -> float:
    """Reflected exponential: (1 - p) / (1 - p / 2). Chen et al. 2022 (arXiv 2107.04197), eq. 1."""
    p = done / total
    return _to_end((1.0 - p) / (1.0 - p / 2.0), params)


def _one_cycle(done: int, total: int, params: Params) -> float:
    """Half a cosine up to the peak and another one down. Smith and Topin 2018 (arXiv 1708.07120)."""
    p, peak, start = done / total, params.get("peak_at", 0.3), params.get("start_factor", 0.04)
    if p < peak:
        return start + (1.0 - start) * 0.5 * (1.0 - math.cos(math.pi * p / peak))
    return _to_end(0.5 * (1.0 + math.cos(math.pi * (p - peak) / (1.0 - peak))), params)


def _to_end(left: float, params: Params) -> float:
    """`left` of the way from the end factor to 1."""
    end = params.get("end_factor", 0.0)
    return end + (1.0 - end) * left


SCHEDULE_FUNCTIONS: dict[str, Callable[[int, int, Params], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "linear": _polynomial,
    "polynomial": _polynomial,
    "step": _step,
    "rex": _rex,
    "one_cycle": _one_cycle,
}
