"""Learning-rate schedules by name: a factor from 0 to 1 as a function of the step (torch-free).

Each schedule takes the number of steps done since the warm-up, the number of steps after the warm-up, and its
parameters. The end factor would be reached one step after the last, so no step runs at a learning rate of zero.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from zimage_train.config.optimizers import OPTIMIZERS, OptimizerSettings, ScheduleSettings

Params = Mapping[str, Any]
MIN_PRODIGY_LR = 0.1


def base_lr(settings: OptimizerSettings) -> float:
    """Return the learning rate before the schedule; 1 for Prodigy, unless at least 0.1 is set."""
    # Prodigy multiplies its own estimate by this rate. A value such as 1e-4 was meant for another optimizer, and would
    # all but stop the training.
    if OPTIMIZERS[settings.name].finds_lr and settings.lr < MIN_PRODIGY_LR:
        return 1.0
    return settings.lr


def lr_factor(schedule: ScheduleSettings, step: int, steps: int) -> float:
    """Return the factor of the learning rate in `step`, from 1 to `steps`: linear warm-up, then the schedule."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    done, total = step - 1 - schedule.warmup_steps, max(steps - schedule.warmup_steps, 1)
    return SCHEDULE_FUNCTIONS[schedule.name](done, total, schedule.params)


def depends_on_total_steps(schedule: ScheduleSettings) -> bool:
    """Return whether another number of steps in all would change the learning rate of each step."""
    return schedule.name not in ("constant", "constant_with_warmup", "step")


def _constant(done: int, total: int, params: Params) -> float:
    return 1.0


def _cosine(done: int, total: int, params: Params) -> float:
    return _decay_to_end(0.5 * (1.0 + math.cos(math.pi * done / total)), params)


def _cosine_with_restarts(done: int, total: int, params: Params) -> float:
    """Return a cosine decay that restarts, in cycles of equal length (SGDR, arXiv 1608.03983)."""
    # The remainder is taken before the division, in whole numbers: rounding cannot move a restart by a step.
    progress = done * params.get("cycles", 1) % total / total
    return _decay_to_end(0.5 * (1.0 + math.cos(math.pi * progress)), params)


def _polynomial(done: int, total: int, params: Params) -> float:
    """Return a polynomial decay; with the default power of 1 it is linear."""
    return _decay_to_end((1.0 - done / total) ** params.get("power", 1.0), params)


def _step(done: int, total: int, params: Params) -> float:
    return params.get("factor", 0.1) ** (done // params["every"])


def _rex(done: int, total: int, params: Params) -> float:
    """Return the reflected exponential (1 - p) / (1 - p / 2); Chen et al. 2022 (arXiv 2107.04197), eq. 1."""
    p = done / total
    return _decay_to_end((1.0 - p) / (1.0 - p / 2.0), params)


def _one_cycle(done: int, total: int, params: Params) -> float:
    """Return half a cosine up to the peak, then half a cosine down; Smith and Topin 2018 (arXiv 1708.07120)."""
    p, peak, start = done / total, params.get("peak_at", 0.3), params.get("start_factor", 0.04)
    if p < peak:
        return start + (1.0 - start) * 0.5 * (1.0 - math.cos(math.pi * p / peak))
    return _decay_to_end(0.5 * (1.0 + math.cos(math.pi * (p - peak) / (1.0 - peak))), params)


def _decay_to_end(decay: float, params: Params) -> float:
    """Map `decay`, which runs from 1 to 0, to the range from 1 to the end factor."""
    end = params.get("end_factor", 0.0)
    return end + (1.0 - end) * decay


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
