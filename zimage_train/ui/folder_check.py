"""Problems of a folder of images with their fixes, and images that are nearly equal."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zimage_train.dataset import quarantine
from zimage_train.dataset.images import INDEX_NAME, ImageIndex, near_duplicates
from zimage_train.dataset.scan import FolderScan, ImageRecord, scan_entry
from zimage_train.errors import Problem
from zimage_train.io import atomic
from zimage_train.io.operating_system import user_cache_folder
from zimage_train.ui.image_folder import CAPTION_EXT, FolderImage, ImageFolder

Fix = Literal["move", "write", "spell", "trigger"]
"""Move the images away; write a caption for all that have none; spell the trigger alike; give a trigger."""
NOTE_FIXES: dict[str, Fix] = {"no-caption": "write", "trigger-case": "spell"}
DUPLICATE_NOTES = ("same-image", "similar-image")
MOVED_BY_HAND = Problem("", "was moved away on the page", "move it back to train on it", "moved-away")


@dataclass(frozen=True)
class FolderProblem:
    """A problem of the folder, or of some of its files."""

    text: str
    is_error: bool
    """Whether a training would refuse to start."""
    fix: Fix | None = None
    files: tuple[Path, ...] = ()
    """The images that the fix moves, or that it is about."""
    problem: Problem = MOVED_BY_HAND


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are equal or nearly equal."""

    earlier: Path
    later: Path
    is_equal: bool


@dataclass
class FolderCheck:
    """A check of every image of a folder; `run` takes a while and belongs into a thread.

    Args:
        index_file: remembers the decoded images; None for the one that trainings use too.
    """

    folder: ImageFolder
    trigger: str | None = None
    index_file: Path | None = None
    done: int = 0
    total: int = 0
    num_images: int = 0
    """Images that can be trained, once the check is done."""
    problems: list[FolderProblem] = field(default_factory=list)
    pairs: list[DuplicatePair] = field(default_factory=list)

    def run(self) -> None:
        """Decode every image that is not known yet, and collect the problems."""
        index = ImageIndex(self.index_file or user_cache_folder() / "zimage-train" / INDEX_NAME)
        entry = self.folder.entry.model_copy(update={"trigger": self.trigger})
        scan = scan_entry(entry, "data.0", index, self._progress)
        index.save()
        unusable = quarantine.unusable_images(entry, scan)
        self.problems = [*_problems_of_images(unusable), *_other_errors(scan, self.folder.path), *_notes(scan)]
        self.pairs = duplicate_pairs(scan.images)
        self.num_images = len(scan.images)

    def _progress(self, task: str, done: int, total: int) -> None:
        self.done, self.total = done, total


def _problems_of_images(unusable: list[tuple[Path, Problem]]) -> list[FolderProblem]:
    return [FolderProblem(_without_key(str(problem)), True, "move", (path,), problem) for path, problem in unusable]


def _other_errors(scan: FolderScan, root: Path) -> list[FolderProblem]:
    """Return the errors that are not about an image that cannot be used."""
    rejected = {problem for _, problem in scan.rejected}
    found: list[FolderProblem] = []
    for error in scan.errors:
        for problem in error.problems:
            if problem in rejected:
                continue
            if problem.code == "ambiguous-caption":
                stem = Path(str(problem.location)).with_suffix("")
                images = tuple(sorted(path for path in stem.parent.glob("*") if _is_image_of(path, stem)))
                found.append(FolderProblem(_without_key(str(problem)), True, "move", images, problem))
            elif problem.code == "placeholder-without-trigger":
                found.append(
                    FolderProblem(_without_key(str(problem)), True, "trigger", (Path(str(problem.location)),), problem)
                )
            else:
                found.append(FolderProblem(_without_key(str(problem)), True, problem=problem))
    return found


def _is_image_of(path: Path, stem: Path) -> bool:
    return path.with_suffix("") == stem and path.suffix != CAPTION_EXT and path.is_file()


def _notes(scan: FolderScan) -> list[FolderProblem]:
    found: list[FolderProblem] = []
    for note in scan.notes:
        is_of_quarantine = note.code == "not-searched" and quarantine.FOLDER in note.text
        if note.code not in DUPLICATE_NOTES and not is_of_quarantine:
            found.append(FolderProblem(_without_key(note.text), False, NOTE_FIXES.get(note.code)))
    return found


def _without_key(text: str) -> str:
    """Return a message without the key of the entry, which means nothing where there is no config."""
    return re.sub(r"\bdata\.0(\.|: )", "", text)


def duplicate_pairs(records: list[ImageRecord]) -> list[DuplicatePair]:
    """Return the pairs of equal images, then those of nearly equal images, each with the earliest that it resembles."""
    first_by_digest: dict[str, ImageRecord] = {}
    pairs: list[DuplicatePair] = []
    for record in records:
        first = first_by_digest.setdefault(record.digest, record)
        if first is not record:
            pairs.append(DuplicatePair(first.path, record.path, True))
    different = list(first_by_digest.values())
    for earlier, later in near_duplicates([record.thumbnail for record in different]):
        pairs.append(DuplicatePair(different[earlier].path, different[later].path, False))
    return pairs


def move_away(folder: Path, image: Path, problem: Problem = MOVED_BY_HAND) -> Path:
    """Move an image with its caption into `_rejected`, where no training looks, and return where it is now.

    Raises:
        DiskError: a file cannot be moved.
    """
    return quarantine.move_away(image, folder, CAPTION_EXT, problem)


def list_moved(folder: Path) -> list[FolderImage]:
    """Return the images that were moved away, each with the reason as its caption."""
    root = folder / quarantine.FOLDER
    found: list[FolderImage] = []
    for reason in sorted(root.rglob("*.why.txt")):
        image = reason.with_name(reason.name.removesuffix(".why.txt"))
        if image.is_file():
            text = reason.read_text(encoding="utf-8", errors="replace").strip()
            found.append(FolderImage(image.relative_to(root).as_posix(), image, text))
    return found


def move_back(folder: Path, image: Path) -> Path:
    """Move an image that was moved away back to where it was, with its caption, and return where it is now.

    Raises:
        DiskError: a file cannot be moved.
    """
    caption = image.with_suffix(CAPTION_EXT)
    target = atomic.move(image, folder / image.relative_to(folder / quarantine.FOLDER))
    if caption.exists():
        atomic.move(caption, target.with_suffix(CAPTION_EXT))
    atomic.remove(image.with_name(image.name + ".why.txt"))
    return target
