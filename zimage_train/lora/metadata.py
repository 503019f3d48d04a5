"""The header metadata of an exported LoRA (torch-free).

It describes the content alone, without time, host or path, so that equal runs write equal files.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS


def training_metadata(config: Config, adapter_digest: str | None) -> dict[str, str]:
    """Return the metadata of a trained LoRA: the keys of modelspec, those that kohya's tools read, and our own.

    Reference: https://github.com/Stability-AI/ModelSpec
    """
    rank = str(config.lora.rank)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.title": config.name,
        "modelspec.prediction_type": "flow",
        "ss_base_model_version": "zimage",
        "ss_output_name": config.name,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the scale is folded into B
        "zimage_train.variant": config.model.variant,
        "zimage_train.base_model": VARIANTS[config.model.variant].transformer,
        "zimage_train.adapter": _adapter_name(config),
    }
    if config.triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(config.triggers)
    if adapter_digest is not None:
        metadata["zimage_train.adapter_sha256"] = adapter_digest
        metadata["zimage_train.adapter_strength"] = repr(config.model.adapter_strength)
    return metadata


def _adapter_name(config: Config) -> str:
    return "none" if config.model.adapter is None else Path(config.model.adapter).name


STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata")
"""Keys that describe the tensors of the file itself, and so are wrong in a file made from it. kohya's tools compute the
hashes anew where they are missing."""
IDENTITY_KEYS = ("modelspec.title", "ss_output_name", "ss_steps")
"""Keys that name a single LoRA; they are kept only if every source has them, with the same value."""
TRIGGERS = "modelspec.trigger_phrase"


def edited_metadata(
    command: str, sources: Sequence[Mapping[str, str]], facts: Mapping[str, Any], ranks: Iterable[int]
) -> dict[str, str]:
    """Return the metadata of a LoRA that `command` made from others.

    Args:
        sources: the metadata of the source files; values on which they agree are kept.
        facts: what the command did, which is stored as JSON.
        ranks: the rank of each module of the new LoRA.
    """
    values_of: dict[str, list[str]] = {}
    for source in sources:
        for key, value in source.items():
            values_of.setdefault(key, []).append(value)
    metadata: dict[str, str] = {}
    for key, values in values_of.items():
        is_agreed = len(set(values)) == 1 and key not in STALE
        if is_agreed and (key not in IDENTITY_KEYS or len(values) == len(sources)):
            metadata[key] = values[0]
    metadata["format"] = "pt"
    triggers: list[str] = []
    for source in sources:
        triggers += [trigger for trigger in source.get(TRIGGERS, "").split(", ") if trigger]
    if triggers:
        metadata[TRIGGERS] = ", ".join(dict.fromkeys(triggers))
    distinct_ranks = set(ranks)
    rank = str(distinct_ranks.pop()) if len(distinct_ranks) == 1 else "Dynamic"  # kohya's word for ranks that differ
    metadata |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    return metadata | {f"zimage_train.{command}": json.dumps(facts, sort_keys=True)}
