"""ModelScope as the hub, and its cache on this machine (torch-free).

It uses modelscope-hub, the client library of the `modelscope` package, which resumes downloads and honours
MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and proxies. It has no offline switch, so HF_HUB_OFFLINE
applies to both hubs.
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
"""The library's default where no revision is given."""


@functools.cache
def _api() -> HubApi:
    if not os.environ.get("MODELSCOPE_LOG_LEVEL"):
        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)  # its info level logs every step
    # Without a token the library would unpickle the cookies that its `login` has saved; this package unpickles nothing.
    return HubApi(HubConfig(token=os.environ.get("MODELSCOPE_API_TOKEN", "")))


def cache_folder() -> Path:
    return HubConfig(token="").cache_dir


def snapshot(repository: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    """Return the folder of a repository in the cache; download what `patterns` match and it lacks, unless `local_only`.

    The cache has a folder for each branch, not for each commit, so the library compares the digests of cached files
    with those of the branch. If ModelScope cannot be reached, cached files are used as they are.
    """

    def download(local_files_only: bool) -> Path:
        return _api().download_repo(
            repository, "model", revision=revision, allow_patterns=patterns, local_files_only=local_files_only
        )

    if local_only or constants.HF_HUB_OFFLINE:
        return download(local_files_only=True)
    try:
        return download(local_files_only=False)
    except NetworkError:
        with contextlib.suppress(CacheNotFound):
            return download(local_files_only=True)
        raise
    except FileDownloadError as error:  # its message has a count only; the first failure has the reason
        raise next(iter(error.failed_files.values()), error) from None


def list_repository(repository: str, revision: str | None) -> list[RemoteFile]:
    """Return all files of a repository."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    files = []
    for entry in _api().list_repo_files(repository, "model", revision=revision):
        if not entry.is_dir:
            sha256 = entry.sha256.lower() if entry.sha256 else None
            files.append(RemoteFile(repository, revision or BRANCH, entry.path, entry.size, sha256))
    return files


def find_cached(remote: RemoteFile) -> Path | None:
    """Return the path of a file in the cache, or None if it is not there or of another size.

    A file of another size belongs to an older commit of the branch.
    """
    try:
        path = _api().download_file(
            remote.repository, "model", remote.path, revision=remote.commit, local_files_only=True
        )
    except CacheNotFound:
        return None
    return path if path.stat().st_size == remote.bytes else None


def fetch(remote: RemoteFile) -> Path:
    """Download a file into the cache, resuming an earlier attempt."""
    return _api().download_file(
        remote.repository, "model", remote.path, revision=remote.commit, expected_sha256=remote.sha256
    )
