"""Metadata about the format of a LoRA file (torch-free).

Some layouts cannot express what others can: that there is no alpha, or the ranks of q, k and v when they are fused. A
converted file records this for its source, so that converting back gives the same file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage_train.io.json_text import parse_json

CONVERTED_KEY = "zimage_train.converted"


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
        found = parse_json(text or "{}")
        ranks = {name: three for name, three in found.get("ranks", {}).items() if _are_ranks(three)}
        alpha = found.get("alpha")
        return FormatMetadata(alpha if isinstance(alpha, bool) else None, ranks)
    except (ValueError, AttributeError):
        return FormatMetadata()


def _are_ranks(three: object) -> bool:
    return isinstance(three, list) and len(three) == 3 and all(type(rank) is int and rank >= 0 for rank in three)


def write_format_metadata(memo: FormatMetadata) -> Mapping[str, str]:
    """Return `memo` as metadata; empty if it is empty."""
    found = ({} if memo.alpha is None else {"alpha": memo.alpha}) | ({"ranks": memo.ranks} if memo.ranks else {})
    return {CONVERTED_KEY: json.dumps(found, sort_keys=True)} if found else {}
