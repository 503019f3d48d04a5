"""Moving images that cannot be used into a folder that is not searched, each with the reason beside it."""

import glob
from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import nearest_bucket
from zimage_train.dataset.images import EXTENSIONS, INDEX_NAME, ImageIndex
from zimage_train.dataset.sample_order import target_sides
from zimage_train.dataset.scan import FolderScan, scan_entry
from zimage_train.errors import Problem
from zimage_train.io import atomic

FOLDER = "_rejected"
"""Inside the folder of the images; a scan enters no folder that begins with `_`."""


def move_rejected(config: Config) -> list[str]:
    """Move every image that cannot be used into `_rejected`, with its caption, and return the lines to print.

    Raises:
        DiskError: a file cannot be moved.
    """
    image_index = ImageIndex(cache_dir(config) / INDEX_NAME)
    lines: list[str] = []
    for index, entry in enumerate(config.data):
        for path, problem in unusable_images(entry, scan_entry(entry, f"data.{index}", image_index)):
            if entry.folder is None:  # images of a list may belong to something else
                lines.append(f"{path}: {problem.message}; not moved: take its line out of {entry.metadata}")
                continue
            target = move_away(path, Path(entry.folder), entry.caption_ext, problem)
            lines.append(f"{path}: {problem.message}; moved to {target}")
    image_index.save()
    return [*lines, f"{len(lines)} bad images", ""]


def unusable_images(entry: DataEntry, scan: FolderScan) -> list[tuple[Path, Problem]]:
    """Return the images that cannot be read, or are too narrow for a resolution of `entry`, and why."""
    bad = list(scan.rejected)
    for image in scan.images:
        try:
            for side in target_sides(entry):
                nearest_bucket(image.width, image.height, side)
        except ValueError as error:
            bad.append((image.path, Problem(str(image.path), str(error), "crop it", "too-narrow")))
    return bad


def move_away(path: Path, root: Path, caption_ext: str, problem: Problem) -> Path:
    """Move the image `path`, its caption and the reason into `_rejected`, and return where the image is now.

    Raises:
        DiskError: a file cannot be moved.
    """
    caption = path.with_suffix(caption_ext)
    images_of_caption = [other for other in path.parent.glob(f"{glob.escape(path.stem)}.*") if _is_image(other)]
    # If the name is taken in `_rejected`, the image gets another name there; caption and reason are named after that.
    target = atomic.move(path, root / FOLDER / path.relative_to(root))
    if caption.exists() and len(images_of_caption) < 2:  # else it stays with the other image
        atomic.move(caption, target.with_suffix(caption_ext))
    atomic.write_text(target.with_name(target.name + ".why.txt"), f"{problem.message}; {problem.hint}\n")
    return target


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS
