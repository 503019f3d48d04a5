"""The description of a file in a hub's repository."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub lists it."""

    repository: str
    commit: str
    """Or a branch, on a hub that addresses files by branch."""
    path: str
    bytes: int
    sha256: str | None
    """None for small files that are kept in git, whose own digest the hub client checks."""
