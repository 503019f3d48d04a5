"""Configs of tiny runs on the miniature, drawn from the schema: a few settings of each away from what is usual."""

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st

from zimage_train import mini
from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.types import SCHEDULE_PARAMS

from config_texts import OPTIONS
from mini_config import merge

NOT_DRAWN = {
    *("name", "output_dir", "cache.folder", "train.steps", "train.epochs", "log.wandb", "memory.budget_gb"),
    *("model.extras", "model.text_encoder", "model.tokenizer", "model.vae", "data[].folder", "data[].metadata"),
    *("data[].prompts", "data[].negative", "lora.init_from", "teacher.steps", "teacher.guidance", "save.keep"),
    *("optimizer.params", "schedule.params", "slider.positive", "slider.negative", "save.checkpoint_minutes"),
    *("train.beside[].file", "train.beside[].weight", "sample.prompts[].prompt", "sample.prompts[].negative"),
    *("sample.prompts[].seed", "sample.prompts[].width", "sample.prompts[].height", "sample.extra_loras[].file"),
    *("sample.extra_loras[].weight", "model.variant", "model.path", "sample.width", "sample.height"),
    *("data[].caption_ext", "data[].resolution", "validation.folder", "validation.resolution"),
}
"""Options that have a single value here, or are drawn with others by `sections`."""
LORA = str(mini.DISTILLPATCH)
VALUES: dict[str, list[Any]] = {
    "seed": [0, 2**63 - 1],
    "model.adapter": [None, str(mini.ADAPTER_V2)],
    "model.adapter_strength": [0.0, 0.5, 2.0],
    "data[].max_pixels": [1024, 4096],
    "data[].repeats": [2],
    "data[].batch_size": [1, 3],
    "data[].trigger": [None, "zorb", "a zorb!"],
    "data[].default_caption": ["a thing"],
    "data[].caption_dropout": [0.0, 0.5, 1.0],
    "data[].keep_tags": [1],
    "data[].tag_dropout": [0.5],
    "data[].mask": ["alpha"],
    "data[].mask_floor": [0.0, 0.5],
    "data[].mask_prior": [1.0],
    "data[].weight": [0.1, 3.0],
    "lora.rank": [1, 2, 3, 8, 16, None],
    "lora.factor": ["auto", 2, 4],
    "lora.alpha": [1.0, 0.5],
    "lora.ranks": [{"attention": 2}, {"layers[.]0[.].+": 6}, {"refiners": 2}],
    "lora.targets": [["attention"], ["attention", "feed_forward", "adaln", "refiners"], "layers[.]1[.]attention.+"],
    "lora.dropout": [0.3],
    "lora.rank_dropout": [0.3],
    "lora.module_dropout": [0.3],
    "train.batch_size": [1, 3],
    "train.grad_accumulation": [2, 3],
    "train.max_grad_norm": [None, 0.01],
    "train.regularization_share": [0.3],
    "slider.guidance": [1.0],
    "slider.anchor": ["a dog"],
    "slider.anchor_weight": [0.5],
    "timesteps.shift": ["flux", "qwen", "variant", 3.0],
    "timesteps.mean": [1.0],
    "timesteps.scale": [0.5],
    "timesteps.sigmas": [[0.9, 0.5], [1.0]],
    "timesteps.jitter": [0.05],
    "timesteps.min": [0.2],
    "timesteps.max": [0.8],
    "timesteps.weight": ["bell", "aitoolkit", [[0.0, 1.0], [1.0, 0.5]]],
    "timesteps.offset_noise": [0.1],
    "loss.delta": [0.5],
    "loss.detail": [0.0, 3.0],
    "loss.min_snr": [5.0],
    "loss.min_snr_floor": [0.0, 1.0],
    "guidance.differential": [3.0],
    "guidance.contrastive": [3.0],
    "preserve.class_word": ["thing"],
    "preserve.weight": [0.5],
    "optimizer.lr": [1e-4, 1e-2, 1.0],
    "optimizer.weight_decay": [0.0, 0.1],
    "optimizer.lr_factors": [{"attention": 0.5}],
    "optimizer.lora_plus": [16.0],
    "schedule.warmup_steps": [2, 8],
    "ema.decay": [0.5, 0.99],
    "memory.offload": [0, 0.5, 1.0],
    "sample.every": [1, 2, 3],
    "sample.negative": ["blurry"],
    "sample.steps": [1, 2],
    "sample.guidance": [0.0, 1.5],
    "sample.seed": [3],
    "sample.lora_weights": [[1.0, 0.5]],
    "sample.compare_on": [str(mini.TURBO)],
    "validation.every": [1, 2, None],
    "save.every": [1, 2, 3, None],
}


def choices(option: str, annotation: Any) -> list[Any]:
    """The values that an option is drawn from: those of `VALUES`, or all that its type has."""
    if option in VALUES:
        return VALUES[option]
    found: list[Any] = []
    kind = get_origin(annotation)
    if annotation is bool:
        return [True, False]
    if kind is Literal:
        return list(get_args(annotation))
    if kind in (Union, types.UnionType, Annotated):
        for inner in get_args(annotation)[: 1 if kind is Annotated else None]:
            found += [None] if inner is type(None) else choices(option, inner)
        return found
    raise AssertionError(f"{option}: add values to draw to VALUES, or the option to NOT_DRAWN")


CHOICES = {name: choices(name, field.annotation) for name, field in OPTIONS.items() if name not in NOT_DRAWN}
PARAMS = {
    "betas": {2: [0.8, 0.9], 3: [0.8, 0.9, 0.99]},
    "end_factor": 0.2,
    "cycles": 2,
    "power": 2.0,
    "every": 2,
    "factor": 0.5,
    "start_factor": 0.1,
    "peak_at": 0.5,
}


def nested(option: str, value: Any) -> dict[str, Any]:
    """`{"lora": {"rank": 4}}` for `lora.rank`; of `data`, the settings of the first entry stand in a section."""
    values: Any = value
    for part in reversed(option.replace("[]", "").split(".")):
        values = {part: values}
    return values


@st.composite
def drawn_values(draw: st.DrawFn, output: Path, cache: Path) -> dict[str, Any]:
    """Plain values of a run of four steps, with up to four settings drawn from all that the schema has."""
    values: dict[str, Any] = {
        "name": "drawn",
        "output_dir": str(output),
        "seed": 7,
        "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"},
        "data": {"trigger": "zorb"},
        "cache": {"folder": str(cache)},
        "lora": {"rank": 4},
        "train": {"steps": 4, "batch_size": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "sample": {"every": None, "first": False, "width": 64, "height": 64, "steps": 2},
        "save": {"every": 2, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    for option in draw(st.lists(st.sampled_from(sorted(CHOICES)), min_size=1, max_size=4, unique=True)):
        values = merge(values, nested(option, draw(st.sampled_from(CHOICES[option]))))
    values = merge(values, draw(st.sampled_from(SETS)))
    values = merge(values, _schedule_params(values) | _without_rank(values))
    entry = {"folder": str(mini.IMAGES), "resolution": [64], **values["data"]}
    entries: list[dict[str, Any]] = [entry]
    if draw(st.integers(0, 4)) == 0:
        entries.append({"folder": str(mini.STYLE), "resolution": [64], "regularization": draw(st.sampled_from(REG))})
    return values | {"data": entries}


REG = [False, True, "prior"]
PROMPTS = ["a red zorb", {"prompt": "a dog", "negative": "blurry", "seed": 3}]
SETS: list[dict[str, Any]] = [
    {},
    {},
    {"sample": {"every": 2, "prompts": PROMPTS}},
    {"sample": {"every": 1, "prompts": PROMPTS, "extra_loras": [f"{LORA}=0.5"]}, "ema": {"decay": 0.9}},
    {"validation": {"folder": str(mini.STYLE), "resolution": 64, "every": 1}},
    {"train": {"beside": f"{LORA}=0.5"}},
    {"train": {"method": "slider"}, "model": {"adapter": None}, "slider": {"positive": "[prompt], red"}},
    {"train": {"method": "de_distill"}, "model": {"adapter": None}},
    {"timesteps": {"type": "fixed", "sigmas": [0.9, 0.5]}},
    {"guidance": {"contrastive": 2.0}},
    {"preserve": {"kind": "trigger"}},
    {"lora": {"type": "lokr", "factor": 4}},
]
"""Settings that only go together."""


def _schedule_params(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a drawn schedule and optimizer have."""
    name = values.get("schedule", {}).get("name", "constant")
    found: dict[str, Any] = {}
    if SCHEDULE_PARAMS[name]:
        found["schedule"] = {"params": {key: PARAMS[key] for key in SCHEDULE_PARAMS[name]}}
    optimizer = OPTIMIZERS[values["optimizer"]["name"]]
    betas = optimizer.params.get("betas")
    if betas is not None:
        found["optimizer"] = {"params": {"betas": PARAMS["betas"][betas.__metadata__[0].metadata[0].min_length]}}
    return found


def _without_rank(values: dict[str, Any]) -> dict[str, Any]:
    """A rank that the drawn kind has, where none was drawn for it."""
    kind = values["lora"].get("type", "lora")
    if kind == "lora" or values["lora"]["rank"] != 4:
        return {}
    return {"lora": {"rank": None if kind == "lokr" else 4}}
