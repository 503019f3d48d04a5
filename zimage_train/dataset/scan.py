"""Reading of an entry of `data` into image records, with all of its problems collected."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train.config import triggers
from zimage_train.config.dataset import DataEntry
from zimage_train.config.prompt_flags import flag_in, other_form_of
from zimage_train.dataset import captions, images, masks, pairs
from zimage_train.dataset.images import ImageIndex, ImageInfo, near_duplicates
from zimage_train.dataset.masks import Mask
from zimage_train.dataset.sources import Source, first_names, is_text, list_folder, read_metadata
from zimage_train.errors import DataError, Location, Note, Problem, ZImageTrainError, collect_errors
from zimage_train.io.progress import Progress, no_progress

MAX_WORDS = 480
"""Words and punctuation marks. A longer prompt certainly has more than the 512 tokens that the model reads, which
include those of the chat template."""
UNBOUNDED_SIDE = 65_536
"""Width and height, px, of an image that is yet to be generated: larger than any resolution."""
WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class ImageRecord:
    """An image of a data entry."""

    path: Path
    """The file; `FILE:LINE` of the prompt if the image is yet to be generated."""
    digest: str
    """SHA-256 of the file, or of the prompt if the image is yet to be generated."""
    width: int
    height: int
    """Upright size, px."""
    prompts: tuple[str, ...]
    """The prompts that it may be trained with; see `captions.sample_prompt`."""
    thumbnail: str = ""
    """See `ImageInfo.thumbnail`."""
    repeats: int = 1
    """How often it is seen in an epoch."""
    mask: Mask | None = None
    raw_captions: tuple[str, ...] = ()
    """Its captions as they are written, without trigger and default; empty if it has none."""
    negative: "ImageRecord | None" = None
    """The other image of a pair, of the same size."""

    @property
    def longest_prompt(self) -> str:
        """The longest of `prompts` by characters, which stands for the most tokens and so for the most memory."""
        return max(self.prompts, key=len)


@dataclass
class FolderScan:
    """The content of a data entry: its images, and the errors and notes on them."""

    images: list[ImageRecord]
    errors: list[ZImageTrainError]
    notes: list[Note]
    rejected: list[tuple[Path, Problem]]
    """Files that cannot be used as images, and why; `errors` has these problems too."""


def scan_entry(
    entry: DataEntry,
    where: str,
    image_index: ImageIndex | None = None,
    progress: Progress = no_progress,
) -> FolderScan:
    """Read every image and caption of `entry`, and report all that is wrong or odd; nothing is left out silently.

    Images of a folder come in the order of their relative paths, which is the same on every file system.

    Args:
        entry: an entry of `data`.
        where: its key, such as `data.0`.
        image_index: remembers images of earlier scans; None: all are decoded.
        progress: called for each image.
    """
    result = FolderScan([], [], [], [])
    if entry.prompts is not None:
        with collect_errors(result.errors):
            result.images = _records_of_prompts(Path(entry.prompts), entry, where, result.notes)
        return result
    try:
        if entry.metadata is not None:
            sources = read_metadata(entry, result.errors)
        else:
            sources = list_folder(entry, result.errors, result.notes)
    except DataError as error:
        result.errors.append(error)
        return result
    sources = _with_valid_names(sources, result)
    if entry.metadata is not None:
        _note_images_elsewhere(sources, Path(entry.metadata), result)
    _read_images(sources, entry, where, image_index or ImageIndex(), progress, result)
    if not result.images and not result.errors:
        location = Location(key=where, source=entry.folder or entry.metadata)
        hint = f"put images there ({', '.join(sorted(images.EXTENSIONS))})"
        result.errors.append(DataError(Problem(location, "holds no images", hint, "no-images")))
    _note_missing_captions(sources, entry, where, result)
    _note_trigger_in_other_case(entry, where, result)
    _note_long_captions(result)
    _note_duplicates(result)
    _note_missing_masks(entry, where, result)
    # A file name that is not UTF-8 reaches Python with surrogates, which a terminal cannot print.
    result.notes = [replace(note, text=note.text.encode(errors="backslashreplace").decode()) for note in result.notes]
    return result


def _note_images_elsewhere(sources: list[Source], metadata: Path, result: FolderScan) -> None:
    """Note images that a metadata file names outside of its folder, which one from the internet has no reason to."""
    folder = metadata.parent.resolve()
    elsewhere = [source.path for source in sources if not source.path.resolve().is_relative_to(folder)]
    if elsewhere:
        text = f"{metadata}: names {len(elsewhere)} images outside of its folder ({elsewhere[0]})"
        result.notes.append(Note("images-elsewhere", text))


def _records_of_prompts(path: Path, entry: DataEntry, where: str, notes: list[Note]) -> list[ImageRecord]:
    """Return a record for each line of `path`: an image that is yet to be generated, identified by its prompt."""
    lines: dict[str, int] = {}
    problems: list[Problem] = []
    form = other_form_of(path)
    if form is not None:
        what = f"is a .{form}, whose lines are no prompts"
        raise DataError(Problem(str(path), what, "write a prompt per line into a .txt", "no-prompts"))
    for number, text in enumerate(captions.read_lines(path), 1):
        if not text or text.startswith("#"):
            continue
        flag = flag_in(text)
        if flag is not None:
            what = f"has {flag.text}, which would be words of the prompt"
            hint = f"take it out: sizes come from {where}.resolution, steps and guidance from the method"
            problems.append(Problem(Location(str(path), number), what, hint, "flag-in-prompt"))
        if text in lines:
            note = f"{path}:{number}: the same prompt as in line {lines[text]}; drawn once"
            notes.append(Note("same-prompt", note))
        else:
            lines[text] = number
    if problems:
        raise DataError(*problems)
    if not lines:
        location = Location(key=f"{where}.prompts", source=str(path))
        raise DataError(Problem(location, "holds no prompt", "write a prompt per line", "no-prompts"))
    records: list[ImageRecord] = []
    for text, number in lines.items():
        place = Path(f"{path}:{number}")
        records.append(
            ImageRecord(
                path=place,
                digest=hashlib.sha256(f"prompt {text}".encode()).hexdigest(),
                width=UNBOUNDED_SIDE,
                height=UNBOUNDED_SIDE,
                prompts=_prompts_of((text,), place, entry, where),
                repeats=int(entry.repeats),
                raw_captions=(text,),
            )
        )
    return records


def _prompts_of(texts: tuple[str, ...], path: Path, entry: DataEntry, where: str) -> tuple[str, ...]:
    """Return the prompts of the image `path` with the captions `texts`.

    Raises:
        DataError: a placeholder would stay in a prompt, since there is no trigger.
    """
    prompts = captions.prompts_of(texts, entry)
    placeholder = next(filter(None, map(triggers.placeholder_in, prompts)), None)
    if placeholder is not None:
        message = f"its caption has {placeholder}, but no trigger is set"
        hint = "take it out: these images show the class" if entry.regularization else f"set {where}.trigger"
        raise DataError(Problem(str(path), message, hint, "placeholder-without-trigger"))
    return prompts


def _with_valid_names(sources: list[Source], result: FolderScan) -> list[Source]:
    """Return the sources whose path is valid text, and add an error to `result` for each of the others."""
    valid: list[Source] = []
    for source in sources:
        if is_text(str(source.path)):
            valid.append(source)
        else:
            problem = Problem(str(source.path), "its name is not UTF-8", "rename it", "bad-name")
            result.errors.append(DataError(problem))
    return valid


def _read_images(
    sources: list[Source],
    entry: DataEntry,
    where: str,
    image_index: ImageIndex,
    progress: Progress,
    result: FolderScan,
) -> None:
    """Add the image of each source to `result`, or the reason why it cannot be used."""
    paths = [source.path for source in sources]
    infos = image_index.lookup(paths, progress)
    masks_by_image: dict[Path, Mask] = {}
    if entry.mask is not None:
        masks_by_image = masks.find_masks(paths, entry, entry.mask, where, result.errors, image_index, progress)
    partners: dict[Path, pairs.Partner] = {}
    if entry.negative is not None and entry.folder is not None:
        folders = (Path(entry.folder), Path(entry.negative))
        partners = pairs.find_partners(paths, *folders, where, result.errors, image_index, progress)
    for source, info in zip(sources, infos, strict=True):
        if not isinstance(info, ImageInfo):
            result.errors.append(info)
            result.rejected += [(source.path, problem) for problem in info.problems]
            continue
        with collect_errors(result.errors):
            mask = masks_by_image.get(source.path)
            if mask is not None:
                masks.require_fit(mask, source.path, info)
            record = ImageRecord(
                path=source.path,
                digest=info.digest,
                width=info.width,
                height=info.height,
                prompts=_prompts_of(source.captions, source.path, entry, where),
                thumbnail=info.thumbnail,
                repeats=source.repeats,
                mask=mask,
                raw_captions=tuple(text for text in source.captions if text),
            )
            partner = partners.get(source.path)
            if partner is not None:
                pairs.require_equal_size(partner, source.path, info)
                other = replace(record, path=partner.path, digest=partner.info.digest, mask=None)
                record = replace(record, negative=other)
            result.images.append(record)


def _note_missing_captions(sources: list[Source], entry: DataEntry, where: str, result: FolderScan) -> None:
    """Note images without a caption, unless `entry` has a default for them."""
    uncaptioned = [source.path for source in sources if not any(source.captions)]
    if not uncaptioned or entry.default_caption:
        return
    text = f"{len(uncaptioned)} of {len(sources)} images have no caption of their own ({first_names(uncaptioned)})"
    text += f", so they are trained on {entry.trigger!r} alone" if entry.trigger else ", so they are trained on ''"
    if entry.metadata:
        num_texts = sum(path.with_suffix(".txt").exists() for path in uncaptioned)
        if num_texts:
            text += f"; {num_texts} have a .txt beside them, which only an entry with folder reads"
    result.notes.append(Note("no-caption", f"{where}: {text}; write captions or set default_caption"))


def _note_trigger_in_other_case(entry: DataEntry, where: str, result: FolderScan) -> None:
    """Note captions whose text is changed because they write the trigger in another case."""
    if entry.trigger is None:
        return
    found: dict[str, str] = {}  # name of the image -> the spelling in its caption
    for image in result.images:
        spellings = [triggers.other_spelling(text, entry.trigger) for text in image.raw_captions]
        spelling = next(filter(None, spellings), None)
        if spelling is not None:
            found[image.path.name] = spelling
    if found:
        name, spelling = next(iter(found.items()))
        text = f"{len(found)} of {len(result.images)} captions write the trigger in another case ({spelling!r}: {name})"
        result.notes.append(Note("trigger-case", f"{where}: {text}, and are trained with {entry.trigger!r}"))


def _note_long_captions(result: FolderScan) -> None:
    """Note captions of certainly more than 512 tokens, counted in words so that no tokenizer has to be loaded."""
    for image in result.images:
        num_words = max(len(WORDS.findall(prompt)) for prompt in image.prompts)
        if num_words > MAX_WORDS:
            text = f"its caption has {num_words} words and signs, and the model reads only 512 tokens"
            result.notes.append(Note("long-caption", f"{image.path}: {text}"))


def _note_duplicates(result: FolderScan) -> None:
    """Note images that are equal or nearly equal, and so are trained more often than others."""
    first_by_digest: dict[str, ImageRecord] = {}
    for image in result.images:
        first = first_by_digest.setdefault(image.digest, image)
        if first is not image:
            result.notes.append(Note("same-image", f"{image.path}: the same image as {first.path}"))
    different = list(first_by_digest.values())
    for earlier, later in near_duplicates([image.thumbnail for image in different]):
        text = f"{different[later].path}: nearly the same image as {different[earlier].path}"
        result.notes.append(Note("similar-image", text))


def _note_missing_masks(entry: DataEntry, where: str, result: FolderScan) -> None:
    unmasked = [image.path for image in result.images if image.mask is None]
    if entry.mask is not None and unmasked:
        text = f"{len(unmasked)} images have no mask and are trained whole ({first_names(unmasked)})"
        result.notes.append(Note("no-mask", f"{where}: {text}"))


def dataset_fingerprint(scans: list[list[ImageRecord]]) -> dict[str, str]:
    """Return image -> digest of its prompts, mask and repeats, for the images of each entry.

    The key holds entry, file name and digest of the image. A run with another fingerprint is not resumed.
    """
    fingerprint: dict[str, str] = {}
    for index, records in enumerate(scans):
        for image in records:
            key = f"{index}/{image.path.name}/{image.digest[:16]}"
            while key in fingerprint:  # the same image in two subfolders
                key += "'"
            parts = list(image.prompts)
            if image.mask is not None:
                parts.append(image.mask.digest)
            if image.negative is not None:
                parts.append(image.negative.digest)
            if image.repeats > 1:
                parts.append(str(image.repeats))
            fingerprint[key] = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return fingerprint
