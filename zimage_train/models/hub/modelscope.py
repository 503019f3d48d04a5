"""ModelScope as the hub: what it has of a repository, and its cache on this machine.

Torch-free. Through modelscope-hub, the client that the `modelscope` package stands on as well; what comes is resumed by
it, and it honours MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and proxies. It knows no offline switch,
so HF_HUB_OFFLINE is that of both hubs.
"""

import contextlib
import functools
import logging
import os
from pathlib import Path

from huggingface_hub import constants
from modelscope_hub import CacheNotFound, FileDownloadError, HubApi, HubConfig, NetworkError

from zimage_train.models.hub.base import RemoteFile

CACHE_VARIABLE = "MODELSCOPE_CACHE"
BRANCH = "master"
"""What the library takes where no revision is named."""


@functools.cache
def _api() -> HubApi:
    if not os.environ.get("MODELSCOPE_LOG_LEVEL"):
        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)  # else it says every step that it takes
    # With no token at all the library would unpickle the cookies of its own `login`, and nothing is unpickled here.
    return HubApi(HubConfig(token=os.environ.get("MODELSCOPE_API_TOKEN", "")))


def cache_folder() -> Path:
    return HubConfig(token="").cache_dir


def snapshot(repository: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    """The folder of a repository with the files that meet `patterns`, completed unless `local_only`.

    A folder is that of a branch, not of a commit, so the library compares the digest of each file that is here already
    before it takes it for the branch's. Where ModelScope cannot be reached, what is here is taken as it is.
    """

    def fetched(local_files_only: bool) -> Path:
        return _api().download_repo(
            repository, "model", revision=revision, allow_patterns=patterns, local_files_only=local_files_only
        )

    if local_only or constants.HF_HUB_OFFLINE:
        return fetched(local_files_only=True)
    try:
        return fetched(local_files_only=False)
    except NetworkError:
        with contextlib.suppress(CacheNotFound):
            return fetched(local_files_only=True)
        raise
    except FileDownloadError as error:  # says of how many; one of them says why
        raise next(iter(error.failed_files.values()), error) from None


def listed(repository: str, revision: str | None) -> list[RemoteFile]:
    """All files of a repository."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    return [
        RemoteFile(repository, revision or BRANCH, one.path, one.size, one.sha256.lower() if one.sha256 else None)
        for one in _api().list_repo_files(repository, "model", revision=revision)
        if not one.is_dir
    ]


def local(remote: RemoteFile) -> Path | None:
    """Where a file is on this machine; None: it is not, or it is that of an older commit of another size."""
    try:
        found = _api().download_file(
            remote.repository, "model", remote.path, revision=remote.commit, local_files_only=True
        )
    except CacheNotFound:
        return None
    return found if found.stat().st_size == remote.bytes else None


def bring(remote: RemoteFile) -> Path:
    """Download one file, going on where an earlier attempt stopped."""
    return _api().download_file(
        remote.repository, "model", remote.path, revision=remote.commit, expected_sha256=remote.sha256
    )
