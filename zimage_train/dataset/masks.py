"""Masks: which part of an image is trained, as a map on the grid of its latents."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from zimage_train.config.dataset import ALPHA, DataEntry
from zimage_train.dataset import images
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.images import ImageIndex, ImageInfo
from zimage_train.errors import DataError, Location, Problem, ZImageTrainError
from zimage_train.io.progress import Progress
from zimage_train.models.components import LATENT_STRIDE

MAX_ASPECT_DIFFERENCE = 1.02
"""Largest ratio of the aspects of a mask and its image; it allows for rounding, where either was scaled."""
DARKEST_MASK = 2
"""Value, of 255, that the lightest part of a mask must reach; a darker mask is refused as empty."""


@dataclass(frozen=True)
class Mask:
    """The mask of an image: a file, or the alpha channel of the image itself."""

    path: Path
    digest: str
    """SHA-256 of the file; `ALPHA` for an alpha channel, whose content is part of the image's digest."""
    is_alpha: bool
    width: int = 0
    height: int = 0
    """Size of the file, px; 0 for an alpha channel, which always has the size of its image."""


def find_masks(
    image_paths: list[Path],
    entry: DataEntry,
    mask_setting: str,
    where: str,
    errors: list[ZImageTrainError],
    image_index: ImageIndex,
    progress: Progress,
) -> dict[Path, Mask]:
    """Return image path -> mask for each image of `entry` that has a mask, and add what is wrong to `errors`.

    Args:
        image_paths: the images of the entry.
        entry: the data entry.
        mask_setting: its `mask`: a folder, or `alpha` for the alpha channel.
        where: the key of the entry, such as `data.0`.
        errors: gets an error for each mask that cannot be used.
        image_index: reads the mask files.
        progress: called for each mask file.
    """
    if mask_setting == ALPHA:
        return {path: Mask(path, ALPHA, True) for path in image_paths if images.has_alpha(path)}
    folder = Path(mask_setting)
    setting = Location(key=f"{where}.mask", source=str(folder))
    if not folder.is_dir():
        message = "is a file, not a folder" if folder.exists() else "does not exist"
        errors.append(DataError(Problem(setting, message, "give a folder of masks, or alpha", "missing-folder")))
        return {}
    root = Path(entry.folder) if entry.folder else None
    image_names = [_name_of(path, root) for path in image_paths]
    mask_files = _list_mask_files(folder, errors)
    for name, count in Counter(image_names).items():
        if count > 1 and name in mask_files:
            message = "is the mask of several images"
            problem = Problem(str(mask_files[name]), message, "give them different names", "ambiguous-mask")
            errors.append(DataError(problem))
    files_by_image: dict[Path, Path] = {}
    for path, name in zip(image_paths, image_names, strict=True):
        if name in mask_files:
            files_by_image[path] = mask_files[name]
    if not files_by_image:
        example = f"{image_names[0]}.png" if image_names else "NAME.png"
        message = f"holds no mask under the name of an image (such as {example})"
        errors.append(DataError(Problem(setting, message, "name masks as their images", "no-mask-found")))
    return _read_masks(files_by_image, errors, image_index, progress)


def _name_of(path: Path, root: Path | None) -> str:
    """Return the name by which an image and its mask belong together: the path in the folder, without extension."""
    relative = path.relative_to(root) if root else Path(path.name)
    return relative.with_suffix("").as_posix()


def _list_mask_files(folder: Path, errors: list[ZImageTrainError]) -> dict[str, Path]:
    """Return name -> mask file of `folder`, and add an error for each further file of the same name."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in images.EXTENSIONS or not path.is_file():
            continue
        first = files.setdefault(_name_of(path, folder), path)
        if first is not path:
            message = f"is a second mask beside {first.name}"
            errors.append(DataError(Problem(str(path), message, "remove either file", "ambiguous-mask")))
    return files


def _read_masks(
    files_by_image: dict[Path, Path], errors: list[ZImageTrainError], image_index: ImageIndex, progress: Progress
) -> dict[Path, Mask]:
    infos = image_index.lookup(files_by_image.values(), progress)
    masks: dict[Path, Mask] = {}
    for (image_path, mask_path), info in zip(files_by_image.items(), infos, strict=True):
        if not isinstance(info, ImageInfo):
            errors.append(info)
            continue
        masks[image_path] = Mask(mask_path, info.digest, False, info.width, info.height)
        # The thumbnail averages areas of the mask, so a lone white pixel of a large mask does not count.
        if max(bytes.fromhex(info.thumbnail)) < DARKEST_MASK:
            message = "is black: nothing would be trained"
            errors.append(DataError(Problem(str(mask_path), message, "paint the trained part white", "empty-mask")))
    return masks


def require_fit(mask: Mask, image: Path, info: ImageInfo) -> None:
    """Require that `mask` has the aspect of its image.

    Raises:
        DataError: it has another aspect.
    """
    if mask.is_alpha:
        return
    ratio = mask.width / mask.height * info.height / info.width
    if not 1 / MAX_ASPECT_DIFFERENCE <= ratio <= MAX_ASPECT_DIFFERENCE:
        message = f"is {mask.width}x{mask.height} px, and its image {image.name} {info.width}x{info.height}"
        raise DataError(Problem(str(mask.path), message, "make it of the image's shape", "other-shape"))


def mask_on_latents(mask: Mask, size: Bucket, flip: bool, image_digest: str) -> NDArray[np.float32]:
    """Return the mask (h/8, w/8) in [0, 1] of an image trained at `size`: scaled, cropped and mirrored as the image is.

    Raises:
        DataError: the file is gone or has changed since it was checked.
    """
    try:
        content = mask.path.read_bytes()
    except OSError as error:
        message = f"cannot be read any more ({error.strerror})"
        raise DataError(Problem(str(mask.path), message, "put it back", "unreadable-file")) from None
    expected_digest = image_digest if mask.is_alpha else mask.digest
    if hashlib.sha256(content).hexdigest() != expected_digest:
        raise DataError(Problem(str(mask.path), "changed while this command ran", "run it again", "changed-file"))
    if mask.is_alpha:
        grey = images.load_alpha(mask.path, content)
    else:
        image = images.load(mask.path, content)
        grey = image.convert("L")
    # Bilinear, since the Lanczos filter of the images overshoots at the edges of a mask.
    fitted = ImageOps.fit(grey, (size.width, size.height), method=Image.Resampling.BILINEAR, centering=(0.5, 0.5))
    if flip:
        fitted = ImageOps.mirror(fitted)
    # One latent stands for 8 x 8 px, so its mask is their mean. `reduce` rounds it to 8 bits.
    return np.asarray(fitted.reduce(LATENT_STRIDE), dtype=np.float32) / 255.0
