"""The data section of a config to a list of images, or to every problem in it at once."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import captions, images, masks
from zimage_train.dataset.image_index import ImageIndex, ImageInfo, near_duplicates
from zimage_train.dataset.masks import Mask
from zimage_train.errors import DataError, Problem, ZImageTrainError, collect_errors
from zimage_train.io.progress import Progress

IMAGE_COLUMNS = ("image", "file_name")
PROMPT_COLUMNS = ("prompt", "text", "caption")
SURPLUS_COLUMN = "(surplus)"
"""The column of what a row of a CSV has beyond its header."""
MAX_WORDS = 480
"""Words and signs; a longer prompt has certainly more than the 512 tokens that the model reads, templates included."""


UNBOUNDED_SIDE = 65_536
"""The side of an image that any resolution can be drawn at, px."""

WORDS = re.compile(r"\w+|[^\w\s]")
KOHYA_FOLDER = re.compile(r"(\d{1,6})_(.+)")
MAX_REPEATS = 1000
MASK_FOLDER = re.compile(r"masks?", re.IGNORECASE)
MASK_NAME = re.compile(r".+[_-]masks?(label)?", re.IGNORECASE)


@dataclass(frozen=True)
class ImageRecord:
    """One image of one data entry: its file, its content's digest, its upright size and its prompts."""

    path: Path
    digest: str
    width: int
    height: int
    prompts: tuple[str, ...]
    """What it may be trained with; see `captions.draw`."""
    thumbnail: str = ""
    repeats: int = 1
    mask: Mask | None = None
    raw_captions: tuple[str, ...] = ()
    """Its captions as they are written, without trigger and default; empty: it has none."""

    @property
    def longest_prompt(self) -> str:
        """Of its prompts."""
        return max(self.prompts, key=len)


@dataclass
class FolderScan:
    """What one data entry holds: its images, what is wrong with the others, and what is odd."""

    images: list[ImageRecord]
    errors: list[ZImageTrainError]
    notes: list[str]
    rejected: list[tuple[Path, Problem]]
    """Files that are no image to train on, and why; `errors` has them too."""


@dataclass(frozen=True)
class _Source:
    path: Path
    captions: tuple[str, ...]
    repeats: int = 1


def scan_entry(
    entry: DataEntry, where: str, looks: ImageIndex | None = None, tick: Progress = lambda what, done, total: None
) -> FolderScan:
    """Find and look at every image and caption of `entry`; nothing is left out silently.

    The order is that of the relative paths, whatever the file system says.
    """
    result = FolderScan([], [], [], [])
    if entry.prompts is not None:
        with collect_errors(result.errors):
            result.images, result.notes = _from_prompts(Path(entry.prompts), entry, where)
        return result
    try:
        sources = _from_metadata(entry, result) if entry.metadata else _from_folder(entry, where, result)
    except DataError as error:
        result.errors.append(error)
        return result
    named = [source for source in sources if _has_a_name(source, result)]
    looks = looks or ImageIndex()
    found = looks.lookup([source.path for source in named], tick)
    masked = masks.find_masks([source.path for source in named], entry, where, result.errors, looks, tick)
    for source, look in zip(named, found, strict=True):
        if isinstance(look, ImageInfo):
            with collect_errors(result.errors):
                mask = masks.require_fit(masked.get(source.path), source.path, look)
                result.images.append(_image(source, look, entry, where, mask))
        else:
            result.errors.append(look)
            result.rejected += [(source.path, problem) for problem in look.problems]
    if not result.images and not result.errors:
        place = entry.folder or entry.metadata
        extensions = ", ".join(sorted(images.EXTENSIONS))
        result.errors.append(
            DataError(Problem(f"{where}: {place}", "holds no images", f"put images there ({extensions})"))
        )
    result.notes += _caption_notes([source for source in named if not any(source.captions)], entry, where, len(named))
    result.notes += _notes(result.images)
    if entry.mask is not None and (without := [one.path.name for one in result.images if one.mask is None]):
        result.notes.append(f"{where}: {len(without)} images have no mask and are trained whole ({_some(without)})")
    result.notes = [note.encode(errors="backslashreplace").decode() for note in result.notes]
    return result


def _from_prompts(path: Path, entry: DataEntry, where: str) -> tuple[list[ImageRecord], list[str]]:
    """An image that is yet to be drawn for each line, known by its prompt, and what is odd."""
    lines: dict[str, int] = {}
    notes = []
    for number, text in enumerate(captions.read_lines(path), 1):
        if text and text in lines:
            notes.append(f"{path}:{number}: the same prompt as in line {lines[text]}; drawn once")
        elif text and not text.startswith("#"):
            lines[text] = number
    if not lines:
        raise DataError(Problem(f"{where}.prompts: {path}", "holds no prompt", "write one a line"))
    found = [
        ImageRecord(
            path=Path(f"{path}:{number}"),
            digest=hashlib.sha256(f"prompt {text}".encode()).hexdigest(),
            width=UNBOUNDED_SIDE,
            height=UNBOUNDED_SIDE,
            prompts=_prompts_of((text,), Path(f"{path}:{number}"), entry, where),
            repeats=int(entry.repeats),
            raw_captions=(text,),
        )
        for text, number in lines.items()
    ]
    return found, notes


def _has_a_name(source: _Source, result: FolderScan) -> bool:
    if _is_text(str(source.path)):
        return True
    result.errors.append(DataError(Problem(str(source.path), "its name is not UTF-8", "rename it")))
    return False


def _image(source: _Source, look: ImageInfo, entry: DataEntry, where: str, mask: Mask | None) -> ImageRecord:
    prompts = _prompts_of(source.captions, source.path, entry, where)
    own = tuple(text for text in source.captions if text)
    return ImageRecord(
        source.path, look.digest, look.width, look.height, prompts, look.thumbnail, source.repeats, mask, own
    )


def _prompts_of(texts: tuple[str, ...], path: Path, entry: DataEntry, where: str) -> tuple[str, ...]:
    prompts = captions.prompts_of(texts, entry)
    if any(captions.PLACEHOLDER in prompt for prompt in prompts):
        what = f"its caption has {captions.PLACEHOLDER}, but no trigger is set"
        todo = "take it out: these images show the class" if entry.regularization else f"set {where}.trigger"
        raise DataError(Problem(str(path), what, todo))
    return prompts


def _from_folder(entry: DataEntry, where: str, result: FolderScan) -> list[_Source]:
    root = Path(entry.folder or "")
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(Problem(str(root), what, "check the path, which is relative to where the command runs"))
    files = sorted(_walk(root, entry, result), key=lambda path: path.relative_to(root).as_posix())
    image_paths = [path for path in files if path.suffix.lower() in images.EXTENSIONS]
    there = set(files)
    by_stem: dict[Path, list[Path]] = {}
    for path in image_paths:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    sources = []
    for stem, paths in by_stem.items():
        caption_file = stem.with_name(stem.name + entry.caption_ext)
        caption = ""
        if caption_file in there:
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                problem = Problem(str(caption_file), f"belongs to several images ({names})", "rename all but one")
                result.errors.append(DataError(problem))
                continue
            try:
                caption = captions.read_caption(caption_file)
            except DataError as error:
                result.errors.append(error)
        for path in paths:
            with collect_errors(result.errors):
                repeats, name = _repeats(path, root, entry)
                sources.append(_Source(path, (caption or name,), repeats))
    _note_unused(files, set(by_stem), entry, result)
    _note_masks(image_paths, set(by_stem), entry, root, result)
    if entry.repeats != "by_folder" and kohya_names(image_paths, root):
        what = "its subfolders have names of kohya's layout (10_cat)"
        result.notes.append(f"{root}: {what}; repeats: by_folder trains as often as they say")
    return sources


def _repeats(path: Path, root: Path, entry: DataEntry) -> tuple[int, str]:
    """How often the image is seen in an epoch, and its caption if it has none of its own.

    Raises:
        DataError: the folder's name does not say so, and it should.
    """
    if entry.repeats != "by_folder":
        return entry.repeats, ""
    match = _kohya(path, root)
    if match is None or not 1 <= int(match[1]) <= MAX_REPEATS:
        what = "is in no folder whose name says how often it is trained"
        todo = f"put it into one like 10_cat (1 to {MAX_REPEATS}), or set repeats to a number"
        raise DataError(Problem(str(path), what, todo))
    return int(match[1]), match[2].strip()


def kohya_names(images: list[Path], root: Path) -> list[str]:
    """What the folders of kohya's layout call each image (`cat` of `10_cat`); empty unless all are in such ones."""
    found = [_kohya(path, root) for path in images]
    return [match[2].strip() for match in found if match] if all(found) else []


def _kohya(path: Path, root: Path) -> re.Match[str] | None:
    """The name of the innermost folder of kohya's layout that holds `path`."""
    names = reversed(path.relative_to(root).parent.parts)
    return next((match for name in names if (match := KOHYA_FOLDER.fullmatch(name))), None)


def _note_unused(files: list[Path], stems: set[Path], entry: DataEntry, result: FolderScan) -> None:
    for path in files:
        if path.suffix.lower() in images.EXTENSIONS:
            continue
        if path.name.lower().endswith(entry.caption_ext.lower()):
            stem = path.with_name(path.name[: -len(entry.caption_ext)])
            if stem not in stems:
                result.notes.append(f"{path}: a caption without an image")
            elif not path.name.endswith(entry.caption_ext):
                result.notes.append(f"{path}: not read, its extension is not exactly {entry.caption_ext}")
        elif path.suffix.lower() in (".gif", ".avif", ".heic", ".heif", ".jxl"):
            result.notes.append(f"{path}: not used; images are {', '.join(sorted(images.EXTENSIONS))}")


def _note_masks(images: list[Path], stems: set[Path], entry: DataEntry, root: Path, result: FolderScan) -> None:
    """Say it if images look like the masks of others, which nobody wants to train on."""
    aside = [path for path in images if MASK_NAME.fullmatch(path.stem) and _without_suffix(path) in stems]
    inside = [path for path in images if MASK_FOLDER.fullmatch(path.relative_to(root).parts[0])]
    for found, todo in (
        (aside, "put them into a folder of their own under the images' names"),
        ([path for path in inside if path not in aside], "if they are"),
    ):
        if found:
            what = f"{len(found)} images look like masks and are trained as images ({_some([p.name for p in found])})"
            result.notes.append(f"{root}: {what}; {todo}, set mask to that folder")


def _without_suffix(path: Path) -> Path:
    return path.with_name(path.stem.rpartition("_")[0] or path.stem.rpartition("-")[0])


def _walk(root: Path, entry: DataEntry, result: FolderScan) -> Iterator[Path]:
    """Every file but hidden ones; folders that are linked, hidden, begin with `_` or hold the masks are not entered."""
    own_masks = None if entry.mask in (None, masks.ALPHA) else Path(entry.mask).absolute()

    def failed(error: OSError) -> None:
        problem = Problem(str(error.filename), f"cannot be read ({error.strerror})", "check its permissions")
        result.errors.append(DataError(problem))

    for folder, names, files in os.walk(root, onerror=failed):
        skipped = [name for name in names if name.startswith("_") or Path(folder, name).is_symlink()]
        result.notes += [f"{Path(folder, name)}: not searched (linked, or begins with _)" for name in sorted(skipped)]
        skipped += [name for name in names if Path(folder, name).absolute() == own_masks]
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in skipped)
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _from_metadata(entry: DataEntry, result: FolderScan) -> list[_Source]:
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
    columns: set[str] = set()
    for line, row in _rows(path, text, result):
        place = f"{path}:{line}"
        columns |= row.keys()
        if SURPLUS_COLUMN in row:
            what = f"has {len(row) - 1 + len(row[SURPLUS_COLUMN])} columns where the header has {len(row) - 1}"
            result.errors.append(DataError(Problem(place, what, 'put texts that hold a comma in "quotes"')))
            continue
        image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
        prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), "")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not isinstance(image, str) or not all(isinstance(one, str) for one in prompts):
            name, wanted = ("prompt", PROMPT_COLUMNS) if isinstance(image, str) else ("image", IMAGE_COLUMNS)
            what = f"has no text in {' or '.join(wanted)}; its columns are {', '.join(row) or 'nothing'}"
            result.errors.append(DataError(Problem(place, what, f"give {name} as text")))
        elif not _is_text(image + "".join(prompts)):
            what = "holds a character that no text has (NUL or half a surrogate pair)"
            result.errors.append(DataError(Problem(place, what, "correct the line")))
        else:
            texts = tuple(captions.clean_text(one) for one in prompts)
            sources.append(_Source(path.parent / image, texts, int(entry.repeats)))
    if sources and not columns & set(PROMPT_COLUMNS) and not entry.default_caption:
        what = f"has no column {', '.join(PROMPT_COLUMNS)}; its columns are {', '.join(sorted(columns))}"
        raise DataError(Problem(str(path), what, "add the prompts, or set default_caption"))
    return sources


def _is_text(text: str) -> bool:
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def _rows(path: Path, text: str, result: FolderScan) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS_COLUMN)
        try:
            header = (reader.fieldnames or [""])[0]
            if other := next((sign for sign in ";\t|" if sign in header), None):
                raise DataError(Problem(str(path), f"is separated by {other!r}", "separate its columns by commas"))
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            place = f"{path}:{reader.line_num + 1}"
            result.errors.append(DataError(Problem(place, f"is not CSV ({error})", "correct the line")))
        return
    if path.suffix.lower() != ".jsonl":
        raise DataError(Problem(str(path), "is neither .jsonl nor .csv", "convert it"))
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines, which cuts at U+2028 inside a prompt too
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            result.errors.append(DataError(Problem(f"{path}:{line}", f"is not JSON ({error})", "correct the line")))
            continue
        yield line, row if isinstance(row, dict) else {}


def _caption_notes(without: list[_Source], entry: DataEntry, where: str, total: int) -> list[str]:
    """Pictures without a caption of their own, unless a default is set for them."""
    if not without or entry.default_caption:
        return []
    names = _some([source.path.name for source in without])
    used = f"so they are trained on {entry.trigger!r} alone" if entry.trigger else "so they are trained on ''"
    texts = sum(source.path.with_suffix(".txt").exists() for source in without)
    there = f"; {texts} have a .txt beside them" if texts and entry.folder and entry.caption_ext != ".txt" else ""
    return [
        f"{where}: {len(without)} of {total} images have no caption of their own ({names}), {used}{there}; "
        "write captions or set default_caption"
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _notes(images: list[ImageRecord]) -> list[str]:
    notes = []
    for image in images:
        words = max(len(WORDS.findall(prompt)) for prompt in image.prompts)
        if words > MAX_WORDS:
            what = f"its caption has {words} words and signs, and the model reads 512 tokens and no further"
            notes.append(f"{image.path}: {what}")
    first: dict[str, ImageRecord] = {}
    for image in images:
        other = first.setdefault(image.digest, image)
        if other is not image:
            notes.append(f"{image.path}: the same image as {other.path}")
    different = list(first.values())
    for earlier, later in near_duplicates([image.thumbnail for image in different]):
        notes.append(f"{different[later].path}: nearly the same image as {different[earlier].path}")
    return notes


def dataset_fingerprint(scans: list[list[ImageRecord]]) -> dict[str, str]:
    """Name -> digest of content, prompts, mask and repeats: what a resumed run must find unchanged."""
    prints: dict[str, str] = {}
    for index, records in enumerate(scans):
        for image in records:
            name = f"{index}/{image.path.name}/{image.digest[:16]}"
            while name in prints:  # the same image in two subfolders
                name += "'"
            repeats = [str(image.repeats)] if image.repeats > 1 else []
            parts = [*image.prompts, *([image.mask.digest] if image.mask else []), *repeats]
            prints[name] = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return prints
