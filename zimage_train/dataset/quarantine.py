"""Moving images that cannot be trained on out of the way, each with the reason beside it."""

from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import nearest_bucket
from zimage_train.dataset.image_index import ImageIndex
from zimage_train.dataset.sample_order import target_sides
from zimage_train.dataset.scan import scan_entry
from zimage_train.errors import Problem
from zimage_train.io import atomic

FOLDER = "_rejected"
"""Beside the images; a scan enters no folder that begins with `_`."""


def move_rejected(config: Config) -> list[str]:
    """Move every bad image of every folder, with its caption, into `_rejected`; one line each.

    Raises:
        DiskError: a file cannot be moved.
    """
    looks = ImageIndex(cache_dir(config) / "looks.json")
    lines = []
    for index, entry in enumerate(config.data):
        for path, problem in _bad(entry, f"data.{index}", looks):
            if entry.folder is None:
                lines.append(f"{path}: {problem.message}; not moved: take its line out of {entry.metadata}")
                continue
            place = _move(path, Path(entry.folder), entry.caption_ext, problem)
            lines.append(f"{path}: {problem.message}; moved to {place}")
    looks.save()
    return [*lines, f"{len(lines)} bad images", ""]


def _bad(entry: DataEntry, where: str, looks: ImageIndex) -> list[tuple[Path, Problem]]:
    found = scan_entry(entry, where, looks)
    bad = list(found.rejected)
    for image in found.images:
        try:
            for side in target_sides(entry):
                nearest_bucket(image.width, image.height, side)
        except ValueError as error:
            bad.append((image.path, Problem(str(image.path), str(error), "crop it")))
    return bad


def _move(path: Path, root: Path, caption_ext: str, problem: Problem) -> Path:
    target = root / FOLDER / path.relative_to(root)
    caption = path.with_suffix(caption_ext)
    place = atomic.move(path, target)
    if caption.exists():
        atomic.move(caption, place.with_suffix(caption_ext))
    atomic.write_text(place.with_name(place.name + ".why.txt"), f"{problem.message}; {problem.hint}\n")
    return place
