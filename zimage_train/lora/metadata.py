"""The header metadata of an exported LoRA (torch-free).

It describes the content alone, without time, host, user or path, so that equal runs write equal files. What reads it:

* ComfyUI's scanner of assets: the base model from `ss_base_model_version`, as it is; words from `ss_tag_frequency`, or
  else `trained_words`; the hash from `sshs_model_hash`.
* ComfyUI-Lora-Manager: the base model from `ss_base_model_version`, where it keeps texts that it does not know, and its
  list has CivitAI's names; words from the first entry of `ss_tag_frequency`; AutoV3 from `sshs_model_hash`.
* StabilityMatrix: words from `ss_tag_frequency`; the base model only from CivitAI, by the same names.
* CivitAI: `ss_tag_frequency`, and AutoV3 from `sshs_model_hash`. Its base models have the names of
  `Variant.base_model`; an uploader chooses one.
* SwarmUI: `modelspec.architecture`, `modelspec.trigger_phrase`, `modelspec.resolution` and `modelspec.hash_sha256`.

AI Toolkit writes `zimage` as the base model of all variants, which none of them knows.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zimage_train.config.dataset import ALPHA, DataEntry
from zimage_train.config.lora import LoraSettings
from zimage_train.config.schema import Config
from zimage_train.config.types import MetadataLevel, without_folder
from zimage_train.config.variants import VARIANTS
from zimage_train.io.json_text import parse_json
from zimage_train.lora.file_hashes import HASH_KEYS

STALE = (*HASH_KEYS, "lora_adapter_metadata")
"""Keys that describe the tensors of the file itself, and so are wrong in a file made from it."""
IDENTITY_KEYS = ("modelspec.title", "ss_output_name", "ss_steps")
"""Keys that name a single LoRA; they are kept only if every source has them, with the same value."""
TRIGGERS, WORDS, TAGS = "modelspec.trigger_phrase", "trained_words", "ss_tag_frequency"
NETWORK_ARGS = "ss_network_args"
BASE_MODEL, ANY_BASE_MODEL = "ss_base_model_version", "zimage"
VARIANT, SETTINGS = "zimage_train.variant", "zimage_train.settings"
SETTINGS_SECTIONS = (
    *("seed", "lora", "train", "teacher", "slider", "timesteps", "loss"),
    *("guidance", "preserve", "optimizer", "schedule", "ema"),
)
"""Sections of the config that shape the weights and name no file but `lora.init_from` and `train.beside`."""
SEVERAL_RANKS = "Dynamic"
"""kohya's word for the rank of a LoRA whose modules differ in it."""
SOURCES_OF_DATA = ("folder", "metadata", "prompts", "negative", "mask")


def training_metadata(
    config: Config, adapter_digest: str | None, prompts: Iterable[str] = (), beside_digests: Iterable[str] = ()
) -> dict[str, str]:
    """Return the metadata of a trained LoRA, as much as `save.metadata` says; the file adds its hashes.

    Args:
        prompts: the prompts that show the concept, of which `full` counts the tags.
        beside_digests: those of the files of `train.beside`, in that order.

    Reference: https://github.com/Stability-AI/ModelSpec
    """
    level = config.save.metadata
    if level == "none":
        return {"format": "pt"}
    variant = VARIANTS[config.model.variant]
    side = max(_resolution(entry) for entry in config.data if not entry.regularization)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.title": config.name,
        "modelspec.prediction_type": "flow",
        "modelspec.resolution": f"{side}x{side}",
        BASE_MODEL: variant.base_model,
        "ss_output_name": config.name,
        **_network(config.lora),
        VARIANT: config.model.variant,
        "zimage_train.base_model": variant.transformer,
    }
    tags = _count_tags(prompts) if level == "full" else Counter[str]()
    metadata |= _words(config.triggers, tags)
    if level == "full":
        metadata["zimage_train.adapter"] = without_folder(config.model.adapter or "none")
        metadata[SETTINGS] = json.dumps(shared_settings(config), ensure_ascii=False, sort_keys=True)
        if adapter_digest is not None:
            metadata["zimage_train.adapter_sha256"] = adapter_digest
            metadata["zimage_train.adapter_strength"] = repr(config.model.adapter_strength)
        beside: list[dict[str, Any]] = []
        for lora, digest in zip(config.train.beside, beside_digests, strict=False):
            beside.append({"name": without_folder(lora.file), "weight": lora.weight, "sha256": digest})
        if beside:
            metadata["zimage_train.beside"] = json.dumps(beside, ensure_ascii=False)
    return metadata


def _network(lora: LoraSettings) -> dict[str, str]:
    """Return kind and size of the adapter, as kohya's tools and LyCORIS write them."""
    size: dict[str, str] = {}
    if lora.rank is not None and lora.type != "oft":  # whose rank is no dimension of LyCORIS's files
        rank = SEVERAL_RANKS if lora.ranks else str(lora.exported_rank)
        size = {"ss_network_dim": rank, "ss_network_alpha": rank}
    if lora.type == "lora":
        return size  # alpha is the rank: the scale is folded into B
    arguments = {"algo": "diag-oft" if lora.type == "oft" else lora.type}
    if lora.type == "lokr":
        # LyCORIS takes -1 for factors as equal as they can be.
        arguments["factor"] = str(lora.factor_number or -1)
    return {**size, "ss_network_module": "lycoris.kohya", NETWORK_ARGS: json.dumps(arguments)}


def at_step(metadata: Mapping[str, str], step: int) -> dict[str, str]:
    """Return `metadata` for the LoRA of `step`, which says its step unless it says nothing."""
    return {**metadata, "ss_steps": str(step)} if level_of(metadata) != "none" else dict(metadata)


def level_of(metadata: Mapping[str, str]) -> MetadataLevel:
    """Return the value of `save.metadata` with which a file of this metadata was written."""
    if not metadata.keys() - {"format"}:
        return "none"
    return "full" if SETTINGS in metadata else "minimal"


def shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that shape the weights, without folders and without where the images are."""
    values = config.model_dump()
    shared: dict[str, Any] = {section: values[section] for section in SETTINGS_SECTIONS}
    if config.lora.init_from is not None:
        shared["lora"]["init_from"] = without_folder(config.lora.init_from)
    shared["train"]["beside"] = [{**lora, "file": without_folder(lora["file"])} for lora in values["train"]["beside"]]
    shared["model"] = {**values["model"], "path": config.model.label, "extras": None}
    for part in ("adapter", "text_encoder", "tokenizer", "vae"):
        if values["model"][part] is not None:
            shared["model"][part] = without_folder(values["model"][part])
    shared["data"] = []
    for entry in values["data"]:
        kept = {key: value for key, value in entry.items() if key not in SOURCES_OF_DATA}
        shared["data"].append(kept | {"mask": ALPHA if entry["mask"] == ALPHA else entry["mask"] is not None})
    return shared


def _resolution(entry: DataEntry) -> int:
    """Return the side of the largest square that the images of `entry` are trained at, px."""
    return max(entry.resolution) if entry.max_pixels is None else math.isqrt(entry.max_pixels) // 16 * 16


def _count_tags(prompts: Iterable[str]) -> Counter[str]:
    """Return how many prompts have each tag, in lower case, as kohya's tools count them."""
    tags: Counter[str] = Counter()
    for prompt in prompts:
        tags.update({tag.strip().lower() for tag in prompt.split(",")} - {""})
    return tags


def _words(triggers: Sequence[str], tags: Counter[str]) -> dict[str, str]:
    """Return the keys that hold triggers and tags; no tag is more frequent than a trigger, so triggers come first."""
    most = max(tags.values(), default=1)
    counts = Counter(dict.fromkeys(triggers, most))
    counts.update({tag: count for tag, count in tags.items() if tag not in counts})
    words: dict[str, str] = {}
    if triggers:
        words[TRIGGERS] = ", ".join(triggers)
        words[WORDS] = json.dumps(list(triggers), ensure_ascii=False)
    if counts:
        # A single entry, since Lora-Manager reads only the first. kohya's tools name it by the folder of the images.
        name = triggers[0] if len(triggers) == 1 else "dataset"
        words[TAGS] = json.dumps({name: dict(counts.most_common())}, ensure_ascii=False)
    return words


def edited_metadata(
    command: str, sources: Sequence[Mapping[str, str]], facts: Mapping[str, Any], ranks: Iterable[int]
) -> dict[str, str]:
    """Return the metadata of a LoRA that `command` made from others; the file adds its hashes.

    Args:
        sources: the metadata of the source files; values on which they agree are kept, and the triggers of all.
        facts: what the command did, which is stored as JSON.
        ranks: the rank of each module of the new LoRA.
    """
    values_of: dict[str, list[str]] = {}
    for source in sources:
        for key, value in source.items():
            values_of.setdefault(key, []).append(value)
    metadata: dict[str, str] = {}
    for key, values in values_of.items():
        is_agreed = len(set(values)) == 1 and key not in (*STALE, TRIGGERS, WORDS, TAGS, BASE_MODEL)
        if is_agreed and (key not in IDENTITY_KEYS or len(values) == len(sources)):
            metadata[key] = values[0]
    metadata["format"] = "pt"
    triggers: list[str] = []
    tags: Counter[str] = Counter()
    for source in sources:
        triggers += triggers_of(source)
        tags += _tags_of(source)
    metadata |= _words(list(dict.fromkeys(triggers)), tags)
    base_models = {_base_model_of(source) for source in sources} - {None}
    if len(base_models) > 1:
        base_models.discard(ANY_BASE_MODEL)
    if len(base_models) == 1:
        metadata[BASE_MODEL] = str(base_models.pop())
    distinct_ranks = set(ranks)
    rank = str(distinct_ranks.pop()) if len(distinct_ranks) == 1 else SEVERAL_RANKS
    metadata |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    return metadata | {f"zimage_train.{command}": json.dumps(facts, sort_keys=True)}


def triggers_of(metadata: Mapping[str, str]) -> list[str]:
    """Return the triggers that the metadata of a LoRA of any trainer names."""
    text = metadata.get(WORDS, "")
    try:
        words = parse_json(text)
    except ValueError:
        words = [word.strip() for word in text.split(",")]
    if not isinstance(words, list):
        words = [words]
    triggers = [word for word in words if isinstance(word, str) and word]
    if not triggers:
        triggers = [trigger for trigger in metadata.get(TRIGGERS, "").split(", ") if trigger]
    if not triggers and len(tags := _tags_of(metadata)) == 1:
        triggers = list(tags)  # AI Toolkit names the trigger only there
    return triggers


def _tags_of(metadata: Mapping[str, str]) -> Counter[str]:
    """Return the counts of all tags in `ss_tag_frequency`, without what is not a count."""
    try:
        datasets = parse_json(metadata.get(TAGS, "{}"))
    except ValueError:
        return Counter()
    tags: Counter[str] = Counter()
    for counts in datasets.values() if isinstance(datasets, dict) else ():
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            if type(count) is int and count > 0:  # not `true`
                tags[tag] += count
    return tags


def _base_model_of(metadata: Mapping[str, str]) -> str | None:
    """Return the base model of a LoRA, by today's name if it is one that an earlier version wrote."""
    name = metadata.get(BASE_MODEL)
    variant = VARIANTS.get(metadata.get(VARIANT, ""))
    return variant.base_model if name == ANY_BASE_MODEL and variant is not None else name
