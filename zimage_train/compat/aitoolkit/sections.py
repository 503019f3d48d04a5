"""The settings that several keys of a job decide together: one function a section of the config."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

from zimage_train.compat.aitoolkit.job import AIToolkitJob
from zimage_train.config.module_groups import BLOCK_GROUPS, BLOCK_MODULES
from zimage_train.config.variants import ADAPTERS, VARIANTS

Values = dict[str, Any]

LAYERS = 30


def model_section(job: AIToolkitJob) -> Values:
    there, dtype = job.values["model"], job.values["train"]["dtype"]
    name, adapter = there["name_or_path"], there["assistant_lora_path"] or None
    variant = _variant(job, name, there["arch"] or "", adapter)
    row = VARIANTS[variant]
    extras = there["extras_name_or_path"] or None
    if not job.given("train.dtype"):
        job.note("train.dtype", "is left out, which means fp32 there: twice the memory of bf16")
    elif dtype == "fp16":
        job.note("train.dtype", "is fp16, which is not possible here; bf16 is as large and does not overflow")
    if "|" in there["qtype"]:
        job.refuse("model.qtype", "names an accuracy recovery adapter (is not possible here)", "name the type alone")
    elif there["quantize"]:
        job.note("model.quantize", "becomes auto: weights are quantised only if they do not fit the card otherwise")
    return {
        "variant": variant,
        "path": None if name == row.transformer else name,
        "extras": None if extras in (row.extras, name) else extras,
        "adapter": next((short for short, path in ADAPTERS.items() if path == adapter), adapter),
        "dtype": "fp32" if dtype == "fp32" else "bf16",
        "quantize": "auto" if there["quantize"] else None,
    }


def _variant(job: AIToolkitJob, name: str | None, arch: str, adapter: str | None) -> str:
    """The variant, by the name of the model; else by the tag of `arch`; else by its training adapter."""
    family, _, tag = arch.partition(":")
    if family not in ("", "zimage"):
        what = "draws pixels without a VAE" if family == "zimage_l2p" else "is another family of models"
        job.refuse("model.arch", f"is {arch!r} ({what})", "give a job for Z-Image")
        return "turbo"
    if name is None:
        job.refuse("model.name_or_path", "is missing", "name the model, such as Tongyi-MAI/Z-Image-Turbo")
        return "turbo"
    by_adapter = "turbo" if adapter else None
    variant = _named(name) or (tag if tag in VARIANTS else None) or by_adapter
    if variant is None:
        what = f"is {name!r}, which may be any member of the family"
        job.refuse("model.name_or_path", what, "set model.arch to zimage:turbo, zimage:deturbo or zimage:base")
    return variant or "turbo"


def _named(name: str) -> str | None:
    """The variant that a hub id or path names in its last part, or in that above `transformer`."""
    path = Path(name.partition("@")[0])
    last = path.parent.name if path.name == "transformer" else path.name
    plain = re.sub(r"[^a-z0-9]", "", last.lower().removesuffix(".safetensors"))
    if "turbo" in plain:
        return "deturbo" if "deturbo" in plain else "turbo"
    return "base" if re.fullmatch(r"zimage(base)?(bf16|fp16|fp32|fp8)?", plain) else None


def data_section(job: AIToolkitJob) -> list[Values]:
    entries = job.values["datasets"]
    if not entries:
        job.refuse("datasets", "is missing" if entries is None else "is empty", "list folders of images")
        return [{"folder": "missing"}]
    return [_entry(job, entry, f"datasets.{number}") for number, entry in enumerate(entries)]


def _entry(job: AIToolkitJob, there: Values, key: str) -> Values:
    train, caption_type = job.values["train"], there["caption_type"]
    extension = (caption_type or there["caption_ext"]).removeprefix(".")
    tags = there["shuffle_tokens"] or there["token_dropout_rate"] > 0
    if there["keep_tokens"] and not tags:
        job.note(f"{key}.keep_tokens", "keeps nothing without shuffle_tokens or token_dropout_rate")
    if there["shuffle_tokens"] and there["keep_tokens"]:
        job.note(f"{key}.keep_tokens", "holds for shuffling too here; AI Toolkit shuffles all tags, and the trigger")
    is_cached = train["cache_text_embeddings"] or there["cache_text_embeddings"]
    if tags and is_cached:
        job.note(key, "has its tags changed in each epoch here; AI Toolkit freezes them with cached text")
    if there["prior_reg"] and not there["is_reg"]:
        todo = "set is_reg too, or use mask_path with inverted_mask_prior"
        job.refuse(f"{key}.prior_reg", "trains images with the trigger towards the model itself", todo)
    return {
        "folder": _folder(job, there, key),
        "caption_ext": f".{extension}",
        "keep_tags": there["keep_tokens"] if tags else 0,
        **_trigger(job, there, key, is_cached),
        **_mask(job, there, key),
        "regularization": "prior" if there["is_reg"] and there["prior_reg"] else there["is_reg"],
        "weight": there["loss_multiplier"] * (train["reg_weight"] if there["is_reg"] else 1),
    }


def _folder(job: AIToolkitJob, there: Values, key: str) -> str:
    folder = there["dataset_path"] or there["folder_path"]
    if not folder:
        job.refuse(f"{key}.folder_path", "is missing", "name the folder of images")
    elif folder.endswith(".json"):
        job.refuse(f"{key}.dataset_path", "is a .json of captions", "make it a .jsonl, and set data.0.metadata")
    return folder or "missing"


def _trigger(job: AIToolkitJob, there: Values, key: str, is_cached: bool) -> Values:
    """The trigger, and whether a dropped caption keeps it: the job's always does there, a dataset's if text is cached.

    Regularization images have none.
    """
    everywhere, own = job.values["trigger_word"] or None, there["trigger_word"] or None
    if there["is_reg"]:
        if own:
            job.note(f"{key}.trigger_word", "is left out: regularization images show the class without the concept")
        return {"trigger": None, "dropout_keeps_trigger": False}
    if own and everywhere and own != everywhere:
        job.note(f"{key}.trigger_word", "counts alone here; AI Toolkit also puts the job's trigger in front")
    trigger = own or everywhere
    return {"trigger": trigger, "dropout_keeps_trigger": bool(trigger and (everywhere or is_cached))}


def _mask(job: AIToolkitJob, there: Values, key: str) -> Values:
    mask = "alpha" if there["alpha_mask"] else there["mask_path"] or None
    if mask is None:
        return {"mask": None}
    train = job.values["train"]
    prior = train["inverted_mask_prior_multiplier"] if train["inverted_mask_prior"] else 0.0
    return {"mask": mask, "mask_floor": there["mask_min_value"], "mask_prior": prior}


def lora_section(job: AIToolkitJob) -> Values:
    there = job.values["network"]
    if "network" not in job.sections:
        todo = "add network: {type: lora, linear: 16}"
        job.refuse("network", "is missing, so AI Toolkit would train the whole model", todo)
    if there["rank"] is not None and job.given("network.linear") and there["rank"] != there["linear"]:
        job.note("network.linear", "is left out: network.rank wins, as in AI Toolkit")
    if there["dropout"]:
        job.note("network.dropout", "falls on the inputs of the LoRA here, and on its rank in AI Toolkit")
    return {
        "rank": there["linear"] if there["rank"] is None else there["rank"],
        "dropout": there["dropout"] or 0.0,
        "targets": _targets(job, there),
    }


def _targets(job: AIToolkitJob, there: Values) -> list[str] | str:
    """The modules that AI Toolkit would train: by group, or as one regular expression of their names."""
    words = there["network_kwargs"]
    only, ignored = words["only_if_contains"], words["ignore_if_contains"]
    if not there["transformer_only"]:
        if only or ignored:
            todo = "leave one of them out, or choose by lora.targets in a config of your own"
            job.refuse("network.transformer_only", "is false beside network_kwargs (is not possible here)", todo)
        return ".*"
    if not only and not ignored:
        return list(BLOCK_GROUPS)  # AI Toolkit trains every linear module of the layers
    chosen = {
        component: tuple(layer for layer in range(LAYERS) if _matches(layer, component, only, ignored))
        for component in BLOCK_MODULES
    }
    if not any(chosen.values()):
        job.refuse(
            "network.network_kwargs", "leaves no module to train", "a name is transformer.layers.0.attention.to_q"
        )
    return pattern_of(chosen)


def _matches(layer: int, component: str, only: list[str], ignored: list[str]) -> bool:
    dotted = f"transformer.layers.{layer}.{component}"
    names = (dotted, dotted.replace(".", "$$"))  # AI Toolkit looks for `only` in both
    return not any(word in dotted for word in ignored) and (
        not only or any(word in name for word in only for name in names)
    )


def pattern_of(chosen: dict[str, tuple[int, ...]]) -> str:
    """A regular expression of exactly the modules that `chosen` lists, by component."""
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for component, layers in chosen.items():
        if layers:
            by_layers.setdefault(layers, []).append(re.escape(component))
    return "|".join(rf"layers\.{_number(layers)}\.{_any_of(components)}" for layers, components in by_layers.items())


def _number(layers: tuple[int, ...]) -> str:
    return r"\d+" if len(layers) == LAYERS else _any_of([str(layer) for layer in layers])


def _any_of(alternatives: list[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"(?:{'|'.join(alternatives)})"


def train_section(job: AIToolkitJob) -> Values:
    there = job.values["train"]
    passes, name = there["gradient_accumulation"], there["optimizer"].lower()
    if passes > 1:
        job.note("train.gradient_accumulation", f"averages {passes} gradients here; AI Toolkit adds them up")
    if there["unload_text_encoder"] and not there["cache_text_embeddings"]:
        what = "makes AI Toolkit train on the trigger alone, without captions"
        job.refuse("train.unload_text_encoder", what, "set cache_text_embeddings: true, or caption_dropout_rate: 1")
    unclipped = name in ("adafactor", "automagic2")
    if unclipped and job.given("train.max_grad_norm"):
        job.note("train.max_grad_norm", f"is left out: AI Toolkit does not clip with {name}")
    return {"grad_accumulation": passes, "max_grad_norm": None if unclipped else there["max_grad_norm"]}


TIMESTEPS: dict[str, tuple[str, Callable[[float], float]]] = {
    "weighted": ("weighted", lambda share: share),
    "linear": ("linear", lambda share: share),
    "sigmoid": ("sigmoid", lambda share: 1 / (1 + math.exp(-NormalDist().inv_cdf(share)))),
    **dict.fromkeys(
        ("shift", "flux_shift", "lumina2_shift"), ("uniform_shift", lambda share: 3 * share / (1 + 2 * share))
    ),
}
"""AI Toolkit's name -> ours, and sigma by the share of draws below it."""


def timesteps_section(job: AIToolkitJob, variant: str) -> Values:
    there = job.values["train"]
    scheduler = there["noise_scheduler"]
    if not job.given("train.noise_scheduler"):
        job.note("train.noise_scheduler", "is left out, so AI Toolkit ignores timestep_type; taken for flowmatch")
    elif scheduler != "flowmatch":
        what = f"is {scheduler!r}, with which AI Toolkit ignores timestep_type"
        job.refuse("train.noise_scheduler", what, "set noise_scheduler: flowmatch")
    if there["timestep_type"] not in TIMESTEPS:
        todo = f"use one of {', '.join(TIMESTEPS)}"
        job.refuse("train.timestep_type", f"is {there['timestep_type']!r} (is not possible here)", todo)
        return {}
    name, sigma = TIMESTEPS[there["timestep_type"]]
    if name == "uniform_shift" and VARIANTS[variant].shift != 3.0:
        what = f"shifts by 3 in AI Toolkit and by {VARIANTS[variant].shift:g} here, as {variant} is sampled"
        job.refuse("train.timestep_type", what, "use weighted, linear or sigmoid")
    first, last = there["min_denoising_steps"], there["max_denoising_steps"]
    if not 0 <= first < last <= 1000:
        job.refuse("train.max_denoising_steps", f"is {last}, after {first}", "count from 0 (noise) to 999 (image)")
        return {"type": name}
    low, high = max(0.0, 1 - (last + 1) / 1000), 1 - first / 1000
    return {"type": name, "min": round(sigma(low), 6) if low else 0.0, "max": round(sigma(high), 6) if first else 1.0}


def guidance_section(job: AIToolkitJob) -> Values:
    there = job.values["train"]
    differential = there["differential_guidance_scale"] if there["do_differential_guidance"] else None
    if differential is not None and not there["do_guidance_loss"]:
        job.note("train.do_differential_guidance", "acts here; AI Toolkit ignores it unless do_guidance_loss is on")
    target = there["guidance_loss_target"] if there["do_guidance_loss"] else None
    if isinstance(target, list):
        job.refuse("train.guidance_loss_target", "is a range (is not possible here)", "give one number, such as 3.0")
        target = None
    return {"differential": differential, "contrastive": target}


def preserve_section(job: AIToolkitJob) -> Values:
    there = job.values["train"]
    if there["diff_output_preservation"] and there["blank_prompt_preservation"]:
        what = "is on, and diff_output_preservation too"
        job.refuse("train.blank_prompt_preservation", what, "switch one of them off, as AI Toolkit demands")
    if there["diff_output_preservation"] and not _has_trigger(job):
        todo = "set trigger_word, or use blank_prompt_preservation"
        job.refuse("train.diff_output_preservation", "needs a trigger", todo)
    elif there["diff_output_preservation"]:
        word = there["diff_output_preservation_class"]
        if not word:
            what = "is empty, and would take the trigger out of captions without a word in its place"
            job.refuse("train.diff_output_preservation_class", what, "name the class, such as person")
        weight = there["diff_output_preservation_multiplier"]
        return {"kind": "trigger", "class_word": word or "person", "weight": weight}
    if there["blank_prompt_preservation"]:
        return {"kind": "blank", "weight": there["blank_prompt_preservation_multiplier"]}
    return {"kind": None}


def _has_trigger(job: AIToolkitJob) -> bool:
    return bool(job.values["trigger_word"] or any(one["trigger_word"] for one in job.values["datasets"] or []))


def ema_section(job: AIToolkitJob) -> Values:
    there = job.values["train"]["ema_config"]
    return {"decay": there["ema_decay"] if there["use_ema"] else None}


def save_section(job: AIToolkitJob) -> Values:
    dtype = job.values["save"]["dtype"]
    if dtype == "fp16":
        what = "is fp16" if job.given("save.dtype") else "is left out, which means fp16 there"
        job.note("save.dtype", f"{what}; bf16 is as large and does not overflow, and fp32 keeps every digit")
    return {"dtype": "fp32" if dtype == "fp32" else "bf16"}


def log_section(job: AIToolkitJob) -> Values:
    there = job.values["logging"]
    return {"wandb": there["project_name"] if there["use_wandb"] else None}
