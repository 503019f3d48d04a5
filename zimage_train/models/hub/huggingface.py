"""The Hugging Face hub: what it has of a repository, and its cache on this machine.

Torch-free. What comes is resumed by huggingface_hub, which honours HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and proxies.
"""

from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

from zimage_train.models.hub.base import RemoteFile

CACHE_VARIABLE = "HF_HOME"


def cache_folder() -> Path:
    return Path(constants.HF_HUB_CACHE)


def snapshot(repository: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    """The folder of a repository with the files that meet `patterns`, completed unless `local_only`."""
    found = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_only)
    return Path(found)


def listed(repository: str, revision: str | None) -> list[RemoteFile]:
    """All files of a repository."""
    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    return [
        RemoteFile(repository, info.sha or "main", one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None)
        for one in info.siblings or []
    ]


def local(remote: RemoteFile) -> Path | None:
    """Where a file is on this machine; None: it is not."""
    found = try_to_load_from_cache(remote.repository, remote.path, revision=remote.commit)
    return Path(found) if isinstance(found, str) else None


def bring(remote: RemoteFile) -> Path:
    """Download one file, going on where an earlier attempt stopped."""
    return Path(hf_hub_download(remote.repository, remote.path, revision=remote.commit))
