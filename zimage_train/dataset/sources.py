"""Where the images of an entry are named: in a folder with caption files, or in a .jsonl or .csv."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.config.dataset import ALPHA, DataEntry
from zimage_train.dataset import captions, images
from zimage_train.dataset.unread_files import note_unread_files
from zimage_train.errors import DataError, Location, Note, Problem, ZImageTrainError, collect_errors
from zimage_train.io.operating_system import is_too_long

KOHYA_FOLDER = re.compile(r"(\d{1,6})_(.+)")
"""Repeats and name of a folder in the layout of kohya's scripts."""
MAX_REPEATS = 1000
MASK_FOLDER = re.compile(r"masks?", re.IGNORECASE)
MASK_NAME = re.compile(r".+[_-]masks?(label)?", re.IGNORECASE)
IMAGE_COLUMNS = ("image", "file_name", "image_path")
PROMPT_COLUMNS = ("prompt", "text", "caption")
BACKSLASH_HINT = "a backslash in JSON begins an escape: write / or two backslashes for each in a path"
SURPLUS_COLUMN = "(surplus)"
"""Key under which `csv` puts the values of a row beyond its header."""


@dataclass(frozen=True)
class Source:
    """An image that a folder or a table names, before its file is read."""

    path: Path
    captions: tuple[str, ...]
    """As they are written; empty strings where there is none."""
    repeats: int = 1
    """How often the image is seen in an epoch."""


def list_folder(entry: DataEntry, errors: list[ZImageTrainError], notes: list[Note]) -> list[Source]:
    """Return the images of `entry.folder` with their captions, and add what is wrong or odd to `errors` and `notes`.

    Raises:
        DataError: there is no such folder.
    """
    root = Path(entry.folder or "")
    if not root.is_dir():
        message = "is a file, not a folder" if root.exists() else "does not exist"
        hint = "check the path, which is relative to where the command runs"
        raise DataError(Problem(str(root), message, hint, "missing-folder"))
    files = sorted(walk_folder(root, entry, errors, notes), key=lambda path: path.relative_to(root).as_posix())
    image_paths = [path for path in files if path.suffix.lower() in images.EXTENSIONS]
    paths_by_stem: dict[Path, list[Path]] = {}
    for path in image_paths:
        paths_by_stem.setdefault(path.with_suffix(""), []).append(path)
    sources: list[Source] = []
    all_files = set(files)
    for stem, paths in paths_by_stem.items():
        caption_file = stem.with_name(stem.name + entry.caption_ext)
        caption = ""
        if caption_file in all_files:
            if len(paths) > 1:
                message = f"belongs to several images ({', '.join(path.name for path in paths)})"
                problem = Problem(str(caption_file), message, "rename all but one", "ambiguous-caption")
                errors.append(DataError(problem))
                continue
            # The image is read all the same, so that its own problems are reported too.
            with collect_errors(errors):
                caption = captions.read_caption(caption_file)
        for path in paths:
            with collect_errors(errors):
                repeats, folder_caption = _repeats_and_caption(path, root, entry)
                sources.append(Source(path, (caption or folder_caption,), repeats))
    note_unread_files(root, files, set(paths_by_stem), entry.caption_ext, notes)
    _note_images_like_masks(image_paths, set(paths_by_stem), root, notes)
    if entry.repeats != "by_folder" and kohya_names(image_paths, root):
        text = "its subfolders have names of kohya's layout (10_cat); repeats: by_folder trains as often as they say"
        notes.append(Note("kohya-folders", f"{root}: {text}"))
    return sources


def walk_folder(root: Path, entry: DataEntry, errors: list[ZImageTrainError], notes: list[Note]) -> Iterator[Path]:
    """Yield every file below `root`, except in folders that are not to be searched.

    Hidden files and folders, linked folders (which may lead in circles), folders that begin with `_`, and the folders
    of the masks and of the negative images are left out.
    """
    others = [Path(place).absolute() for place in (entry.mask, entry.negative) if place not in (None, ALPHA)]

    def report(error: OSError) -> None:
        message = f"cannot be read ({error.strerror})"
        problem = Problem(str(error.filename), message, "check its permissions", "unreadable-file")
        errors.append(DataError(problem))

    for folder, subfolders, files in os.walk(root, onerror=report):
        searched: list[str] = []
        for name in sorted(subfolders):
            path = Path(folder, name)
            if name.startswith("_") or path.is_symlink():
                notes.append(Note("not-searched", f"{path}: not searched (linked, or begins with _)"))
            elif not name.startswith(".") and path.absolute() not in others:
                searched.append(name)
        subfolders[:] = searched  # os.walk goes on with what is left in its list
        for name in files:
            if not name.startswith("."):
                yield Path(folder, name)


def _repeats_and_caption(path: Path, root: Path, entry: DataEntry) -> tuple[int, str]:
    """Return how often an image is seen in an epoch, and the caption that its folder gives, or "".

    Raises:
        DataError: repeats are by folder, and no folder of the image gives them.
    """
    if entry.repeats != "by_folder":
        return entry.repeats, ""
    match = _kohya_folder(path, root)
    if match is None or not 1 <= int(match[1]) <= MAX_REPEATS:
        message = "is in no folder whose name says how often it is trained"
        hint = f"put it into a folder like 10_cat (1 to {MAX_REPEATS}), or set repeats to a number"
        raise DataError(Problem(str(path), message, hint, "no-repeats-in-name"))
    return int(match[1]), match[2].strip()


def kohya_names(paths: list[Path], root: Path) -> list[str]:
    """Return the name of each image's folder in kohya's layout (`cat` for `10_cat`), or [] if an image has none."""
    names: list[str] = []
    for path in paths:
        match = _kohya_folder(path, root)
        if match is None:
            return []
        names.append(match[2].strip())
    return names


def _kohya_folder(path: Path, root: Path) -> re.Match[str] | None:
    """Return the match of the innermost folder of kohya's layout that holds `path`."""
    for name in reversed(path.relative_to(root).parent.parts):
        match = KOHYA_FOLDER.fullmatch(name)
        if match is not None:
            return match
    return None


def _note_images_like_masks(paths: list[Path], stems: set[Path], root: Path, notes: list[Note]) -> None:
    """Note images that are probably the masks of others, and would be trained as images."""
    beside_image = [path for path in paths if MASK_NAME.fullmatch(path.stem) and _stem_of_masked(path) in stems]
    in_mask_folder: list[Path] = []
    for path in paths:
        if MASK_FOLDER.fullmatch(path.relative_to(root).parts[0]) and path not in beside_image:
            in_mask_folder.append(path)
    for group, hint in (
        (beside_image, "put them into a folder of their own under the images' names"),
        (in_mask_folder, "if they are"),
    ):
        if group:
            names = first_names(group)
            text = f"{len(group)} images look like masks and are trained as images ({names})"
            notes.append(Note("masks-as-images", f"{root}: {text}; {hint}, set mask to that folder"))


def _stem_of_masked(path: Path) -> Path:
    """Return the path, without extension, of the image whose mask `path` would be: `cat` for `cat_mask.png`."""
    return path.with_name(path.stem.rpartition("_")[0] or path.stem.rpartition("-")[0])


def read_metadata(entry: DataEntry, errors: list[ZImageTrainError]) -> list[Source]:
    """Return the images that the file `entry.metadata` lists, and add to `errors` what is wrong with single lines.

    Raises:
        DataError: the file cannot be read, has another format, or has no prompts.
    """
    path = Path(entry.metadata or "")
    text = _read_text(path)
    sources: list[Source] = []
    columns: set[str] = set()
    for line, row in _rows(path, text, errors):
        columns |= row.keys()
        with collect_errors(errors):
            sources.append(_source_of(row, path, line, int(entry.repeats)))
    if sources and not columns & set(PROMPT_COLUMNS) and not entry.default_caption:
        message = f"has no column {', '.join(PROMPT_COLUMNS)}; its columns are {', '.join(sorted(columns))}"
        raise DataError(Problem(str(path), message, "add the prompts, or set default_caption", "missing-column"))
    return sources


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(Problem(str(path), "does not exist", "check data.metadata", "missing-file")) from None
    except UnicodeDecodeError:
        raise DataError(Problem(str(path), "is not UTF-8", "save it as UTF-8", "not-text")) from None
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), message, "check data.metadata", "unreadable-file")) from None


def _rows(path: Path, text: str, errors: list[ZImageTrainError]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of `text`, and add rows that cannot be parsed to `errors`.

    Raises:
        DataError: the file is neither .jsonl nor .csv, or its columns are not separated by commas.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(path, text, errors)
    elif suffix == ".jsonl":
        yield from _jsonl_rows(path, text, errors)
    else:
        raise DataError(Problem(str(path), "is neither .jsonl nor .csv", "convert it", "bad-table"))


def _csv_rows(path: Path, text: str, errors: list[ZImageTrainError]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS_COLUMN)
    try:
        first_column = (reader.fieldnames or [""])[0]
        # A header that does not split at commas is a single column, with the true separator inside its name.
        separator = next((char for char in ";\t|" if char in first_column), None)
        if separator is not None:
            message = f"is separated by {separator!r}"
            raise DataError(Problem(str(path), message, "separate its columns by commas", "bad-table"))
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        location = Location(str(path), reader.line_num + 1)
        errors.append(DataError(Problem(location, f"is not CSV ({error})", "correct the line", "bad-row")))


def _jsonl_rows(path: Path, text: str, errors: list[ZImageTrainError]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines, which cuts at U+2028 inside a prompt too
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            location = Location(str(path), line)
            hint = BACKSLASH_HINT if "escape" in str(error) else "correct the line"
            errors.append(DataError(Problem(location, f"is not JSON ({error})", hint, "bad-row")))
            continue
        yield line, row if isinstance(row, dict) else {}


def _source_of(row: dict[str, Any], path: Path, line: int, repeats: int) -> Source:
    """Return the image that `row`, on `line` of the file `path`, names.

    Raises:
        DataError: the row has too many columns, no image, or a prompt that is no text.
    """
    location = Location(str(path), line)
    if SURPLUS_COLUMN in row:
        num_columns = len(row) - 1
        message = f"has {num_columns + len(row[SURPLUS_COLUMN])} columns where the header has {num_columns}"
        raise DataError(Problem(location, message, 'put texts that hold a comma in "quotes"', "bad-row"))
    image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
    prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), "")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not isinstance(image, str):
        raise _no_text(location, row, "image", IMAGE_COLUMNS)
    if not all(isinstance(text, str) for text in prompts):
        raise _no_text(location, row, "prompt", PROMPT_COLUMNS)
    if not is_text(image + "".join(prompts)):
        message = "holds a character that no text has (NUL or half a surrogate pair)"
        raise DataError(Problem(location, message, "correct the line", "not-text"))
    if is_too_long(image):
        what = f"names the image {image[:40]!r}..., which is too long for a file"
        raise DataError(Problem(location, what, "give the path of the file", "bad-row"))
    if any(char in image for char in "\n\r\t\b\f"):
        message = f"names the image {image!r}, with the control characters that backslashes in JSON stand for"
        raise DataError(Problem(location, message, BACKSLASH_HINT, "bad-row"))
    return Source(path.parent / image, tuple(captions.clean_text(text) for text in prompts), repeats)


def _no_text(location: Location, row: dict[str, Any], name: str, columns: tuple[str, ...]) -> DataError:
    """Return the error for a row in which none of `columns` holds text for `name`."""
    message = f"has no text in {' or '.join(columns)}; its columns are {', '.join(row) or 'nothing'}"
    return DataError(Problem(location, message, f"give {name} as text", "bad-row"))


def is_text(text: str) -> bool:
    """Return whether `text` can be a file name and be written as UTF-8: no NUL, no half of a surrogate pair."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text)


def first_names(paths: list[Path]) -> str:
    """Return the names of the first files of `paths`, for a message."""
    return ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
