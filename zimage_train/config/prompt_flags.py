"""Flags in prompts, such as `--w 512`, and what people write in their place (torch-free)."""

import re
from dataclasses import dataclass
from pathlib import Path

_DASHES = "(?:^|(?<=\\s))[-\u2010-\u2015\u2212]{1,2}"
"""One dash or two, where a word begins; word processors make other dashes of them."""
_NUMBER_FLAG = re.compile(rf"{_DASHES}(?P<name>[whdslg])\s*[=:]?\s*(?P<value>-?\d+(?:\.\d+)?)(?=\s|$)")
_NEGATIVE_FLAG = re.compile(rf"{_DASHES}n(?==|\s)")


OTHER_FORMS = (".json", ".jsonl", ".toml", ".csv", ".tsv")
"""Extensions of prompt files of other tools, whose lines are no prompts."""


def other_form_of(path: Path) -> str | None:
    """Return the extension of a file whose lines are no prompts, without its dot, or None."""
    suffix = path.suffix.lower()
    return suffix[1:] if suffix in OTHER_FORMS else None


@dataclass(frozen=True)
class Flag:
    """A flag of kohya's prompt files in a text, well formed or not."""

    text: str
    """As it is written, such as `-w=512`."""
    well_formed: str
    """As prompt files have it, such as `--w 512`."""


def flag_in(text: str) -> Flag | None:
    """Return the first flag with a number in `text`, else the first negative prompt, or None if it has neither."""
    match = _NUMBER_FLAG.search(text)
    if match is not None:
        return Flag(match[0], f"--{match['name']} {match['value']}")
    match = _NEGATIVE_FLAG.search(text)
    return None if match is None else Flag(match[0], "--n")
