"""The frame over an image: the bucket and the part of the image that is trained at a resolution."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from zimage_train.dataset.buckets import Bucket, nearest_bucket
from zimage_train.dataset.images import FORMATS, without_warnings

RESOLUTIONS = (512, 768, 1024)
TURNED = (5, 6, 7, 8)
"""EXIF orientations in which width and height change places."""
MAX_CACHED = 20_000


@dataclass(frozen=True)
class CropRectangle:
    """The part of an image that is trained, in fractions of its width and height."""

    left: float
    top: float
    width: float
    height: float


class ImageSizes:
    """Upright sizes of image files, from their headers, as long as the files do not change."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[tuple[Path, int], tuple[int, int]] = OrderedDict()

    def get(self, path: Path) -> tuple[int, int] | None:
        """Return width and height in px, or None if the file is no image."""
        try:
            key = (path, path.stat().st_mtime_ns)
            if key not in self._sizes:
                self._sizes[key] = _upright_size(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        while len(self._sizes) > MAX_CACHED:
            self._sizes.popitem(last=False)
        return self._sizes[key]


def _upright_size(path: Path) -> tuple[int, int]:
    with without_warnings(), Image.open(path, formats=FORMATS) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.height, image.width) if is_turned else image.size


def bucket_of(size: tuple[int, int], resolution: int) -> Bucket | None:
    """Return the size at which an image is trained, or None if it is too small or too narrow."""
    try:
        return nearest_bucket(*size, resolution)
    except ValueError:
        return None


def crop_rectangle(size: tuple[int, int], bucket: Bucket) -> CropRectangle:
    """Return the part of an image that `images.fit` keeps: it covers the bucket, and the rest is cropped evenly."""
    scale = max(bucket.width / size[0], bucket.height / size[1])
    width, height = bucket.width / (size[0] * scale), bucket.height / (size[1] * scale)
    return CropRectangle((1 - width) / 2, (1 - height) / 2, width, height)
