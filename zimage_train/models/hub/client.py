"""Access to the model hub: list, find, download and verify files (torch-free).

It is the Hugging Face hub, or ModelScope if the environment variable ZIMAGE_TRAIN_HUB says so. It is not a config key,
since files of the same digest give the same run wherever they come from.
"""

import fnmatch
import hashlib
import os
import re
from pathlib import Path

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.models.hub.base import RemoteFile

CHUNK_BYTES = 1 << 24
VARIABLE = "ZIMAGE_TRAIN_HUB"


class HubUnavailableError(WeightsError):
    """The hub that the environment variable names cannot be used at all."""


def selected_hub():  # no return type: pyright infers both modules, which have the same functions
    """Return the module of the hub that the environment selects.

    Raises:
        HubUnavailableError: the hub is unknown, or its library is not installed.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        from zimage_train.models.hub import huggingface

        return huggingface
    if name != "modelscope":
        hint = "set it to modelscope, or unset it for the Hugging Face hub"
        raise HubUnavailableError(Problem(VARIABLE, f"is {name!r}, which is not a known hub", hint, "bad-value"))
    try:
        from zimage_train.models.hub import modelscope
    except ImportError as error:
        what = f"is modelscope, whose library is not installed or too old ({error})"
        raise HubUnavailableError(
            Problem(VARIABLE, what, "pip install 'modelscope-hub>=0.5.1', or unset it", "missing-package")
        ) from None
    return modelscope


def first_line(error: Exception) -> str:
    """Return the first line of an error message of a hub's library."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def list_files(repository: str, revision: str | None, patterns: list[str]) -> list[RemoteFile]:
    """Return the files of a repository whose paths match any of the glob `patterns`.

    Raises:
        WeightsError: the hub cannot be reached, or has no such repository.
    """
    name = f"{repository}@{revision}" if revision else repository
    hub = selected_hub()
    try:
        files = hub.list_repository(repository, revision)
    except Exception as error:  # noqa: BLE001  the hubs raise a dozen exception types from four libraries
        what = f"the hub cannot list its files ({first_line(error)})"
        raise WeightsError(
            Problem(name, what, "check the name, the connection, and HF_HUB_OFFLINE", "download-failed")
        ) from None
    return [file for file in files if any(fnmatch.fnmatch(file.path, pattern) for pattern in patterns)]


def cached_path(remote: RemoteFile) -> Path | None:
    """Return the path of a file in the cache on this machine, or None if it is not there."""
    return selected_hub().find_cached(remote)


def download_file(remote: RemoteFile) -> Path:
    """Download a file into the cache, resuming an earlier attempt.

    Raises:
        WeightsError: the download fails.
    """
    hub = selected_hub()
    try:
        return hub.fetch(remote)
    except Exception as error:  # noqa: BLE001  as in list_files above
        what = f"cannot be downloaded ({first_line(error)})"
        hint = "the same command resumes the download"
        raise WeightsError(Problem(f"{remote.repository}/{remote.path}", what, hint, "download-failed")) from None


def upload_problems() -> list[Problem]:
    """Return why nothing could be uploaded from this machine, as far as that is known before the hub is asked."""
    from zimage_train.models.hub import huggingface

    problems: list[Problem] = []
    if os.environ.get(VARIABLE):
        hint = "unset it; uploads go to the Hugging Face hub only"
        problems.append(Problem(VARIABLE, f"is {os.environ[VARIABLE]!r}", hint, "bad-value"))
    if not huggingface.has_token():
        hint = "run hf auth login, or set HF_TOKEN to a token that may write"
        problems.append(Problem("--to", "there is no token of the Hugging Face hub on this machine", hint, "no-token"))
    return problems


def upload_files(folder: Path, files: list[str], repository: str) -> str:
    """Upload `files`, by their paths in `folder`, as a commit to `repository`, which is created if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        WeightsError: the upload fails; what is in the repository stays as it was.
    """
    from zimage_train.models.hub import huggingface

    try:
        return huggingface.upload(folder, files, repository)
    except Exception as error:  # noqa: BLE001  as in list_files above
        # The reason is often not on the first line, and a link to an explanation of HTTP stands before it.
        reason = re.sub(r"For more information check: \S+", "", " ".join(str(error).split()))[:300].strip()
        what = f"cannot be uploaded to ({reason or type(error).__name__})"
        hint = f"check the name, the token's permission to write and the connection; {folder} is complete"
        raise WeightsError(Problem(f"--to {repository}", what, hint, "upload-failed")) from None


def require_intact(remote: RemoteFile, path: Path) -> None:
    """Compare a file with the size and SHA-256 digest that the hub lists for it.

    Raises:
        WeightsError: it differs; the file is removed, so that it is downloaded again.
    """
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    if size != remote.bytes or (remote.sha256 is not None and digest.hexdigest() != remote.sha256):
        # In the Hugging Face cache `path` is a link: both it and the file that it points to have to go.
        atomic.remove(path.resolve())
        atomic.remove(path)
        what = "differs from the file on the hub in size or digest"
        hint = "it is removed; the same command downloads it again"
        raise WeightsError(Problem(f"{remote.repository}/{remote.path}", what, hint, "download-failed"))
