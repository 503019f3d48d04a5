"""Rows of the adapter, the steps, their noise, loss, optimizer and schedule."""

import math
from statistics import NormalDist
from typing import Any

from proofs import numbers
from proofs.rows import ANOTHER, EQUAL, LESS, MORE, Expected, Row, becomes, is_close, plus, same_as, such_that, times
from proofs.trials import LEFT_OUT

LR = 1e-3
ABOVE_ZERO = such_that("above 0", lambda without, with_it: without == 0.0 < with_it)
CLASS = {"data.1.folder": "{class}", "data.1.resolution": [64], "data.1.regularization": True}
LOKR = {"lora.type": "lokr", "lora.rank": LEFT_OUT}
IMITATION = {
    "train.method": "trajectory_imitation",
    "lora.init_from": "{trained}",
    "model.adapter": None,
    "data.0.caption_dropout": 0.0,
    "teacher.steps": 9,
}

ADAPTER = [
    Row("lora.type", "lokr", numbers.KEYS, becomes(["alpha", "lokr_w1", "lokr_w2"]), beside={"lora.rank": LEFT_OUT}),
    Row("lora.type", "loha", numbers.PARAMETERS, times(2)),
    Row(
        "lora.type",
        "dora",
        numbers.KEYS,
        becomes(["alpha", "dora_scale", "lora_A.weight", "lora_B.weight"]),
        given={"model.adapter": None},
    ),
    Row(
        "lora.type",
        "oft",
        numbers.KEYS,
        becomes(["alpha", "oft_blocks"], ["alpha", "lora_A.weight", "lora_B.weight"]),
        given={"model.adapter": None},
    ),
    Row("lora.rank", 8, numbers.PARAMETERS, times(2)),
    Row("lora.factor", 4, numbers.PARAMETERS, MORE, given=LOKR),
    Row("lora.factor", "auto", numbers.PARAMETERS, LESS, given=LOKR),
    Row("lora.alpha", 2.0, numbers.GRADIENT, times(0.5), neutral=4.0),
    Row("lora.targets", ["attention"], numbers.MODULES, becomes(24, 42), neutral=["attention", "feed_forward"]),
    Row("lora.targets", ["attention", "feed_forward", "adaln", "refiners"], numbers.MODULES, MORE),
    Row("lora.targets", r"layers\.\d+\.attention\.to_q", numbers.MODULES, becomes(6, 42)),
    Row("lora.rslora", True, numbers.GRADIENT, times(2.0)),
    Row(
        "lora.rslora",
        True,
        numbers.GRADIENT,
        EQUAL,
        given={"lora.alpha": 4.0},
        beside={"lora.alpha": 2.0},
        neutral=False,
        lora="same",
    ),
    Row(
        "lora.ranks",
        {"attention": 8},
        numbers.RANKS,
        becomes([4, 8], [4]),
        neutral={"lora.ranks": {"attention": 4}},
    ),
    Row("lora.start", "orthogonal", numbers.GRADIENT, ANOTHER),
    Row("lora.start", "pissa", numbers.RANKS, becomes([8], [4])),
    Row("lora.dropout", 0.5, numbers.GRADIENT, ANOTHER),
    Row("lora.rank_dropout", 0.5, numbers.GRADIENT, ANOTHER),
    Row("lora.module_dropout", 0.5, numbers.GRADIENT, LESS),
    Row("lora.init_from", "{trained}", numbers.LOSS, ANOTHER),
]

STEPS = [
    Row("train.method", "de_distill", numbers.LOSS, ANOTHER, given={"model.adapter": None}),
    Row(
        "train.method",
        "trajectory_imitation",
        numbers.LOSS,
        ANOTHER,
        given={key: value for key, value in IMITATION.items() if key not in ("train.method", "teacher.steps")},
        beside={"teacher.steps": 9},
    ),
    Row("teacher.steps", 18, numbers.LOSS, ANOTHER, given=IMITATION),
    Row("teacher.guidance", 3.0, numbers.LOSS, ANOTHER, given=IMITATION),
    Row("train.steps", 3, numbers.STEPS, becomes(3, 2)),
    Row("train.epochs", 1.0, numbers.STEPS, becomes(4, 2), neutral=0.5),
    Row("train.batch_size", 4, numbers.BATCH, becomes(4, 2)),
    Row("train.grad_accumulation", 2, numbers.BATCH, becomes(4, 2)),
    Row("train.max_grad_norm", 1e-3, numbers.CHANGE, ANOTHER, neutral=1000.0),
    Row(
        "train.regularization_share",
        0.75,
        numbers.SHARE,
        becomes(0.75, 0.0),
        beside=CLASS,
        neutral=0.9,
    ),
    Row(
        "train.reproducible",
        False,
        numbers.ORDER_SECONDS,
        LESS,
        lora="same",
        given={"model.dtype": "bf16"},
        gpu="fixed order of summation",
    ),
]

BESIDE = {"train.beside.0.file": "{distillpatch}"}
BESIDES = [
    Row("train.beside", ["{distillpatch}"], numbers.LOSS, ANOTHER),
    Row(
        "train.beside.0.file",
        "{adapter_v1}",
        numbers.LOSS,
        same_as({"train.beside.0.file": LEFT_OUT, "model.adapter": "{adapter_v1}"}, "that of it as training adapter"),
        given=BESIDE | {"model.adapter": None},
        neutral="{distillpatch}",
    ),
    Row(
        "train.beside.0.weight",
        0.0,
        numbers.LOSS,
        same_as({"train.beside.0.file": LEFT_OUT}, "that without it"),
        given=BESIDE,
    ),
]

SLIDER = {"train.method": "slider", "model.adapter": None, "slider.positive": "[prompt], large"}
ANCHORED = SLIDER | {"slider.anchor": "a red circle"}
PAIRS = {"train.method": "pairs", "data.0.negative": "{class}"}
SLIDERS = [
    Row(
        "train.method",
        "slider",
        numbers.LOSS,
        ANOTHER,
        given={"model.adapter": None},
        beside={"slider.positive": "[prompt], large"},
    ),
    Row("slider.positive", "[prompt], small", numbers.LOSS, ANOTHER, given=SLIDER, neutral="[prompt], large"),
    Row("slider.negative", "[prompt], small", numbers.LOSS, ANOTHER, given=SLIDER),
    Row("slider.guidance", 6.0, numbers.LOSS, times(4.0), given=SLIDER),
    Row("slider.anchor", "a red circle", numbers.PRESERVATION, ABOVE_ZERO, given=SLIDER),
    Row("slider.anchor_weight", 3.0, numbers.SECOND_GRADIENT, ANOTHER, given=ANCHORED),
    Row("train.method", "pairs", numbers.LOSS, ANOTHER, beside={"data.0.negative": "{transparent}"}),
    Row(
        "data.0.negative",
        "{transparent}",
        numbers.GRADIENT,
        such_that("above 0, which it is for two equal images", lambda a, b: a < 1e-6 < b),
        given=PAIRS,
        neutral="{class}",
    ),
]

TURBO_GRID = [3.0 * index / (8.0 + 2.0 * index) for index in range(1, 9)]
"""Turbo's sigmas: index / 8, shifted by 3."""


def _through(text: str, function: Any) -> Expected:
    """Return an expectation: each number is this function of that of the run without the setting."""
    return such_that(text, lambda without, with_it: is_close(with_it, [function(one) for one in without], 1e-4))


def _is_bell_of(without: list[float], with_it: list[float]) -> bool:
    below = [sigma - math.sin(2.0 * math.pi * sigma) / (2.0 * math.pi) for sigma in with_it]
    return is_close(below, without, 1e-3)


def _is_on_grid(_: list[float], with_it: list[float]) -> bool:
    return max(map(_distance_from_grid, with_it)) < 1e-6


def _is_near_grid(without: list[float], with_it: list[float]) -> bool:
    moves = [abs(one - other) for one, other in zip(without, with_it, strict=True)]
    return max(moves) > 0.0 and max(map(_distance_from_grid, with_it)) <= 0.05


def _distance_from_grid(sigma: float) -> float:
    return min(abs(sigma - level) for level in TURBO_GRID)


def _is_one_in_each_eighth(_: list[float], with_it: list[float]) -> bool:
    return sorted(int(8 * sigma) for sigma in with_it) == list(range(8))


SIGMOID = {"timesteps.type": "sigmoid"}
HALF = {"timesteps.type": "fixed", "timesteps.sigmas": [0.5]}
FLUX_AT_64_PX = math.exp(0.5 + 0.65 / 3840 * (16 - 256))
QWEN_AT_64_PX = math.exp(0.5 + 0.4 / 7936 * (16 - 256))
BELL_AT_HALF = (1.0 - math.exp(-0.5)) / (
    sum(math.exp(-2.0 * (k / 1e5 - 0.5) ** 2) for k in range(100_000)) / 1e5 - math.exp(-0.5)
)

NOISE = [
    Row("timesteps.type", "linear", numbers.LOSS, ANOTHER),
    Row(
        "timesteps.type",
        "sigmoid",
        numbers.SIGMAS,
        _through("1 / (1 + exp(-z))", lambda u: 1.0 / (1.0 + math.exp(-NormalDist().inv_cdf(u)))),
    ),
    Row(
        "timesteps.type",
        "logsnr",
        numbers.SIGMAS,
        _through("1 / (1 + exp(-z / 2))", lambda u: 1.0 / (1.0 + math.exp(-NormalDist().inv_cdf(u) / 2.0))),
    ),
    Row("timesteps.type", "uniform_shift", numbers.ODDS, times(3.0)),
    Row(
        "timesteps.type",
        "cosine_bell",
        numbers.SIGMAS,
        such_that("the inverse of sigma - sin(2 pi sigma) / (2 pi)", _is_bell_of),
    ),
    Row("timesteps.type", "turbo_grid", numbers.SIGMAS, such_that("of Turbo's eight", _is_on_grid)),
    Row("timesteps.type", "fixed", numbers.SIGMAS, becomes([0.5] * 4), beside={"timesteps.sigmas": [0.5]}),
    Row("timesteps.shift", 2.0, numbers.ODDS, times(2.0), given=SIGMOID, neutral=1.0),
    Row("timesteps.shift", "variant", numbers.ODDS, times(3.0), given=SIGMOID),
    Row("timesteps.shift", "flux", numbers.ODDS, times(FLUX_AT_64_PX), given=SIGMOID),
    Row("timesteps.shift", "qwen", numbers.ODDS, times(QWEN_AT_64_PX), given=SIGMOID),
    Row("timesteps.mean", 1.0, numbers.LOGITS, plus(1.0), given=SIGMOID),
    Row("timesteps.scale", 0.5, numbers.LOGITS, times(0.5), given=SIGMOID),
    Row("timesteps.sigmas", [0.25], numbers.SIGMAS, becomes([0.25] * 4, [0.5] * 4), given=HALF, neutral=[0.5]),
    Row(
        "timesteps.jitter",
        0.05,
        numbers.SIGMAS,
        such_that("within 0.05 of Turbo's eight", _is_near_grid),
        given={"timesteps.type": "turbo_grid"},
    ),
    Row("timesteps.bias", "high_noise", numbers.SIGMAS, such_that("higher on average", lambda a, b: sum(a) < sum(b))),
    Row("timesteps.bias", "low_noise", numbers.SIGMAS, such_that("lower on average", lambda a, b: sum(a) > sum(b))),
    Row("timesteps.min", 0.6, numbers.SIGMAS, such_that("0.6 at the least", lambda a, b: min(a) < 0.6 <= min(b))),
    Row("timesteps.max", 0.6, numbers.SIGMAS, such_that("0.6 at the most", lambda a, b: max(a) > 0.6 >= max(b))),
    Row(
        "timesteps.stratified",
        True,
        numbers.SIGMAS,
        such_that("one in each eighth", _is_one_in_each_eighth),
        given={"train.epochs": 1.0},
    ),
    Row(
        "timesteps.weight",
        "bell",
        numbers.LOSS,
        times(BELL_AT_HALF, 1e-4),
        given=HALF,
        neutral=[[0.0, 1.0], [1.0, 1.0]],
    ),
    Row("timesteps.weight", [[0.0, 2.0], [1.0, 2.0]], numbers.LOSS, times(2.0), given={"timesteps.type": "linear"}),
    Row(
        "timesteps.weight",
        "aitoolkit",
        numbers.LOSS,
        same_as({"timesteps.type": "weighted"}, "that of weighted"),
        given={"timesteps.type": "linear"},
    ),
    Row("timesteps.offset_noise", 0.1, numbers.LOSS, ANOTHER),
]

SNR_TOP = (1.0 - 1.0 / (1.0 + math.sqrt(5.0))) ** 2
SNR_AT_HALF = 0.25 / SNR_TOP

LOSS = [
    Row("loss.type", "mae", numbers.GRADIENT, ANOTHER),
    Row("loss.type", "huber", numbers.GRADIENT, LESS, neutral={"loss.type": "huber", "loss.delta": 1000.0}),
    Row("loss.type", "pseudo_huber", numbers.GRADIENT, LESS),
    Row("loss.delta", 0.5, numbers.GRADIENT, MORE, given={"loss.type": "huber"}),
    Row("loss.detail", 3.0, numbers.GRADIENT, MORE),
    Row(
        "loss.min_snr",
        5.0,
        numbers.GRADIENT,
        times(SNR_AT_HALF),
        given=HALF,
        neutral={"loss.min_snr": 5.0, "loss.min_snr_floor": 1.0},
    ),
    Row("loss.min_snr_floor", 0.9, numbers.GRADIENT, times(0.9 / SNR_AT_HALF), given=HALF | {"loss.min_snr": 5.0}),
    Row("guidance.differential", 3.0, numbers.GRADIENT, times(3.0), neutral=1.0),
    Row("guidance.contrastive", 3.0, numbers.GRADIENT, ANOTHER, neutral=1.0),
    Row(
        "guidance.contrastive_schedule",
        "sigma",
        numbers.GRADIENT,
        same_as(HALF | {"guidance.contrastive": 2.0}, "that of contrastive 2: 1 + (3 - 1) 0.5"),
        given=HALF | {"guidance.contrastive": 3.0},
    ),
    Row("guidance.cfg_zero", True, numbers.GRADIENT, ANOTHER, given={"guidance.contrastive": 3.0}),
]

PRESERVED = {"preserve.kind": "trigger", "preserve.class_word": "circle"}
PRESERVE = [
    Row(
        "preserve.kind",
        "trigger",
        numbers.PRESERVATION,
        ABOVE_ZERO,
        beside={"preserve.class_word": "circle"},
        neutral={"preserve.kind": None, "preserve.weight": 3.0, "preserve.class_word": "dog"},
    ),
    Row("preserve.kind", "blank", numbers.PRESERVATION, ABOVE_ZERO),
    Row("preserve.class_word", "square", numbers.PRESERVATION, ANOTHER, given=PRESERVED),
    Row("preserve.weight", 3.0, numbers.SECOND_GRADIENT, ANOTHER, given=PRESERVED),
]

ONE_STEP = {"train.steps": 1}
OPTIMIZER_NAMES = (
    "adam",
    "adam8bit",
    "adamw8bit",
    "ademamix",
    "ademamix8bit",
    "lion",
    "lion8bit",
    "prodigy",
    "prodigy8bit",
    "adafactor",
    "adagrad",
    "automagic",
    "adamw_schedulefree",
    "stable_adamw",
    "adopt",
    "came",
    "muon",
)
OPTIMIZER = [
    *(Row("optimizer.name", name, numbers.CHANGE, ANOTHER) for name in OPTIMIZER_NAMES),
    Row(
        "optimizer.name",
        "paged_adamw8bit",
        numbers.LOSSES,
        EQUAL,
        given={"optimizer.name": "adamw8bit"},
        lora="same",
        gpu="paged_adamw8bit",
    ),
    Row("optimizer.lr", 2e-3, numbers.RATES, times(2.0)),
    Row(
        "optimizer.lr_factors",
        {"attention": 2.0, "feed_forward": 2.0},
        numbers.CHANGE_OF_B,
        times(2.0, 1e-4),
        given=ONE_STEP,
        neutral={"optimizer.lr_factors": {"attention": 1.0}},
    ),
    Row("optimizer.lora_plus", 4.0, numbers.CHANGE_OF_B, times(4.0, 1e-4), given=ONE_STEP),
    Row("optimizer.weight_decay", 0.5, numbers.CHANGE, LESS),
    Row(
        "optimizer.params",
        {"betas": [0.5, 0.9]},
        numbers.CHANGE,
        ANOTHER,
        neutral={"optimizer.params": {"betas": [0.9, 0.999]}},
    ),
]

SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "constant_with_warmup": ({"schedule.warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
    "cosine": ({}, [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    "cosine_with_restarts": ({"schedule.params": {"cycles": 2}}, [1.0, 0.5, 1.0, 0.5]),
    "linear": ({}, [1.0, 0.75, 0.5, 0.25]),
    "polynomial": ({"schedule.params": {"power": 2.0}}, [1.0, 0.5625, 0.25, 0.0625]),
    "step": ({"schedule.params": {"every": 2, "factor": 0.5}}, [1.0, 1.0, 0.5, 0.5]),
    "rex": ({}, [1.0, 0.75 / 0.875, 0.5 / 0.75, 0.25 / 0.625]),
    "one_cycle": ({"schedule.params": {"peak_at": 0.5, "start_factor": 0.1}}, [0.1, 0.55, 1.0, 0.5]),
}
FOUR = {"train.steps": 4}
FLAT: dict[str, dict[str, Any]] = {
    "linear": {"schedule.name": "linear", "schedule.params": {"end_factor": 1.0}},
    "cosine": {"schedule.name": "cosine", "schedule.params": {"end_factor": 1.0}},
    "cosine_with_restarts": {
        "schedule.name": "cosine_with_restarts",
        "schedule.params": {"end_factor": 1.0, "cycles": 2},
    },
    "polynomial": {"schedule.name": "polynomial", "schedule.params": {"end_factor": 1.0}},
    "rex": {"schedule.name": "rex", "schedule.params": {"end_factor": 1.0}},
    "step": {"schedule.name": "step", "schedule.params": {"every": 4}},
}
SCHEDULE = [
    *(
        Row(
            "schedule.name",
            name,
            numbers.RATES,
            becomes([LR * factor for factor in factors], [LR] * 4),
            given=FOUR,
            beside=beside,
            neutral=FLAT.get(name),
        )
        for name, (beside, factors) in SCHEDULES.items()
    ),
    Row("schedule.warmup_steps", 4, numbers.RATES, becomes([LR * 0.25, LR * 0.5, LR * 0.75, LR], [LR] * 4), given=FOUR),
    Row(
        "schedule.params",
        {"end_factor": 0.5},
        numbers.RATES,
        becomes([LR, LR * 0.875, LR * 0.75, LR * 0.625]),
        given=FOUR | {"schedule.name": "linear"},
    ),
]

TABLE = [*ADAPTER, *STEPS, *BESIDES, *SLIDERS, *NOISE, *LOSS, *PRESERVE, *OPTIMIZER, *SCHEDULE]
