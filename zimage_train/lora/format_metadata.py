"""Metadata about the format of a LoRA file (torch-free).

Some layouts cannot express what others can: that there is no alpha, or the ranks of q, k and v when they are fused. A
converted file records this for its source, so that converting back gives the same file. diffusers and peft store alpha
in the header: `lora_adapter_metadata`, a LoraConfig as JSON, where modules that no pattern matches have the common
alpha. No other tool reads it there.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_train.errors import Problem, WeightsError

CONVERTED_KEY = "zimage_train.converted"
ALPHA_KEY = "lora_adapter_metadata"
LARGEST_ALPHA = 1e6
PREFIX = "transformer."


def alphas_from_metadata(path: Path, text: str | None) -> Callable[[str, int], float] | None:
    """Return a function (module, rank) -> alpha from the header text of the file at `path`, or None without alphas.

    Raises:
        WeightsError: an alpha is not a number between 0 and `LARGEST_ALPHA`.
    """
    try:
        found = json.loads(text or "")
        config = {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}
    except (ValueError, AttributeError, RecursionError):
        return None
    common, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if common is None:
        return None
    for alpha in (common, *(patterns.values() if isinstance(patterns, dict) else [patterns])):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < LARGEST_ALPHA:
            what = f"its metadata says that alpha is {str(alpha)[:20]}"
            raise WeightsError(
                Problem(str(path), what, "save it with the alpha that it was trained with", "conflicting-alpha")
            )
    # With rsLoRA the scale is alpha / sqrt(rank); every other reader divides by the rank.
    is_rank_stabilised = config.get("use_rslora") is True

    def alpha_of(module: str, rank: int) -> float:
        alpha = next((value for name, value in patterns.items() if _matches(name, module)), common)
        return float(alpha) * (math.sqrt(rank) if is_rank_stabilised else 1.0)

    return alpha_of


def alphas_to_metadata(ranks: Mapping[str, int], alphas: Mapping[str, float], is_dora: bool) -> str:
    """Return the header text for modules of these ranks and alphas; the most frequent become the common values."""
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": is_dora,
    }
    return json.dumps({PREFIX + key: value for key, value in config.items()}, sort_keys=True)


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern matches a module, as peft's `get_pattern_key` does."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return pattern == module


def _most_frequent(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(sorted(set(found)), key=found.count)


@dataclass(frozen=True)
class FormatMetadata:
    """The properties of a file before its conversion that the new layout cannot express."""

    alpha: bool | None = None
    """Whether the file had alphas, where the new layout requires the opposite; None if it has the same."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Fused module -> ranks of its q, k and v, where the factors do not show them."""


def read_format_metadata(text: str | None) -> FormatMetadata:
    """Return what `write_format_metadata` wrote, or an empty `FormatMetadata` for any other text."""
    try:
        found = json.loads(text or "{}")
        ranks = {str(name): [int(rank) for rank in three] for name, three in found.get("ranks", {}).items()}
        alpha = found.get("alpha")
        threes = {name: three for name, three in ranks.items() if len(three) == 3}
        return FormatMetadata(alpha if isinstance(alpha, bool) else None, threes)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return FormatMetadata()


def write_format_metadata(memo: FormatMetadata) -> Mapping[str, str]:
    """Return `memo` as metadata; empty if it is empty."""
    found = ({} if memo.alpha is None else {"alpha": memo.alpha}) | ({"ranks": memo.ranks} if memo.ranks else {})
    return {CONVERTED_KEY: json.dumps(found, sort_keys=True)} if found else {}
