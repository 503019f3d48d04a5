"""The names of all settings, and what is meant by a name that is none."""

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel

from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath

COMMON_NAMES = {
    "learning_rate": "optimizer.lr",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "linear": "lora.rank",
    "linear_alpha": "lora.alpha",
    "max_train_steps": "train.steps",
    "num_train_steps": "train.steps",
    "gradient_accumulation": "train.grad_accumulation",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "gradient_checkpointing": "memory.checkpointing",
    "lr_scheduler": "schedule.name",
    "lr_warmup_steps": "schedule.warmup_steps",
    "folder_path": "data.0.folder",
    "dataset_path": "data.0.folder",
    "num_repeats": "data.0.repeats",
    "trigger_word": "data.0.trigger",
    "caption_dropout_rate": "data.0.caption_dropout",
    "name_or_path": "model.path",
    "assistant_lora_path": "model.adapter",
    "save_every": "save.every",
    "sample_every": "sample.every",
    "guidance_scale": "sample.guidance",
    "do_differential_guidance": "guidance.differential",
    "differential_guidance_scale": "guidance.differential",
    "timestep_type": "timesteps.type",
    "content_or_style": "timesteps.bias",
    "output": "output_dir",
    "accumulate": "train.grad_accumulation",
    "clip_norm": "train.max_grad_norm",
    "also": "sample.compare_on",
    "regularisation": "data.0.regularization",
    "regularisation_share": "train.regularization_share",
}
"""Names that other trainers use, or that this one had, and ours: only for the hint beside an unknown key."""
COMMON_VALUES = {"shift": "uniform_shift"}
"""The same of values. In other trainers `shift` begins with a sigmoid, here with a uniform density; hence the name."""


@cache
def _names() -> frozenset[str]:
    return frozenset(dotted_key(path) for path in _all_keys(Config))


def is_setting(key: str) -> bool:
    """Whether `key` is the whole name of a setting, no section; what `params` hold are settings too."""
    parts = ["0" if part.isdigit() else part for part in key.split(".")]
    if parts[-2:-1] == ["params"]:
        parts.pop()
    return ".".join(parts) in _names()


def suggest_key(key_path: KeyPath) -> str:
    """What to do about a key that does not exist: the one that is meant, or those that are there."""
    key = str(key_path[-1])
    section = _section(key_path[:-1])
    siblings = list(section.model_fields) if section else []
    everywhere = {dotted_key(path): path[-1] for path in _all_keys(Config)}
    named = [full for full, name in everywhere.items() if name == key][:3]
    hints = [COMMON_NAMES[key]] if key in COMMON_NAMES else named
    if not hints:
        hints = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if not hints:
        similar = difflib.get_close_matches(key, list(everywhere.values()), n=1, cutoff=0.75)
        hints = [full for full, name in everywhere.items() if name in similar][:1]
    if hints:
        return f"did you mean {' or '.join(repr(hint) for hint in hints)}?"
    return f"known here: {', '.join(siblings)}" if siblings else "remove it"


def _section(key_path: KeyPath) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Config
    for part in key_path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = model_of(field.annotation) if field else None
    return section


def _all_keys(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        inner = model_of(field.annotation)
        index = ("0",) if name in ("data", "prompts", "extra_loras") else ()
        keys += _all_keys(inner, (*prefix, name, *index)) if inner else [(*prefix, name)]
    return keys


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting of this type holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in getattr(annotation, "__args__", ()) if (model := model_of(arg))), None)


def dotted_key(key_path: Sequence[str | int]) -> str:
    """`("data", 0, "folder")` -> `data.0.folder`."""
    return ".".join(str(part) for part in key_path)
