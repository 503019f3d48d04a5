"""The data section of a config to a list of images, or to every problem in it at once."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import captions, images, masks
from zimage_train.dataset.image_index import ImageIndex, ImageInfo, near_duplicates
from zimage_train.dataset.masks import Mask
from zimage_train.dataset.metadata import Source, is_text, read_metadata
from zimage_train.errors import DataError, Location, Note, Problem, ZImageTrainError, collect_errors
from zimage_train.io.progress import Progress

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
    notes: list[Note]
    rejected: list[tuple[Path, Problem]]
    """Files that are no image to train on, and why; `errors` has them too."""


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
        sources = read_metadata(entry, result.errors) if entry.metadata else _from_folder(entry, where, result)
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
        location = Location(key=where, source=place)
        result.errors.append(
            DataError(Problem(location, "holds no images", f"put images there ({extensions})", "no-images"))
        )
    result.notes += _caption_notes([source for source in named if not any(source.captions)], entry, where, len(named))
    result.notes += _notes(result.images)
    if entry.mask is not None and (without := [one.path.name for one in result.images if one.mask is None]):
        text = f"{where}: {len(without)} images have no mask and are trained whole ({_some(without)})"
        result.notes.append(Note("no-mask", text))
    result.notes = [replace(one, text=one.text.encode(errors="backslashreplace").decode()) for one in result.notes]
    return result


def _from_prompts(path: Path, entry: DataEntry, where: str) -> tuple[list[ImageRecord], list[Note]]:
    """An image that is yet to be drawn for each line, known by its prompt, and what is odd."""
    lines: dict[str, int] = {}
    notes = []
    for number, text in enumerate(captions.read_lines(path), 1):
        if text and text in lines:
            said = f"{path}:{number}: the same prompt as in line {lines[text]}; drawn once"
            notes.append(Note("same-prompt", said))
        elif text and not text.startswith("#"):
            lines[text] = number
    if not lines:
        location = Location(key=f"{where}.prompts", source=str(path))
        raise DataError(Problem(location, "holds no prompt", "write one a line", "no-prompts"))
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


def _has_a_name(source: Source, result: FolderScan) -> bool:
    if is_text(str(source.path)):
        return True
    result.errors.append(DataError(Problem(str(source.path), "its name is not UTF-8", "rename it", "bad-name")))
    return False


def _image(source: Source, look: ImageInfo, entry: DataEntry, where: str, mask: Mask | None) -> ImageRecord:
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
        raise DataError(Problem(str(path), what, todo, "placeholder-without-trigger"))
    return prompts


def _from_folder(entry: DataEntry, where: str, result: FolderScan) -> list[Source]:
    root = Path(entry.folder or "")
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        todo = "check the path, which is relative to where the command runs"
        raise DataError(Problem(str(root), what, todo, "missing-folder"))
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
                what = f"belongs to several images ({names})"
                problem = Problem(str(caption_file), what, "rename all but one", "ambiguous-caption")
                result.errors.append(DataError(problem))
                continue
            try:
                caption = captions.read_caption(caption_file)
            except DataError as error:
                result.errors.append(error)
        for path in paths:
            with collect_errors(result.errors):
                repeats, name = _repeats(path, root, entry)
                sources.append(Source(path, (caption or name,), repeats))
    _note_unused(files, set(by_stem), entry, result)
    _note_masks(image_paths, set(by_stem), entry, root, result)
    if entry.repeats != "by_folder" and kohya_names(image_paths, root):
        what = "its subfolders have names of kohya's layout (10_cat)"
        text = f"{root}: {what}; repeats: by_folder trains as often as they say"
        result.notes.append(Note("kohya-folders", text))
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
        raise DataError(Problem(str(path), what, todo, "no-repeats-in-name"))
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
                result.notes.append(Note("unused-caption", f"{path}: a caption without an image"))
            elif not path.name.endswith(entry.caption_ext):
                text = f"{path}: not read, its extension is not exactly {entry.caption_ext}"
                result.notes.append(Note("unused-caption", text))
        elif path.suffix.lower() in (".gif", ".avif", ".heic", ".heif", ".jxl"):
            text = f"{path}: not used; images are {', '.join(sorted(images.EXTENSIONS))}"
            result.notes.append(Note("unused-image", text))


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
            result.notes.append(Note("masks-as-images", f"{root}: {what}; {todo}, set mask to that folder"))


def _without_suffix(path: Path) -> Path:
    return path.with_name(path.stem.rpartition("_")[0] or path.stem.rpartition("-")[0])


def _walk(root: Path, entry: DataEntry, result: FolderScan) -> Iterator[Path]:
    """Every file but hidden ones; folders that are linked, hidden, begin with `_` or hold the masks are not entered."""
    own_masks = None if entry.mask in (None, masks.ALPHA) else Path(entry.mask).absolute()

    def failed(error: OSError) -> None:
        what = f"cannot be read ({error.strerror})"
        problem = Problem(str(error.filename), what, "check its permissions", "unreadable-file")
        result.errors.append(DataError(problem))

    for folder, names, files in os.walk(root, onerror=failed):
        skipped = [name for name in names if name.startswith("_") or Path(folder, name).is_symlink()]
        why = "not searched (linked, or begins with _)"
        result.notes += [Note("not-searched", f"{Path(folder, name)}: {why}") for name in sorted(skipped)]
        skipped += [name for name in names if Path(folder, name).absolute() == own_masks]
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in skipped)
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _caption_notes(without: list[Source], entry: DataEntry, where: str, total: int) -> list[Note]:
    """Images without a caption of their own, unless a default is set for them."""
    if not without or entry.default_caption:
        return []
    names = _some([source.path.name for source in without])
    used = f"so they are trained on {entry.trigger!r} alone" if entry.trigger else "so they are trained on ''"
    texts = sum(source.path.with_suffix(".txt").exists() for source in without)
    there = f"; {texts} have a .txt beside them" if texts and entry.folder and entry.caption_ext != ".txt" else ""
    what = f"{len(without)} of {total} images have no caption of their own ({names})"
    return [Note("no-caption", f"{where}: {what}, {used}{there}; write captions or set default_caption")]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _notes(images: list[ImageRecord]) -> list[Note]:
    notes: list[Note] = []
    for image in images:
        words = max(len(WORDS.findall(prompt)) for prompt in image.prompts)
        if words > MAX_WORDS:
            what = f"its caption has {words} words and signs, and the model reads 512 tokens and no further"
            notes.append(Note("long-caption", f"{image.path}: {what}"))
    first: dict[str, ImageRecord] = {}
    for image in images:
        other = first.setdefault(image.digest, image)
        if other is not image:
            notes.append(Note("same-image", f"{image.path}: the same image as {other.path}"))
    different = list(first.values())
    for earlier, later in near_duplicates([image.thumbnail for image in different]):
        text = f"{different[later].path}: nearly the same image as {different[earlier].path}"
        notes.append(Note("similar-image", text))
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
