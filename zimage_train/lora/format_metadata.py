"""What a LoRA file says of its format in its header (torch-free).

Some layouts cannot say what others can: that there is no alpha, or where one of q, k and v ends when they are fused. A
converted file remembers it of the one that it was made of, so that the way back is the same file. diffusers and peft
keep alpha in the header: `lora_adapter_metadata`, a LoraConfig as JSON. No other tool reads it there, and modules that
no pattern names have the common alpha.
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
    """(module, rank) -> alpha, as the header of the file at `path` gives it; None: it says nothing of it.

    Raises:
        WeightsError: it gives an alpha that can be none.
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
            raise WeightsError(Problem(str(path), what, "save it with the alpha that it was trained with"))
    is_rank_stabilised = config.get("use_rslora") is True  # then the scale is alpha / sqrt(rank)

    def alpha_of(module: str, rank: int) -> float:
        alpha = next((value for name, value in patterns.items() if _matches(name, module)), common)
        return float(alpha) * (math.sqrt(rank) if is_rank_stabilised else 1.0)

    return alpha_of


def alphas_to_metadata(ranks: Mapping[str, int], alphas: Mapping[str, float], is_dora: bool) -> str:
    """The header's text for modules of these ranks and alphas; the most frequent ones are the common ones."""
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {f"^{re.escape(name)}": one for name, one in alphas.items() if one != alpha},
        "target_modules": sorted(ranks),
        "use_dora": is_dora,
    }
    return json.dumps({PREFIX + key: value for key, value in config.items()}, sort_keys=True)


def _matches(pattern: str, module: str) -> bool:
    """As peft matches them; see `get_pattern_key` there."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return pattern == module


def _most_frequent(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(sorted(set(found)), key=found.count)


@dataclass(frozen=True)
class FormatMetadata:
    """Of the file before."""

    alpha: bool | None = None
    """Whether there was any, where this layout has none for want of it, or one only for want of another place."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Fused module -> ranks of its q, k and v, where the factors do not tell."""


def read_format_metadata(text: str | None) -> FormatMetadata:
    """What `write_format_metadata` wrote; nothing, if it is something else."""
    try:
        found = json.loads(text or "{}")
        ranks = {str(name): [int(one) for one in three] for name, three in found.get("ranks", {}).items()}
        alpha = found.get("alpha")
        threes = {name: three for name, three in ranks.items() if len(three) == 3}
        return FormatMetadata(alpha if isinstance(alpha, bool) else None, threes)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return FormatMetadata()


def write_format_metadata(memo: FormatMetadata) -> Mapping[str, str]:
    """As metadata; nothing, if there is nothing to remember."""
    found = ({} if memo.alpha is None else {"alpha": memo.alpha}) | ({"ranks": memo.ranks} if memo.ranks else {})
    return {CONVERTED_KEY: json.dumps(found, sort_keys=True)} if found else {}
