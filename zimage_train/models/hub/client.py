"""The hub that weights come from: which files it has, how large, whether they are here, and whether they came whole.

Torch-free. It is the Hugging Face hub, or ModelScope where the environment says so: a setting of the config would say
where a run's files came from, and what they are is what counts.
"""

import fnmatch
import hashlib
import os
from pathlib import Path

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.models.hub.base import RemoteFile

CHUNK_BYTES = 1 << 24
VARIABLE = "ZIMAGE_TRAIN_HUB"


class HubUnavailableError(WeightsError):
    """The hub that the environment names cannot be used, whatever is wanted of it."""


def selected_hub():  # one of two modules with the same functions; a checker knows both
    """The hub that is asked.

    Raises:
        NoHub: the environment names one that is unknown, or whose library is not installed.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        from zimage_train.models.hub import huggingface

        return huggingface
    if name != "modelscope":
        todo = "set it to modelscope, or unset it for the Hugging Face hub"
        raise HubUnavailableError(Problem(VARIABLE, f"is {name!r}, which is no hub that is known here", todo))
    try:
        from zimage_train.models.hub import modelscope
    except ImportError as error:
        what = f"is modelscope, whose library is not installed, or too old ({error})"
        raise HubUnavailableError(Problem(VARIABLE, what, "pip install 'modelscope-hub>=0.5.1', or unset it")) from None
    return modelscope


def first_line(error: Exception) -> str:
    """What a hub's library says of a failure, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def list_files(repository: str, revision: str | None, patterns: list[str]) -> list[RemoteFile]:
    """The files of a repository whose names meet one of `patterns`.

    Raises:
        WeightsError: the hub cannot be reached, or has no such repository.
    """
    name = f"{repository}@{revision}" if revision else repository
    source = selected_hub()
    try:
        found = source.listed(repository, revision)
    except Exception as error:  # noqa: BLE001  the hubs raise a dozen kinds, from four libraries
        what = f"the hub does not say what is in it ({first_line(error)})"
        raise WeightsError(Problem(name, what, "check the name, the connection, and HF_HUB_OFFLINE")) from None
    return [one for one in found if any(fnmatch.fnmatch(one.path, pattern) for pattern in patterns)]


def cached_path(remote: RemoteFile) -> Path | None:
    """Where a file is on this machine; None: it is not."""
    return selected_hub().local(remote)


def download_file(remote: RemoteFile) -> Path:
    """Download one file, going on where an earlier attempt stopped.

    Raises:
        WeightsError: it does not come.
    """
    source = selected_hub()
    try:
        return source.bring(remote)
    except Exception as error:  # noqa: BLE001  as in list_files above
        what = f"does not come ({first_line(error)})"
        raise WeightsError(Problem(f"{remote.repository}/{remote.path}", what, "the same command goes on")) from None


def require_intact(remote: RemoteFile, path: Path) -> None:
    """Compare a file with the size and SHA-256 digest that the hub has for it.

    Raises:
        WeightsError: it is another; it is removed, so that it comes again.
    """
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    if size != remote.bytes or (remote.sha256 is not None and digest.hexdigest() != remote.sha256):
        atomic.remove(path.resolve())
        atomic.remove(path)
        what = "is not what the hub has: its size or digest is another"
        todo = "it is removed; the same command downloads it again"
        raise WeightsError(Problem(f"{remote.repository}/{remote.path}", what, todo))
