"""The folders that the page may read and write."""

import re
from dataclasses import dataclass
from pathlib import Path

from zimage_train.errors import ConfigError, Problem

RUN_NAME = re.compile(r"\w[\w .+-]{0,99}")
"""Names that a run may have on the page; those of hidden folders and of other places are none."""


@dataclass(frozen=True)
class Workspace:
    """The folder of the runs, and the folders whose images may be shown and whose captions may be changed."""

    runs: Path
    folders: tuple[Path, ...]

    def run(self, name: str) -> Path:
        """Return the folder of the run `name`.

        Raises:
            ConfigError: it is no name of a run.
        """
        if not RUN_NAME.fullmatch(name):
            raise ConfigError(Problem(f"run {name!r}", "is no name of a run", "choose another", "outside"))
        return self.runs / name

    def contain(self, path: Path) -> Path:
        """Return the absolute path without links if it is in one of the folders, or in that of the runs.

        Raises:
            ConfigError: it is not.
        """
        try:
            resolved = path.expanduser().resolve()
        except RuntimeError:  # the home of nobody
            resolved = path
        if any(resolved.is_relative_to(folder.resolve()) for folder in (self.runs, *self.folders)):
            return resolved
        hint = "start with `zimage-train ui --folder FOLDER` to open it"
        raise ConfigError(Problem(str(path), "is outside the folders of this page", hint, "outside"))
