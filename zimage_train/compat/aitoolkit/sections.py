"""The settings that depend on several keys of a job, with a function for each section of the config."""

import math
import re
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

from zimage_train.compat.aitoolkit.job import AIToolkitJob
from zimage_train.config.module_groups import BLOCK_GROUPS, BLOCK_MODULES
from zimage_train.config.variants import ADAPTERS, VARIANTS

Values = dict[str, Any]

NUM_LAYERS = 30
"""Main layers of the published models."""


def model_section(job: AIToolkitJob) -> Values:
    model, dtype = job.values["model"], job.values["train"]["dtype"]
    name, adapter = model["name_or_path"], model["assistant_lora_path"] or None
    variant_name = _variant_name(job, name, model["arch"] or "", adapter)
    variant = VARIANTS[variant_name]
    extras = model["extras_name_or_path"] or None
    if not job.is_given("train.dtype"):
        job.note("train.dtype", "is left out, which means fp32 there: twice the memory of bf16")
    elif dtype == "fp16":
        job.note("train.dtype", "is fp16, which is not possible here; bf16 is as large and does not overflow")
    if "|" in model["qtype"]:
        message = "names an accuracy recovery adapter (is not possible here)"
        job.refuse("model.qtype", message, "name the type alone", "unsupported-setting")
    elif model["quantize"]:
        job.note("model.quantize", "becomes auto: weights are quantised only if they do not fit the card otherwise")
    return {
        "variant": variant_name,
        "path": None if name == variant.transformer else name,
        "extras": None if extras in (variant.extras, name) else extras,
        "adapter": next((short_name for short_name, path in ADAPTERS.items() if path == adapter), adapter),
        "dtype": "fp32" if dtype == "fp32" else "bf16",
        "quantize": "auto" if model["quantize"] else None,
    }


def _variant_name(job: AIToolkitJob, name: str | None, arch: str, adapter: str | None) -> str:
    """Return the variant by the name of the model, else by the tag of `arch`, else by the training adapter."""
    family, _, tag = arch.partition(":")
    if family not in ("", "zimage"):
        reason = "draws pixels without a VAE" if family == "zimage_l2p" else "is another family of models"
        job.refuse("model.arch", f"is {arch!r} ({reason})", "give a job for Z-Image", "unsupported-setting")
        return "turbo"
    if name is None:
        hint = "name the model, such as Tongyi-MAI/Z-Image-Turbo"
        job.refuse("model.name_or_path", "is missing", hint, "missing-key")
        return "turbo"
    variant_name = _variant_in_path(name)
    if variant_name is not None:
        return variant_name
    if tag in VARIANTS:
        return tag
    if not adapter:  # training adapters exist for Turbo only
        message = f"is {name!r}, which may be any member of the family"
        job.refuse("model.name_or_path", message, "set model.arch to zimage:turbo, zimage:deturbo or zimage:base")
    return "turbo"


def _variant_in_path(name: str) -> str | None:
    """Return the variant that the last part of a hub id or path names, or the part above `transformer`, or None.

    In the hub's cache that is the part `models--org--repo`.
    """
    # Jobs come from other machines, so a path may be one of Windows here, and one of Linux there.
    parts = [part for part in re.split(r"[\\/]+", name.partition("@")[0]) if part]
    if parts and parts[-1] == "transformer":
        parts.pop()
    if parts[-2:-1] == ["snapshots"]:
        parts = parts[:-2]
    part = parts[-1].rpartition("--")[2] if parts else ""
    letters = re.sub(r"[^a-z0-9]", "", part.lower().removesuffix(".safetensors"))
    if "turbo" in letters:
        return "deturbo" if "deturbo" in letters else "turbo"
    return "base" if re.fullmatch(r"zimage(base)?(bf16|fp16|fp32|fp8)?", letters) else None


def data_section(job: AIToolkitJob) -> list[Values]:
    entries = job.values["datasets"]
    if not entries:
        message = "is missing" if entries is None else "is empty"
        job.refuse("datasets", message, "list folders of images", "missing-key")
        return [{"folder": "missing"}]
    return [_data_entry(job, dataset, f"datasets.{index}") for index, dataset in enumerate(entries)]


def _data_entry(job: AIToolkitJob, dataset: Values, key: str) -> Values:
    """Return the entry of `data` for a dataset; `key` is its name in notes and problems, such as `datasets.0`."""
    train, caption_type = job.values["train"], dataset["caption_type"]
    extension = (caption_type or dataset["caption_ext"]).removeprefix(".")
    changes_tags = dataset["shuffle_tokens"] or dataset["token_dropout_rate"] > 0
    if dataset["keep_tokens"] and not changes_tags:
        job.note(f"{key}.keep_tokens", "keeps nothing without shuffle_tokens or token_dropout_rate")
    if dataset["shuffle_tokens"] and dataset["keep_tokens"]:
        job.note(f"{key}.keep_tokens", "holds for shuffling too here; AI Toolkit shuffles all tags, and the trigger")
    is_cached = train["cache_text_embeddings"] or dataset["cache_text_embeddings"]
    if changes_tags and is_cached:
        job.note(key, "has its tags changed in each epoch here; AI Toolkit freezes them with cached text")
    if dataset["prior_reg"] and not dataset["is_reg"]:
        hint = "set is_reg too, or use mask_path with inverted_mask_prior"
        message = "trains images with the trigger towards the model itself"
        job.refuse(f"{key}.prior_reg", message, hint, "conflicting-settings")
    if isinstance(dataset["resolution"], list) and len(dataset["resolution"]) > 1:
        job.note(
            f"{key}.resolution", "counts fully for small images, as there, and not once (repeat_equal_sizes: true)"
        )
    return {
        "folder": _folder(job, dataset, key),
        "caption_ext": f".{extension}",
        "repeat_equal_sizes": True,
        "keep_tags": dataset["keep_tokens"] if changes_tags else 0,
        **_trigger(job, dataset, key, is_cached),
        **_mask(job, dataset),
        "regularization": "prior" if dataset["is_reg"] and dataset["prior_reg"] else dataset["is_reg"],
        "weight": dataset["loss_multiplier"] * (train["reg_weight"] if dataset["is_reg"] else 1),
    }


def _folder(job: AIToolkitJob, dataset: Values, key: str) -> str:
    folder = dataset["dataset_path"] or dataset["folder_path"]
    if not folder:
        job.refuse(f"{key}.folder_path", "is missing", "name the folder of images", "missing-key")
    elif folder.endswith(".json"):
        job.refuse(f"{key}.dataset_path", "is a .json of captions", "make it a .jsonl, and set data.0.metadata")
    return folder or "missing"


def _trigger(job: AIToolkitJob, dataset: Values, key: str, is_cached: bool) -> Values:
    """Return the trigger of a dataset, and whether it stays when a caption is dropped.

    In AI Toolkit the trigger of the job always stays, that of a dataset only if text is cached.
    """
    job_trigger, dataset_trigger = job.values["trigger_word"] or None, dataset["trigger_word"] or None
    if dataset["is_reg"]:
        if dataset_trigger:
            job.note(f"{key}.trigger_word", "is left out: regularization images show the class without the concept")
        return {"trigger": None, "dropout_keeps_trigger": False}
    if dataset_trigger and job_trigger and dataset_trigger != job_trigger:
        job.note(f"{key}.trigger_word", "counts alone here; AI Toolkit also puts the job's trigger in front")
    trigger = dataset_trigger or job_trigger
    return {"trigger": trigger, "dropout_keeps_trigger": bool(trigger and (job_trigger or is_cached))}


def _mask(job: AIToolkitJob, dataset: Values) -> Values:
    mask = "alpha" if dataset["alpha_mask"] else dataset["mask_path"] or None
    if mask is None:
        return {"mask": None}
    train = job.values["train"]
    prior = train["inverted_mask_prior_multiplier"] if train["inverted_mask_prior"] else 0.0
    return {"mask": mask, "mask_floor": dataset["mask_min_value"], "mask_prior": prior}


def lora_section(job: AIToolkitJob) -> Values:
    network = job.values["network"]
    rank, linear = network["rank"], network["linear"]
    if "network" not in job.sections:
        hint = "add network: {type: lora, linear: 16}"
        job.refuse("network", "is missing, so AI Toolkit would train the whole model", hint, "missing-key")
    if rank is not None and job.is_given("network.linear") and rank != linear:
        job.note("network.linear", "is left out: network.rank wins, as in AI Toolkit")
    size: Values = {"rank": linear if rank is None else rank}
    if network["type"] == "lokr":
        if network["lokr_full_rank"]:
            size["rank"] = None
        size["factor"] = "auto" if network["lokr_factor"] == -1 else network["lokr_factor"]
        if network["dropout"]:
            job.note("network.dropout", "is left out: a LoKr has none, in AI Toolkit either")
        if network["network_kwargs"]["rank_dropout"]:
            key = "network.network_kwargs.rank_dropout"
            job.refuse(key, "is not possible here with a LoKr", "leave it out", "unsupported-setting")
        return {**size, "targets": _targets(job, network)}
    if network["type"] == "dora":
        job.note("network.type", "divides by the norms of W + B A there, and by those of W here, as in ComfyUI")
        if network["dropout"]:
            job.note("network.dropout", "is left out: a DoRA has none here")
        return {**size, "targets": _targets(job, network)}
    if network["dropout"]:
        job.note("network.dropout", "falls on the inputs of the LoRA here, and on its rank in AI Toolkit")
    return {
        **size,
        "dropout": network["dropout"] or 0.0,
        "rank_dropout": network["network_kwargs"]["rank_dropout"] or 0.0,
        "targets": _targets(job, network),
    }


def _targets(job: AIToolkitJob, network: Values) -> list[str] | str:
    """Return the modules that AI Toolkit would train: groups, or a regular expression for their names."""
    kwargs = network["network_kwargs"]
    only, ignored = kwargs["only_if_contains"], kwargs["ignore_if_contains"]
    if not network["transformer_only"]:
        if only or ignored:
            message = "is false beside network_kwargs (is not possible here)"
            hint = "leave out either of them, or choose by lora.targets in a config of your own"
            job.refuse("network.transformer_only", message, hint, "unsupported-setting")
        return ".*"
    if not only and not ignored:
        return list(BLOCK_GROUPS)  # AI Toolkit trains every linear module of the layers
    layers_by_module: dict[str, tuple[int, ...]] = {}
    for module in BLOCK_MODULES:
        layers_by_module[module] = tuple(
            layer for layer in range(NUM_LAYERS) if _is_trained(layer, module, only, ignored)
        )
    if not any(layers_by_module.values()):
        hint = "a name is transformer.layers.0.attention.to_q"
        job.refuse("network.network_kwargs", "leaves no module to train", hint)
    return targets_pattern(layers_by_module)


def _is_trained(layer: int, module: str, only: list[str], ignored: list[str]) -> bool:
    """Return whether AI Toolkit trains a module of a layer, by the words of `network_kwargs`."""
    name = f"transformer.layers.{layer}.{module}"
    if any(word in name for word in ignored):
        return False
    # AI Toolkit looks for these words in the dotted name and its form with `$$`, but for `ignored` only in the first.
    return not only or any(word in name or word in name.replace(".", "$$") for word in only)


def targets_pattern(layers_by_module: dict[str, tuple[int, ...]]) -> str:
    """Return a regular expression for exactly the given modules in the given layers."""
    modules_by_layers: dict[tuple[int, ...], list[str]] = {}
    for module, layers in layers_by_module.items():
        if layers:
            modules_by_layers.setdefault(layers, []).append(re.escape(module))
    alternatives: list[str] = []
    for layers, modules in modules_by_layers.items():
        number = r"\d+" if len(layers) == NUM_LAYERS else _any_of(list(map(str, layers)))
        alternatives.append(rf"layers\.{number}\.{_any_of(modules)}")
    return "|".join(alternatives)


def _any_of(alternatives: list[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"(?:{'|'.join(alternatives)})"


def train_section(job: AIToolkitJob) -> Values:
    train = job.values["train"]
    accumulation, optimizer = train["gradient_accumulation"], train["optimizer"].lower()
    if accumulation > 1:
        job.note("train.gradient_accumulation", f"averages {accumulation} gradients here; AI Toolkit adds them up")
    if train["unload_text_encoder"] and not train["cache_text_embeddings"]:
        message = "makes AI Toolkit train on the trigger alone, without captions"
        hint = "set cache_text_embeddings: true, or caption_dropout_rate: 1"
        job.refuse("train.unload_text_encoder", message, hint, "conflicting-settings")
    is_unclipped = optimizer in ("adafactor", "automagic2")
    if is_unclipped and job.is_given("train.max_grad_norm"):
        job.note("train.max_grad_norm", f"is left out: AI Toolkit does not clip with {optimizer}")
    return {"grad_accumulation": accumulation, "max_grad_norm": None if is_unclipped else train["max_grad_norm"]}


AI_TOOLKIT_SHIFT = 3.0
"""Factor of AI Toolkit's `shift` for every variant."""
TIMESTEPS: dict[str, tuple[str, Callable[[float], float]]] = {
    "weighted": ("weighted", lambda share: share),
    "linear": ("linear", lambda share: share),
    "sigmoid": ("sigmoid", lambda share: 1 / (1 + math.exp(-NormalDist().inv_cdf(share)))),
    **dict.fromkeys(
        ("shift", "flux_shift", "lumina2_shift"), ("uniform_shift", lambda share: 3 * share / (1 + 2 * share))
    ),
}
"""AI Toolkit's `timestep_type` -> `timesteps.type`, and the quantile function of its sigma."""


def timesteps_section(job: AIToolkitJob, variant: str) -> Values:
    train = job.values["train"]
    scheduler, timestep_type = train["noise_scheduler"], train["timestep_type"]
    if not job.is_given("train.noise_scheduler"):
        job.note("train.noise_scheduler", "is left out, so AI Toolkit ignores timestep_type; taken for flowmatch")
    elif scheduler != "flowmatch":
        message = f"is {scheduler!r}, with which AI Toolkit ignores timestep_type"
        job.refuse("train.noise_scheduler", message, "set noise_scheduler: flowmatch", "unsupported-setting")
    if timestep_type not in TIMESTEPS:
        hint = f"use one of {', '.join(TIMESTEPS)}"
        message = f"is {timestep_type!r} (is not possible here)"
        job.refuse("train.timestep_type", message, hint, "unsupported-setting")
        return {}
    if train["linear_timesteps"] and timestep_type != "weighted":  # whose table takes precedence there
        timestep_type, weight = "linear", "bell"
    else:
        weight = None
    name, quantile = TIMESTEPS[timestep_type]
    # AI Toolkit shifts by 3 whatever the model, and uniform_shift by the model's own factor if none is given.
    is_shifted = name == "uniform_shift" and VARIANTS[variant].shift != AI_TOOLKIT_SHIFT
    density = {"type": name, "weight": weight, "shift": AI_TOOLKIT_SHIFT if is_shifted else None}
    # AI Toolkit limits the index of the timestep, of which there are 1000, from noise to image. So a limit is a share
    # of the draws, and becomes the sigma of that quantile.
    first, last = train["min_denoising_steps"], train["max_denoising_steps"]
    if not 0 <= first < last <= 1000:
        job.refuse("train.max_denoising_steps", f"is {last}, after {first}", "count from 0 (noise) to 999 (image)")
        return density
    low, high = max(0.0, 1 - (last + 1) / 1000), 1 - first / 1000
    # The quantile function of the sigmoid has no value at 0 and 1.
    min_sigma = round(quantile(low), 6) if low > 0 else 0.0
    max_sigma = round(quantile(high), 6) if first > 0 else 1.0
    return {**density, "min": min_sigma, "max": max_sigma}


AITOOLKIT_PSEUDO_HUBER_DELTA = 0.01


def loss_section(job: AIToolkitJob) -> Values:
    name = job.values["train"]["loss_type"]
    if name != "pseudo_huber":
        return {"type": name}
    if job.values["train"]["inverted_mask_prior"]:
        job.note("train.inverted_mask_prior", "is a pseudo_huber too; AI Toolkit takes the mean square there")
    return {"type": name, "delta": AITOOLKIT_PSEUDO_HUBER_DELTA}


def guidance_section(job: AIToolkitJob) -> Values:
    train = job.values["train"]
    differential = train["differential_guidance_scale"] if train["do_differential_guidance"] else None
    if differential is not None and train["loss_type"] == "mae":
        job.note("train.do_differential_guidance", "is left out: the gradient of mae is the same with it, there too")
        differential = None
    if differential is not None and not train["do_guidance_loss"]:
        job.note("train.do_differential_guidance", "acts here; AI Toolkit ignores it unless do_guidance_loss is on")
    target = train["guidance_loss_target"] if train["do_guidance_loss"] else None
    if isinstance(target, list):
        message = "is a range (is not possible here)"
        job.refuse("train.guidance_loss_target", message, "give a single number, such as 3.0", "unsupported-setting")
        target = None
    if target is None or target == 1:  # the other two keys have no effect then
        return {"differential": differential, "contrastive": target}
    return {
        "differential": differential,
        "contrastive": target,
        "contrastive_schedule": train["guidance_loss_schedule"],
        "cfg_zero": train["do_guidance_loss_cfg_zero"],
    }


def preserve_section(job: AIToolkitJob) -> Values:
    train = job.values["train"]
    uses_class, uses_blank = train["diff_output_preservation"], train["blank_prompt_preservation"]
    if uses_class and uses_blank:
        message = "is on, and diff_output_preservation too"
        hint = "switch off either of them, as AI Toolkit demands"
        job.refuse("train.blank_prompt_preservation", message, hint, "conflicting-settings")
    if uses_class and not _has_trigger(job):
        hint = "set trigger_word, or use blank_prompt_preservation"
        job.refuse("train.diff_output_preservation", "needs a trigger", hint, "conflicting-settings")
    elif uses_class:
        class_word = train["diff_output_preservation_class"]
        if not class_word:
            message = "is empty, and would take the trigger out of captions without a word in its place"
            hint = "name the class, such as person"
            job.refuse("train.diff_output_preservation_class", message, hint, "missing-key")
        weight = train["diff_output_preservation_multiplier"]
        return {"kind": "trigger", "class_word": class_word or "person", "weight": weight}
    if uses_blank:
        return {"kind": "blank", "weight": train["blank_prompt_preservation_multiplier"]}
    return {"kind": None}


def _has_trigger(job: AIToolkitJob) -> bool:
    datasets = job.values["datasets"] or []
    return bool(job.values["trigger_word"] or any(dataset["trigger_word"] for dataset in datasets))


def ema_section(job: AIToolkitJob) -> Values:
    ema = job.values["train"]["ema_config"]
    return {"decay": ema["ema_decay"] if ema["use_ema"] else None}


def save_section(job: AIToolkitJob) -> Values:
    dtype = job.values["save"]["dtype"]
    if dtype == "fp16":
        cause = "is fp16" if job.is_given("save.dtype") else "is left out, which means fp16 there"
        job.note("save.dtype", f"{cause}; bf16 is as large and does not overflow, and fp32 keeps every digit")
    return {"dtype": "fp32" if dtype == "fp32" else "bf16"}


def log_section(job: AIToolkitJob) -> Values:
    logging = job.values["logging"]
    return {"wandb": logging["project_name"] if logging["use_wandb"] else None}
