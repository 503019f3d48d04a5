"""What a converted file remembers of the one that it was made of, so that the way back is the same file (torch-free).

Some layouts cannot say what others can: that there is no alpha, or where one of q, k and v ends when they are fused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

KEY = "zimage_train.converted"


@dataclass(frozen=True)
class FormatMetadata:
    """Of the file before."""

    alpha: bool | None = None
    """Whether there was any, where this layout has none for want of it, or one only for want of another place."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Fused module -> ranks of its q, k and v, where the factors do not tell."""


def read_format_metadata(text: str | None) -> FormatMetadata:
    """What `write` wrote; nothing, if it is something else."""
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
    return {KEY: json.dumps(found, sort_keys=True)} if found else {}
