"""The formats that this program converts, each without its converter, which is imported when a file is recognised."""

import re
from collections.abc import Sequence
from pathlib import Path

from zimage_train.config import load
from zimage_train.config.foreign import ConfigWithNotes, ForeignFormat
from zimage_train.errors import ConfigError, Problem

_JOB_KEY = re.compile(r'^(?:job\s*:|[\s{]*"job"\s*:)', re.MULTILINE)
"""`job` as a key of YAML or JSON at the top of a file; no setting of this trainer has that name."""


def _recognizes_job(text: str) -> bool:
    return _JOB_KEY.search(text) is not None


def _convert_job(path: Path, text: str, overrides: Sequence[str]) -> ConfigWithNotes | None:
    from zimage_train.compat.aitoolkit.convert import convert_job

    return convert_job(path, text, overrides)


AI_TOOLKIT = ForeignFormat("AI Toolkit", _recognizes_job, _convert_job)

_DATASETS = re.compile(r"^[ \t]*(?:\[\[[ \t]*datasets[ \t]*\]\]|datasets[ \t]*=)", re.MULTILINE)
"""`datasets` as a list of TOML; YAML has neither."""


def _recognizes_dataset(text: str) -> bool:
    return _DATASETS.search(text) is not None


def _convert_dataset(path: Path, text: str, overrides: Sequence[str]) -> ConfigWithNotes | None:
    from zimage_train.compat.dataset_toml import convert_dataset

    return convert_dataset(path, text, overrides)


DATASET_TOML = ForeignFormat("kohya's dataset files", _recognizes_dataset, _convert_dataset)


def read_job_as_config(path: Path) -> ConfigWithNotes:
    """Return the config that the job, or the dataset file of kohya's trainers, at `path` becomes.

    Raises:
        ConfigError: it is neither, or lists every problem.
    """
    text = load.read_yaml_text(path)
    if path.suffix.lower() == ".toml" or _recognizes_dataset(text):
        from zimage_train.compat.dataset_toml import convert_dataset

        return convert_dataset(path, text)
    converted = _convert_job(path, text, ()) if _recognizes_job(text) else None
    if converted is None:
        todo = "a job has job: and config: at the top; train takes other configs as they are"
        raise ConfigError(Problem(str(path), "is no job of AI Toolkit", todo, "not-a-config"))
    return converted
