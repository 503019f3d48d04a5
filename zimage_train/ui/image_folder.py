"""A folder of images and their captions, as a training would read it; no image is decoded."""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import captions, images, sources
from zimage_train.errors import DataError, Note, Problem, ZImageTrainError, collect_errors
from zimage_train.io import atomic

CAPTION_EXT = ".txt"

_writing = threading.RLock()
"""Held from the comparison of a caption file to its replacement: two tabs of the page may save the same caption."""


class CaptionConflict(DataError):
    """A caption file that has changed since it was shown; it is not overwritten.

    Args:
        current: the caption that the file has now.
    """

    def __init__(self, file: Path, current: str) -> None:
        self.current = current
        hint = "read it, and save again"
        super().__init__(Problem(str(file), "has changed meanwhile", hint, "changed-file"))


@dataclass
class FolderImage:
    """An image of a folder."""

    name: str
    """Its path in the folder, with `/`."""
    path: Path
    caption: str
    """As it was last read or saved; empty if there is none."""

    @property
    def caption_file(self) -> Path:
        return self.path.with_suffix(CAPTION_EXT)


class ImageFolder:
    """The images of a folder and of its subfolders, in the order of a training.

    Args:
        path: the folder.
        mask: a folder of masks, whose images are then left out; `alpha`; or None.
    """

    def __init__(self, path: Path, mask: str | None = None) -> None:
        self.path, self.mask = path, mask
        self.images: dict[str, FolderImage] = {}
        self.errors: list[ZImageTrainError] = []
        self.notes: list[Note] = []
        self.has_captions = False
        """Whether the captions of all images have been read."""
        self._stems: Counter[Path] = Counter()

    @property
    def entry(self) -> DataEntry:
        """The entry of `data` that trains this folder."""
        return DataEntry(folder=str(self.path), mask=self.mask)

    def read_names(self) -> None:
        """List the images, and read no caption yet: on a slow disk most of the time of `read` goes into those."""
        found: dict[str, FolderImage] = {}
        paths = [path for path in sources.walk_folder(self.path, self.entry, [], []) if _is_image(path)]
        for path in sorted(paths, key=lambda path: path.relative_to(self.path).as_posix()):
            name = path.relative_to(self.path).as_posix()
            if sources.is_text(name):
                found[name] = FolderImage(name, path, "")
        self.images, self.has_captions = found, False
        self._stems = Counter(image.path.with_suffix("") for image in found.values())

    def read(self) -> None:
        """List the images and read their captions.

        Raises:
            DataError: there is no such folder.
        """
        errors: list[ZImageTrainError] = []
        notes: list[Note] = []
        found: dict[str, FolderImage] = {}
        stems: Counter[Path] = Counter()
        for source in sources.list_folder(self.entry, errors, notes):
            name = source.path.relative_to(self.path).as_posix()
            if sources.is_text(name):
                found[name] = FolderImage(name, source.path, source.captions[0])
                stems[source.path.with_suffix("")] += 1
        self.images, self.errors, self.notes, self._stems = found, errors, notes, stems
        self.has_captions = True

    def read_captions(self, names: Iterable[str]) -> None:
        """Read the captions of some images again; one that cannot be read stays as it was."""
        for name in names:
            image = self.images.get(name)
            if image is not None:
                with collect_errors([]):
                    image.caption = current_caption(image.caption_file)

    def save_caption(self, name: str, text: str, expected: str) -> str:
        """Write the caption of an image, whole or not at all, and return it as it is read back.

        Args:
            name: a name of `images`.
            text: the new caption.
            expected: the caption that whoever wrote `text` has seen.

        Raises:
            CaptionConflict: the file has another caption than `expected`.
            DataError: the image is gone, or shares its caption file with another image, or `text` is no caption.
            DiskError: the file cannot be written.
        """
        image = self.images.get(name)
        if image is None or not image.path.exists():
            raise DataError(Problem(name, "is no longer in the folder", "reload the page", "missing-file"))
        file = image.caption_file
        if self._stems[image.path.with_suffix("")] > 1:
            message = "would be the caption file of several images"
            raise DataError(Problem(str(file), message, "rename all but one of them", "ambiguous-caption"))
        text = captions.clean_text(text)
        _require_caption(file, text)
        with _writing:
            current = current_caption(file)
            if current not in (expected, text):
                raise CaptionConflict(file, current)
            if current != text:
                atomic.write_text(file, f"{text}\n" if text else "")
        image.caption = text
        return text

    def search(self, query: str = "", tag: str | None = None, is_uncaptioned: bool = False) -> list[str]:
        """Return the names of the images whose name or caption has `query` in any case, and whose tags have `tag`.

        Args:
            is_uncaptioned: only images without a caption.
        """
        query = query.strip().casefold()
        found: list[str] = []
        for image in self.images.values():
            has_query = query in image.caption.casefold() or query in image.name.casefold()
            has_tag = tag is None or (tag in image.caption and tag in tags_of(image.caption))
            if has_query and has_tag and not (is_uncaptioned and image.caption):
                found.append(image.name)
        return found


def tags_of(caption: str) -> list[str]:
    """Return the comma-separated tags of a caption."""
    parts = (part.strip() for part in caption.replace("\n", ",").split(","))
    return [part for part in parts if part]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.EXTENSIONS


def current_caption(file: Path) -> str:
    """Return the caption that a file has at this moment, empty if there is no file.

    Raises:
        DataError: it is no text.
    """
    return captions.read_caption(file) if file.exists() else ""


def _require_caption(file: Path, text: str) -> None:
    if not sources.is_text(text):
        raise DataError(Problem(str(file), "would hold a character that no text has", "remove it", "not-text"))
    if len(text.encode()) > captions.MAX_BYTES:
        message = f"would have {len(text.encode())} bytes"
        raise DataError(Problem(str(file), message, "captions end at 512 tokens; shorten it", "too-long"))
