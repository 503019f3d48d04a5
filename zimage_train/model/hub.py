"""Files of hub repositories: which there are, how large, whether they are here, and whether they came whole.

Torch-free. What comes is resumed by huggingface_hub, which honours HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and proxies.
"""

import fnmatch
import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from zimage_train import files
from zimage_train.errors import Problem, WeightsError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Remote:
    """One file of a repository."""

    repository: str
    commit: str
    path: str
    bytes: int
    sha256: str | None
    """None: it is small and kept in git, whose own digest the hub checks."""

    @property
    def local(self) -> Path | None:
        """Where it is on this machine; None: it is not."""
        found = try_to_load_from_cache(self.repository, self.path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None


def remotes(repository: str, revision: str | None, patterns: list[str]) -> list[Remote]:
    """The files of a repository whose names meet one of `patterns`.

    Raises:
        WeightsError: the hub cannot be reached, or has no such repository.
    """
    name = f"{repository}@{revision}" if revision else repository
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the hub raises a dozen kinds, from four libraries
        lines = str(error).strip().splitlines()
        what = f"the hub does not say what is in it ({lines[0] if lines else error!r})"
        raise WeightsError(Problem(name, what, "check the name, the connection, and HF_HUB_OFFLINE")) from None
    return [
        Remote(repository, info.sha or "main", one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None)
        for one in info.siblings or []
        if any(fnmatch.fnmatch(one.rfilename, pattern) for pattern in patterns)
    ]


def bring(remote: Remote) -> Path:
    """Download one file, going on where an earlier attempt stopped.

    Raises:
        WeightsError: it does not come.
    """
    try:
        return Path(hf_hub_download(remote.repository, remote.path, revision=remote.commit))
    except Exception as error:  # as above
        lines = str(error).strip().splitlines()
        what = f"does not come ({lines[0] if lines else error!r})"
        raise WeightsError(Problem(f"{remote.repository}/{remote.path}", what, "the same command goes on")) from None


def require_whole(remote: Remote, path: Path) -> None:
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
        files.remove(path.resolve())
        files.remove(path)
        what = "is not what the hub has: its size or digest is another"
        todo = "it is removed; the same command downloads it again"
        raise WeightsError(Problem(f"{remote.repository}/{remote.path}", what, todo))
