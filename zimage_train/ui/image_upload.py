"""Images and captions that are dropped on the page: their names, and the folder that they are written to."""

import re
import threading
import unicodedata
from pathlib import Path, PurePosixPath

from zimage_train.dataset import images
from zimage_train.errors import DataError, Problem
from zimage_train.io import atomic
from zimage_train.io.operating_system import WINDOWS_DEVICES
from zimage_train.ui.image_folder import CAPTION_EXT
from zimage_train.ui.workspace import Workspace

UPLOADS = "images"
"""Folder in the first folder of the workspace that holds the uploaded folders."""
EXTENSIONS = (*sorted(images.EXTENSIONS), CAPTION_EXT)
MAX_FILE_BYTES = 200 * 1000**2
MAX_NAME = 120
_UNSAFE = re.compile(r"[^\w .()+-]")

_writing = threading.Lock()


def upload_folder(workspace: Workspace, name: str) -> Path:
    """Return the folder that images uploaded under `name` are written to; it may not exist yet.

    Raises:
        DataError: `name` has no letter or digit.
        ConfigError: the folder is outside the workspace.
    """
    safe = _safe_stem(name)
    if not safe:
        raise DataError(Problem(f"folder {name!r}", "is no name of a folder", "use letters or digits", "bad-name"))
    return workspace.contain(workspace.folders[0] / UPLOADS / safe)


def safe_name(name: str) -> str:
    """Return the name under which an uploaded file is written: without folders, and valid on every system.

    Raises:
        DataError: it is neither an image nor a caption, or has no name.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    suffix, stem = path.suffix.lower(), _safe_stem(path.stem)
    if suffix not in EXTENSIONS:
        hint = f"choose {', '.join(EXTENSIONS)}"
        raise DataError(Problem(path.name or name, "is neither an image nor a caption", hint, "not-an-image"))
    if not stem:
        raise DataError(Problem(path.name, "has no letter or digit in its name", "rename it", "bad-name"))
    return stem + suffix


def _safe_stem(text: str) -> str:
    # A leading dot would hide the file, and a leading `_` its folder from the training.
    stem = _UNSAFE.sub("_", unicodedata.normalize("NFC", text))[:MAX_NAME].strip(" ._-")
    return f"{stem}_" if stem.upper() in WINDOWS_DEVICES else stem


def save_upload(folder: Path, name: str, content: bytes) -> Path:
    """Write an uploaded file into `folder`, whole or not at all, and return its path; nothing is overwritten.

    Raises:
        DataError: it is neither an image nor a caption, or another file has its name.
        DiskError: it cannot be written.
    """
    path = folder / safe_name(name)
    with _writing:
        if not path.exists():
            atomic.write(path, [content])
        elif path.read_bytes() != content:
            message = "exists with another content, and is kept"
            raise DataError(Problem(str(path), message, "rename the new file", "exists"))
    return path
