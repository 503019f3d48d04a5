"""What files contain, as a digest: the identity of a model or adapter, wherever it lies and however it is named."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from zimage_train.io import atomic

BLOB = re.compile(r"[0-9a-f]{64}")


class DigestCache:
    """Content digests of files, remembered by place, size and time of change so that 12 GB are read once."""

    def __init__(self, memo: Path | None) -> None:
        self._memo = memo
        self._known: dict[str, str] = {}
        if memo is not None:
            try:
                loaded = json.loads(memo.read_bytes())
            except (OSError, ValueError):
                loaded = {}
            self._known = loaded if isinstance(loaded, dict) else {}

    def of(self, paths: Iterable[Path]) -> str:
        """One digest for the contents of `paths`; names count, folders do not."""
        lines = sorted(f"{path.name} {self._file(path)}" for path in paths)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def of_folder(self, folder: Path, patterns: Iterable[str] = ("*.safetensors", "*.json", "*.jinja", "*.txt")) -> str:
        """The digest of the files directly in `folder` that weights and configs are made of."""
        return self.of(path for pattern in patterns for path in folder.glob(pattern))

    def of_content(self, path: Path) -> str:
        """The sha256 of one file, whatever its name."""
        return self._file(path)

    def _file(self, path: Path) -> str:
        real = path.resolve()
        if BLOB.fullmatch(real.name):  # the hub's cache names large files by their sha256
            return real.name
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
        if key not in self._known:
            with open(real, "rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            if self._memo is not None:
                atomic.write_json(self._memo, self._known)
        return self._known[key]
