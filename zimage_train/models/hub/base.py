"""One file of a hub's repository, as the hub describes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository."""

    repository: str
    commit: str
    """Or a branch, where the hub names files by that."""
    path: str
    bytes: int
    sha256: str | None
    """None: it is small and kept in git, whose own digest the hub checks."""
