"""The config of a job that a program sends: checked, and brought to the folder of the runs."""

import json
from dataclasses import dataclass
from pathlib import Path

from zimage_train.config import load
from zimage_train.config.foreign import FOREIGN_FORMATS
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Location, Problem

NAME = Path("config.yaml")
"""What problems call a config that is no file."""


@dataclass(frozen=True)
class SubmittedJob:
    """A config for the queue."""

    name: str
    text: str


def check_submitted(text: str, runs: Path) -> SubmittedJob:
    """Return the job of a config, whose run will be in the folder `runs`.

    Relative paths in it are relative to the working directory of the page, as for its trainings.

    Raises:
        ConfigError: lists every problem.
    """
    if not text.strip():
        raise ConfigError(Problem("body", "is empty", "send the text of a config", "missing-argument"))
    config, is_foreign = _read(text)
    if Path(config.output_dir).absolute() == runs.absolute():
        return SubmittedJob(config.name, text)
    if is_foreign or "output_dir" in config.model_fields_set:
        found = f"is {config.output_dir}, and this page has its runs in {runs}"
        raise ConfigError(Problem(Location(str(NAME), key="output_dir"), found, "leave it out", "outside"))
    return SubmittedJob(config.name, f"output_dir: {json.dumps(str(runs))}\n{text}")


def _read(text: str) -> tuple[Config, bool]:
    """Return the config, and whether it is in the format of another trainer."""
    for foreign in FOREIGN_FORMATS.values():
        if foreign.recognizes(text):
            converted = foreign.convert(NAME, text, ())
            if converted is not None:
                return converted.config, True
    return load.load_document(NAME, load.parse(NAME, text), ()), False
