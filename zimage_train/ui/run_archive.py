"""A run as one download: everything in its folder but checkpoints, packed while it is sent."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from zimage_train.dataset.sources import is_text

LEFT_OUT = ("checkpoints", "tensorboard")
CHUNK_BYTES = 1 << 20


class _Drained(io.RawIOBase):
    """A stream to write to, from which what was written is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        content = bytes(data)
        self._parts.append(content)
        return len(content)

    def drain(self) -> bytes:
        content = b"".join(self._parts)
        self._parts.clear()
        return content


def archived_files(folder: Path) -> list[Path]:
    """Return the files of a run that its archive has; links are left out."""
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        is_left_out = is_hidden or parts[0] in LEFT_OUT or not is_text(str(path))
        if not is_left_out and path.is_file() and not path.is_symlink():
            found.append(path)
    return found


def stream_archive(folder: Path) -> Iterator[bytes]:
    """Yield the bytes of a zip archive of a run, not compressed, since weights and images hardly can be."""
    stream = _Drained()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in archived_files(folder):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            try:
                source = path.open("rb")
            except OSError:  # a run that trains replaces its files
                continue
            with source, archive.open(name, "w", force_zip64=True) as target:
                while chunk := _read(source):
                    target.write(chunk)
                    yield stream.drain()
    yield stream.drain()


def _read(source: IO[bytes]) -> bytes:
    """Return the next bytes of a file, or none where the disk gives no more."""
    try:
        return source.read(CHUNK_BYTES)
    except OSError:
        return b""
