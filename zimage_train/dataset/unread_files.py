"""Notes on files of a folder that are probably captions or images, and are not read."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from zimage_train.dataset import images
from zimage_train.errors import Note

UNREAD_EXTENSIONS = (".gif", ".avif", ".heic", ".heif", ".jxl")
"""Images of these formats are not read; files that are neither images nor captions are ignored."""
CAPTION_EXTENSIONS = (".caption.txt", ".tags.txt", ".caption", ".captions", ".cap", ".tags", ".tag", ".prompt", ".txt")
"""Extensions that caption files have in other tools, the longest first where one ends like another."""
TABLE_EXTENSIONS = (".jsonl", ".csv")
"""Files that `data.N.metadata` reads."""


def note_unread_files(root: Path, files: Iterable[Path], stems: set[Path], caption_ext: str, notes: list[Note]) -> None:
    """Add to `notes` the files below `root` that look like captions or images of a kind that is not read.

    Args:
        files: all files of the folder.
        stems: the paths of its images, without extension.
        caption_ext: the extension of the captions that are read.
    """
    captions, others = [], []
    for path in files:
        if path.suffix.lower() in images.EXTENSIONS:
            continue
        # `a.tags.txt` ends like the captions, and is that of `a.png` in another tool.
        is_other = _caption_extension(path, stems, caption_ext) is not None
        (captions if path.name.lower().endswith(caption_ext.lower()) and not is_other else others).append(path)
    _note_unused_captions(root, captions, stems, caption_ext, notes)
    _note_other_captions(root, others, stems, caption_ext, notes)
    _note_tables(root, others, stems, notes)
    for path in others:
        if path.suffix.lower() in UNREAD_EXTENSIONS:
            text = f"{path}: not used; images are {', '.join(sorted(images.EXTENSIONS))}"
            notes.append(Note("unused-image", text))


def _note_unused_captions(root: Path, paths: list[Path], stems: set[Path], extension: str, notes: list[Note]) -> None:
    """Note files with the extension of captions that belong to no image, or have it in another case."""
    without_image, other_case = [], []
    for path in paths:
        if path.with_name(path.name[: -len(extension)]) not in stems:
            without_image.append(path)
        elif not path.name.endswith(extension):
            other_case.append(path)
    if without_image:
        what = "a caption without an image" if len(without_image) == 1 else "captions without an image of that name"
        notes.append(Note("unused-caption", f"{_count(root, without_image)}: {what}"))
    if other_case:
        text = f"{_count(root, other_case)}: not read, its extension is not exactly {extension}"
        notes.append(Note("unused-caption", text))


def _note_other_captions(root: Path, paths: list[Path], stems: set[Path], caption_ext: str, notes: list[Note]) -> None:
    """Note files beside images that have the extension of captions in other tools, by their extension."""
    by_extension: dict[str, list[Path]] = {}
    for path in paths:
        extension = _caption_extension(path, stems, caption_ext)
        if extension is not None:
            by_extension.setdefault(extension, []).append(path)
    for extension, found in sorted(by_extension.items()):
        text = f"{_count(root, found)}: not read, though it looks like captions"
        notes.append(Note("unread-captions", f"{text}; to use them, set caption_ext: {extension}"))


def _caption_extension(path: Path, stems: set[Path], caption_ext: str) -> str | None:
    """Return the extension with which `path` is the caption of an image in another tool, or None if it is none.

    Some tools append theirs to the whole name of the image, as in `a.png.txt`.
    """
    of_images = ("", *sorted(images.EXTENSIONS))
    for caption, image in itertools.product(CAPTION_EXTENSIONS, of_images):
        extension = image + caption
        if extension == caption_ext.lower():
            continue
        stem = path.name[: -len(extension)]
        if path.name.lower().endswith(extension) and stem and path.with_name(stem) in stems:
            return path.name[-len(extension) :]
    return None


def _note_tables(root: Path, paths: list[Path], stems: set[Path], notes: list[Note]) -> None:
    """Note tables and JSON files, which hold the captions of all images, or of the image of their name."""
    tables = [path for path in paths if path.suffix.lower() in TABLE_EXTENSIONS]
    json_files = [path for path in paths if path.suffix.lower() == ".json"]
    beside_image = [path for path in json_files if {path.with_suffix(""), _without_image(path)} & stems]
    alone = [path for path in json_files if path not in beside_image]
    row = '{"image": "a.png", "prompt": "..."}'
    for found, what, hint in (
        (tables, "a folder does not read tables of captions", "set metadata to it in place of folder"),
        (beside_image, "JSON beside images is not read", "write their captions into .txt files"),
        (alone, "JSON is not read", f"write a .jsonl with lines like {row}, and set metadata to it in place of folder"),
    ):
        if found:
            text = f"{_count(root, found)}: {what}; if captions are in there, {hint}"
            notes.append(Note("unread-captions", text))


def _without_image(path: Path) -> Path:
    """Return `path` without its extension and that of an image before it, as in `a.png.json`."""
    stem = path.with_suffix("")
    return stem.with_suffix("") if stem.suffix.lower() in images.EXTENSIONS else stem


def _count(root: Path, paths: list[Path]) -> str:
    """Return the number of files with the first of them, or the only file."""
    return str(paths[0]) if len(paths) == 1 else f"{root}: {len(paths)} files, such as {paths[0].name}"
