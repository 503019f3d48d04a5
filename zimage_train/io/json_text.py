"""Parsing of JSON that anyone may have written, whose only failure is a ValueError."""

import json
import re
from typing import Any

_LONGEST_WHOLE = 300
"""Digits of a whole number; up to 308 fit into a float, so that the value can be computed with."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
"""The beginning of half a surrogate pair; both halves together are a character."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a whole number that no float can hold, or half of a
            surrogate pair, which can be neither printed nor written.
    """
    decoded = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
    try:
        value = json.loads(decoded, parse_int=_whole)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if _HALF_PAIR.search(decoded):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _whole(text: str) -> int:
    if len(text) > _LONGEST_WHOLE:
        raise ValueError(f"has a number of {len(text)} digits")
    return int(text)
