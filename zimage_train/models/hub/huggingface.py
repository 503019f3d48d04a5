"""The Hugging Face hub and its cache on this machine (torch-free).

huggingface_hub resumes downloads, and honours HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and proxies.
"""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import disable_progress_bars

from zimage_train.models.hub.base import RemoteFile

CACHE_VARIABLE = "HF_HOME"


def cache_folder() -> Path:
    return Path(constants.HF_HUB_CACHE)


def snapshot(repository: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    """Return the cached folder of a repository; unless `local_only`, first download what `patterns` match."""
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_only))


def list_repository(repository: str, revision: str | None) -> list[RemoteFile]:
    """Return all files of a repository."""
    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    files = []
    for sibling in info.siblings or []:
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        files.append(RemoteFile(repository, info.sha or "main", sibling.rfilename, sibling.size or 0, sha256))
    return files


def find_cached(remote: RemoteFile) -> Path | None:
    """Return the path of a file in the cache, or None if it is not there."""
    path = try_to_load_from_cache(remote.repository, remote.path, revision=remote.commit)
    # Not a string: either unknown, or known to be missing on the hub.
    return Path(path) if isinstance(path, str) else None


def fetch(remote: RemoteFile) -> Path:
    """Download a file into the cache, resuming an earlier attempt."""
    return Path(hf_hub_download(remote.repository, remote.path, revision=remote.commit))


def has_token() -> bool:
    """Return whether this machine has a token of the hub, from HF_TOKEN or a login."""
    return get_token() is not None


def upload(folder: Path, files: list[str], repository: str) -> str:
    """Commit `files` of `folder` to a repository, which is created if needed; return its address."""
    disable_progress_bars()
    api = HfApi()
    url = api.create_repo(repository, exist_ok=True)
    api.upload_folder(
        repo_id=repository, folder_path=folder, allow_patterns=files, commit_message="Upload LoRA with zimage-train"
    )
    return str(url)
