"""Digests of files by content: the identity of a model or adapter, independent of the folder that it is in."""

import contextlib
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json

_SHA256 = re.compile(r"[0-9a-f]{64}")


class DigestCache:
    """Digests of files, remembered under path, size and times of change, so that 12 GB are read only once."""

    def __init__(self, path: Path | None) -> None:
        """Load the digests stored at `path`; None stores none."""
        self._path = path
        self._digests: dict[str, str] = {}
        if path is not None:
            # A missing or damaged file costs no more than reading the weights again.
            with contextlib.suppress(OSError, ValueError):
                loaded = parse_json(path.read_bytes())
                if isinstance(loaded, dict):
                    self._digests = loaded

    def of(self, paths: Iterable[Path]) -> str:
        """Return a digest for the names and contents of `paths`; their folders do not count."""
        lines = sorted(f"{path.name} {self._file(path)}" for path in paths)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def of_folder(self, folder: Path, patterns: Iterable[str] = ("*.safetensors", "*.json", "*.jinja", "*.txt")) -> str:
        """Return the digest of the files directly in `folder` that match `patterns`: weights, configs, templates."""
        return self.of(path for pattern in patterns for path in folder.glob(pattern))

    def of_content(self, path: Path) -> str:
        """Return the sha256 of a file, independent of its name."""
        return self._file(path)

    def _file(self, path: Path) -> str:
        real = path.resolve()
        if _SHA256.fullmatch(real.name):  # the hub's cache names large files by their sha256
            return real.name
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
        if key not in self._digests:
            with open(real, "rb") as file:
                self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
            if self._path is not None:
                atomic.write_json(self._path, self._digests)
        return self._digests[key]
