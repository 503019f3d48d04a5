"""Masks: which part of an image is trained, as a map on the grid of its latents."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import images
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.image_index import ImageIndex, ImageInfo
from zimage_train.errors import DataError, Location, Problem, ZImageTrainError
from zimage_train.io.progress import Progress

ALPHA = "alpha"
MAX_ASPECT_DIFFERENCE = 1.02
"""By how much the aspect of a mask may differ from its image's."""
DARKEST_MASK = 2
"""Of 255: a mask whose lightest part is below this is empty."""
STRIDE = 8
"""Pixels of an image under one latent."""


@dataclass(frozen=True)
class Mask:
    """Where an image's mask is: a file of its own, or the image's alpha channel; and what is there by content."""

    path: Path
    digest: str
    is_alpha: bool
    width: int = 0
    height: int = 0


def find_masks(
    image_paths: list[Path],
    entry: DataEntry,
    where: str,
    errors: list[ZImageTrainError],
    looks: ImageIndex,
    tick: Progress,
) -> dict[Path, Mask]:
    """The mask of each image of the entry `where` that has one; what is wrong with others goes into `errors`."""
    if entry.mask is None:
        return {}
    if entry.mask == ALPHA:
        return {path: Mask(path, ALPHA, True) for path in image_paths if images.has_alpha(path)}
    folder = Path(entry.mask)
    setting = Location(key=f"{where}.mask", source=str(folder))
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        errors.append(DataError(Problem(setting, what, "give a folder of masks, or alpha", "missing-folder")))
        return {}
    root = Path(entry.folder) if entry.folder else None
    by_name: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in images.EXTENSIONS and path.is_file():
            other = by_name.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
            if other is not path:
                what = f"is a second mask beside {other.name}"
                errors.append(DataError(Problem(str(path), what, "remove one", "ambiguous-mask")))
    names = Counter(_name(path, root) for path in image_paths)
    twice = [name for name, count in names.items() if count > 1 and name in by_name]
    errors += [
        DataError(
            Problem(str(by_name[name]), "is the mask of several images", "give them different names", "ambiguous-mask")
        )
        for name in twice
    ]
    found = {path: by_name[name] for path in image_paths if (name := _name(path, root)) in by_name}
    if not found:
        example = f"{_name(image_paths[0], root)}.png" if image_paths else "NAME.png"
        what = f"holds no mask under the name of an image (such as {example})"
        errors.append(DataError(Problem(setting, what, "name masks as their images", "no-mask-found")))
    masks: dict[Path, Mask] = {}
    for (image, path), look in zip(found.items(), looks.lookup(list(found.values()), tick), strict=True):
        if isinstance(look, ImageInfo):
            masks[image] = Mask(path, look.digest, False, look.width, look.height)
            if max(bytes.fromhex(look.thumbnail)) < DARKEST_MASK:
                what, todo = "is black: nothing would be trained", "paint white what is"
                errors.append(DataError(Problem(str(path), what, todo, "empty-mask")))
        else:
            errors.append(look)
    return masks


def _name(path: Path, root: Path | None) -> str:
    inside = path.relative_to(root) if root else Path(path.name)
    return inside.with_suffix("").as_posix()


def require_fit(mask: Mask | None, image: Path, look: ImageInfo) -> Mask | None:
    """`mask`, when it has the shape of its image.

    Raises:
        DataError: it has another one.
    """
    if mask is None or mask.is_alpha:
        return mask
    ratio = mask.width / mask.height * look.height / look.width
    if not 1 / MAX_ASPECT_DIFFERENCE <= ratio <= MAX_ASPECT_DIFFERENCE:
        what = f"is {mask.width}x{mask.height} px, and its image {image.name} {look.width}x{look.height}"
        raise DataError(Problem(str(mask.path), what, "make it of the image's shape", "other-shape"))
    return mask


def mask_on_latents(mask: Mask, size: Bucket, flip: bool, image_digest: str) -> NDArray[np.float32]:
    """The mask (h/8, w/8) in [0, 1] of an image trained at `size`: scaled, cropped and mirrored as the image is.

    Raises:
        DataError: it is gone or changed since it was checked.
    """
    try:
        content = mask.path.read_bytes()
    except OSError as error:
        what = f"cannot be read any more ({error.strerror})"
        raise DataError(Problem(str(mask.path), what, "put it back", "unreadable-file")) from None
    if hashlib.sha256(content).hexdigest() != (image_digest if mask.is_alpha else mask.digest):
        raise DataError(Problem(str(mask.path), "changed while this command ran", "run it again", "changed-file"))
    alpha = mask.is_alpha
    grey = images.load_alpha(mask.path, content) if alpha else images.load(mask.path, content).convert("L")
    fitted = ImageOps.fit(grey, (size.width, size.height), method=Image.Resampling.BILINEAR, centering=(0.5, 0.5))
    if flip:
        fitted = ImageOps.mirror(fitted)
    return np.asarray(fitted.reduce(STRIDE), dtype=np.float32) / 255.0
