"""What an exported LoRA says about itself: facts of its content, and no time, host or path (torch-free)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS


def training_metadata(config: Config, adapter_digest: str | None) -> dict[str, str]:
    """The header of an exported LoRA: modelspec's keys, the keys that kohya's tools read, and our own.

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
"""About the very file that they stand in; kohya's tools make the hashes again where they miss them."""
OF_ONE = ("modelspec.title", "ss_output_name", "ss_steps")
"""What one LoRA is called, and not what it is for."""
TRIGGERS = "modelspec.trigger_phrase"


def edited_metadata(
    command: str, sources: Sequence[Mapping[str, str]], facts: Mapping[str, Any], ranks: Iterable[int]
) -> dict[str, str]:
    """The header of a LoRA that `command` made of others with these headers: what they agree on, and `facts`."""
    said = {key: {one[key] for one in sources if key in one} for source in sources for key in source}
    agreed = {key: values for key, values in said.items() if len(values) == 1 and key not in STALE}
    of_all = {key for key in agreed if key not in OF_ONE or all(key in one for one in sources)}
    metadata = {key: next(iter(agreed[key])) for key in of_all} | {"format": "pt"}
    triggers = [text for one in sources for text in one.get(TRIGGERS, "").split(", ") if text]
    if triggers:
        metadata[TRIGGERS] = ", ".join(dict.fromkeys(triggers))
    found = set(ranks)
    rank = str(found.pop()) if len(found) == 1 else "Dynamic"  # kohya's word for ranks that differ
    metadata |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    return metadata | {f"zimage_train.{command}": json.dumps(facts, sort_keys=True)}
