"""The formats of other trainers' configs that `load.read_config` recognises.

A format is registered by the command line, not imported here: its converter belongs to a higher room, and is
loaded only when a file is recognised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zimage_train.config.schema import Config


class ConfigWithNotes(NamedTuple):
    """A config, and the notes of its conversion; a native config has no notes."""

    config: Config
    notes: list[str]
    """A line for each point in which the run will differ from the same job in the other trainer."""


@dataclass(frozen=True)
class ForeignFormat:
    """A format by which another trainer is configured."""

    name: str
    recognizes: Callable[[str], bool]
    """Return whether a text may be of this format: a cheap test, before anything is parsed."""
    convert: Callable[[Path, str, Sequence[str]], ConfigWithNotes | None]
    """Return the config for (path, text, `key=YAML` overrides), or None if the text proves to be of another format.

    It raises a ConfigError that lists every problem.
    """


FOREIGN_FORMATS: dict[str, ForeignFormat] = {}
"""Formats by name; filled by `register_format`."""


def register_format(foreign: ForeignFormat) -> None:
    """Let `load.read_config` recognise a format; registering it again changes nothing."""
    FOREIGN_FORMATS[foreign.name] = foreign
