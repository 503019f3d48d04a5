"""Folders of the workspace, for choosing one."""

import os
from dataclasses import dataclass
from pathlib import Path

from zimage_train.dataset import images
from zimage_train.errors import DataError, Problem, ZImageTrainError
from zimage_train.ui.workspace import Workspace

MAX_SUBFOLDERS = 500


@dataclass(frozen=True)
class FolderListing:
    """The entry of a folder in the folder browser."""

    path: Path
    parent: Path | None
    """None at the top of the workspace."""
    subfolders: list[Path]
    num_images: int
    """Images in the folder itself."""


def list_roots(workspace: Workspace) -> list[Path]:
    """Return the folders of the workspace that exist, without repetition."""
    roots = (folder.resolve() for folder in (*workspace.folders, workspace.runs) if folder.is_dir())
    return list(dict.fromkeys(roots))


def list_subfolders(workspace: Workspace, folder: Path) -> FolderListing:
    """Return the subfolders of a folder of the workspace; hidden ones, and links out of the workspace, are left out.

    Raises:
        ConfigError: it is outside the workspace.
        DataError: it cannot be read.
    """
    path = workspace.contain(folder)
    subfolders: list[Path] = []
    num_images = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if Path(entry.name).suffix.lower() in images.EXTENSIONS:
                    num_images += 1
                elif entry.is_dir() and _is_contained(workspace, Path(entry.path)):
                    subfolders.append(Path(entry.path))
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), message, "check its permissions", "unreadable-file")) from None
    parent = path.parent if _is_contained(workspace, path.parent) and path.parent != path else None
    subfolders.sort(key=lambda subfolder: subfolder.name.casefold())
    return FolderListing(path, parent, subfolders[:MAX_SUBFOLDERS], num_images)


def _is_contained(workspace: Workspace, path: Path) -> bool:
    try:
        workspace.contain(path)
    except (ZImageTrainError, OSError):
        return False
    return True
