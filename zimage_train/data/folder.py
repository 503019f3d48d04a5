"""The data section of a config to a list of pictures, or to every problem in it at once."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.config.schema import Data
from zimage_train.data import captions, images
from zimage_train.errors import DataError, Problem, ZImageTrainError

IMAGE_COLUMNS = ("image", "file_name")
PROMPT_COLUMNS = ("prompt", "text")


@dataclass(frozen=True)
class Picture:
    """One picture of one data entry: its file, its content's digest, its upright size and its prompt."""

    path: Path
    digest: str
    width: int
    height: int
    prompt: str


@dataclass
class Scan:
    """What one data entry holds: its pictures, what is wrong with the others, and what is odd."""

    pictures: list[Picture]
    errors: list[ZImageTrainError]
    notes: list[str]


@dataclass(frozen=True)
class _Source:
    path: Path
    caption: str


def scan(entry: Data, where: str) -> Scan:
    """Find and read every picture and caption of `entry`; nothing is left out silently.

    The order is that of the relative paths, whatever the file system says.
    """
    result = Scan([], [], [])
    try:
        sources = _from_metadata(entry, result) if entry.metadata else _from_folder(entry, result)
    except DataError as error:
        result.errors.append(error)
        return result
    for source in sources:
        try:
            result.pictures.append(_read_picture(source, entry))
        except DataError as error:
            result.errors.append(error)
    if not result.pictures and not result.errors:
        place = entry.folder or entry.metadata
        extensions = ", ".join(sorted(images.EXTENSIONS))
        result.errors.append(
            DataError(Problem(f"{where}: {place}", "holds no pictures", f"put pictures there ({extensions})"))
        )
    result.notes += _notes(result.pictures, where)
    return result


def _read_picture(source: _Source, entry: Data) -> Picture:
    try:
        content = source.path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(source.path), f"cannot be read ({error.strerror})", "check the file")) from None
    width, height = images.load(source.path, content).size
    prompt = captions.compose(source.caption, entry.default_caption, entry.trigger)
    if captions.PLACEHOLDER in prompt:
        raise DataError(
            Problem(
                str(source.path), f"its caption has {captions.PLACEHOLDER}, but no trigger is set", "set data.trigger"
            )
        )
    return Picture(source.path, hashlib.sha256(content).hexdigest(), width, height, prompt)


def _from_folder(entry: Data, result: Scan) -> list[_Source]:
    root = Path(entry.folder or "")
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(Problem(str(root), what, "check data.folder (relative to where the command runs)"))
    files = sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix())
    pictures = [path for path in files if path.suffix.lower() in images.EXTENSIONS]
    by_stem: dict[Path, list[Path]] = {}
    for path in pictures:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    sources = []
    for stem, paths in by_stem.items():
        caption_file = stem.with_name(stem.name + entry.caption_ext)
        caption = ""
        if caption_file.exists():
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                problem = Problem(str(caption_file), f"belongs to several pictures ({names})", "rename all but one")
                result.errors.append(DataError(problem))
                continue
            try:
                caption = captions.read(caption_file)
            except DataError as error:
                result.errors.append(error)
        sources += [_Source(path, caption) for path in paths]
    _note_unused(files, set(by_stem), entry, result)
    return sources


def _note_unused(files: list[Path], stems: set[Path], entry: Data, result: Scan) -> None:
    for path in files:
        if path.suffix.lower() in images.EXTENSIONS:
            continue
        if path.name.lower().endswith(entry.caption_ext.lower()):
            stem = path.with_name(path.name[: -len(entry.caption_ext)])
            if stem not in stems:
                result.notes.append(f"{path}: a caption without a picture")
            elif not path.name.endswith(entry.caption_ext):
                result.notes.append(f"{path}: not read, its extension is not exactly {entry.caption_ext}")
        elif path.suffix.lower() in (".gif", ".avif", ".heic", ".heif", ".jxl"):
            result.notes.append(f"{path}: not used; pictures are {', '.join(sorted(images.EXTENSIONS))}")


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith((".", "_"))]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _from_metadata(entry: Data, result: Scan) -> list[_Source]:
    path = Path(entry.metadata or "")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(Problem(str(path), "does not exist", "check data.metadata")) from None
    except UnicodeDecodeError:
        raise DataError(Problem(str(path), "is not UTF-8", "save it as UTF-8")) from None
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read ({error.strerror})", "check data.metadata")) from None
    sources = []
    for line, row in _rows(path, text, result):
        place = f"{path}:{line}"
        image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
        prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), "")
        if not isinstance(image, str) or not isinstance(prompt, str):
            found = ", ".join(map(str, row)) or "nothing"
            problem = Problem(place, f"has no text in image (or file_name); found {found}", "add the column")
            result.errors.append(DataError(problem))
            continue
        sources.append(_Source(path.parent / image, captions.clean(prompt)))
    return sources


def _rows(path: Path, text: str, result: Scan) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield reader.line_num, row
        return
    if path.suffix.lower() != ".jsonl":
        raise DataError(Problem(str(path), "is neither .jsonl nor .csv", "convert it"))
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            result.errors.append(DataError(Problem(f"{path}:{line}", f"is not JSON ({error.msg})", "correct the line")))
            continue
        yield line, row if isinstance(row, dict) else {}


def _notes(pictures: list[Picture], where: str) -> list[str]:
    notes = []
    without = [picture for picture in pictures if not picture.prompt]
    if without:
        names = ", ".join(picture.path.name for picture in without[:3]) + (", ..." if len(without) > 3 else "")
        notes.append(
            f"{where}: {len(without)} of {len(pictures)} pictures have no caption ({names}); set default_caption"
        )
    first: dict[str, Picture] = {}
    for picture in pictures:
        other = first.setdefault(picture.digest, picture)
        if other is not picture:
            notes.append(f"{picture.path}: the same picture as {other.path}")
    return notes


def fingerprint(scans: list[list[Picture]]) -> dict[str, str]:
    """Name -> digest of content and prompt, for every picture: what a resumed run must find unchanged."""
    prints = {}
    for index, pictures in enumerate(scans):
        for picture in pictures:
            prompt = hashlib.sha256(picture.prompt.encode()).hexdigest()[:16]
            prints[f"{index}/{picture.path.name}/{picture.digest[:16]}"] = prompt
    return prints
