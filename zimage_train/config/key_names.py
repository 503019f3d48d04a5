"""The names of all settings, and hints for unknown names."""

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel

from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath

LISTS_OF_SECTIONS = ("data", "prompts", "extra_loras", "beside")
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
    "do_guidance_loss": "guidance.contrastive",
    "guidance_loss_target": "guidance.contrastive",
    "guidance_loss_schedule": "guidance.contrastive_schedule",
    "do_guidance_loss_cfg_zero": "guidance.cfg_zero",
    "loss_type": "loss.type",
    "loss_fn": "loss.type",
    "huber_c": "loss.delta",
    "huber_delta": "loss.delta",
    "snr_gamma": "loss.min_snr",
    "min_snr_gamma": "loss.min_snr",
    "timestep_type": "timesteps.type",
    "timestep_sampling": "timesteps.type",
    "discrete_flow_shift": "timesteps.shift",
    "flow_schedule_shift": "timesteps.shift",
    "timestep_shift": "timesteps.shift",
    "sigmoid_scale": "timesteps.scale",
    "logit_mean": "timesteps.mean",
    "logit_std": "timesteps.scale",
    "noise_offset": "timesteps.offset_noise",
    "content_or_style": "timesteps.bias",
    "output": "output_dir",
    "accumulate": "train.grad_accumulation",
    "clip_norm": "train.max_grad_norm",
    "also": "sample.compare_on",
    "regularisation": "data.0.regularization",
    "regularisation_share": "train.regularization_share",
}
"""Name of a setting in other trainers, or formerly in this trainer -> the setting, for the hints of unknown keys."""
_SIZES = "write type: sigmoid and shift: {}, which depends on the size of an image (uniform_shift in AI Toolkit)"
DENSITIES_ELSEWHERE = {
    "shift": "write type: sigmoid and shift: 3.0 for that of musubi-tuner, SimpleTuner or diffusion-pipe with 3, and "
    "type: uniform_shift for that of AI Toolkit, which is another density",
    "flux_shift": _SIZES.format("flux"),
    "qwen_shift": _SIZES.format("qwen"),
    "uniform": "write type: linear",
    "logit_normal": "write type: sigmoid, with mean and scale",
}
"""Value of `timesteps.type` in other trainers -> the hint. `shift` means two densities there, so neither is guessed."""
COMMON_VALUES = {
    "l2": "mse",
    "l1": "mae",
    "smooth_l1": "pseudo_huber",
    "wavelet": "mse",
    "schedulefree": "adamw_schedulefree",
    "adamwschedulefree": "adamw_schedulefree",
    "stableadamw": "stable_adamw",
}
"""Value in other trainers -> the value here."""
MISSING_SETTINGS = {
    "memory.compile": "torch.compile is not used; leave it out",
    "train.loss": "the section is called loss, and its kind loss.type",
    "network": "the section is called lora",
}
"""Key that other trainers have and this trainer lacks, as it would be called here -> the hint."""


@cache
def _setting_names() -> dict[str, str]:
    """Return full name -> last part of the name, for every setting; an entry of a list has the index 0."""
    return {dotted_key(path): path[-1] for path in _key_paths(Config)}


def is_setting(key: str) -> bool:
    """Return whether `key` is the full name of a setting or of its `params`, and not of a section."""
    parts = ["0" if part.isdigit() else part for part in key.split(".")]
    if parts[-2:-1] == ["params"]:
        parts.pop()
    return ".".join(parts) in _setting_names()


def suggest_key(key_path: KeyPath) -> str:
    """Return the hint for a key that does not exist: the setting that is probably meant, or the keys of the section."""
    if dotted_key(key_path) in MISSING_SETTINGS:
        return MISSING_SETTINGS[dotted_key(key_path)]
    section = _section(key_path[:-1])
    siblings = list(section.model_fields) if section else []
    suggestions = _similar_settings(str(key_path[-1]), siblings)
    if suggestions:
        return f"did you mean {' or '.join(repr(name) for name in suggestions)}?"
    return f"known here: {', '.join(siblings)}" if siblings else "remove it"


def _similar_settings(key: str, siblings: list[str]) -> list[str]:
    """Return the settings that may be meant by an unknown key of a section with the keys `siblings`."""
    if key in COMMON_NAMES:
        return [COMMON_NAMES[key]]
    names = _setting_names()
    in_other_sections = [full_name for full_name, name in names.items() if name == key]
    if in_other_sections:
        return in_other_sections[:3]
    similar_siblings = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if similar_siblings:
        return similar_siblings
    # A higher threshold, since among all settings some name is similar to almost any word.
    similar_names = difflib.get_close_matches(key, list(names.values()), n=1, cutoff=0.75)
    return [full_name for full_name, name in names.items() if name in similar_names][:1]


def _section(key_path: KeyPath) -> type[BaseModel] | None:
    """Return the section at a path, or None if there is none."""
    section: type[BaseModel] | None = Config
    for part in key_path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = model_of(field.annotation) if field else None
    return section


def _key_paths(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every setting of a section and of the sections below it."""
    paths: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        subsection = model_of(field.annotation)
        if subsection is None:
            paths.append((*prefix, name))
        else:
            index = ("0",) if name in LISTS_OF_SECTIONS else ()
            paths += _key_paths(subsection, (*prefix, name, *index))
    return paths


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a type, such as `DataEntry` in `list[DataEntry]`, or None if it has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        model = model_of(argument)
        if model is not None:
            return model
    return None


def dotted_key(key_path: Sequence[str | int]) -> str:
    """Return the name of a path: `data.0.folder` for `("data", 0, "folder")`."""
    return ".".join(str(part) for part in key_path)
