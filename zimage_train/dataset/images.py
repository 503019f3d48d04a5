"""Image files: decoding them to a common form of RGB, and an index that remembers the decoded images.

The form is upright, sRGB, 8 bits per channel, alpha composited over white. A file that could be read in several ways is
refused.
"""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import DataError, DiskError, Problem, ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json
from zimage_train.io.progress import Progress

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
MIN_SIDE_PX = 64
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", "I;16", "I;16L", "I;16B", "I;16N")
SRGB_NAMES = ("srgb iec61966", "srgb built-in")
"""Beginnings of the names of sRGB profiles, in lower case. A conversion from sRGB to sRGB would only round."""
INDEX_NAME = "looks.json"
"""File of the `ImageIndex` in the cache folder."""
INDEX_FORMAT = 1
"""Incremented whenever images are decoded differently; an index of another format is ignored."""
THUMBNAIL_PX = 8
NEAR_DUPLICATE_RMS = 4.0
"""Root mean square difference of two thumbnails, of 255; an image that is saved again or scaled differs by less."""

Image.init()  # registers every format, which `open` does not do when formats are named

_HEX = re.compile("[0-9a-f]+")
_SRGB = ImageCms.createProfile("sRGB")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Within the block, ignore Pillow's warnings on odd files: a file that cannot be read is an error all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(path: Path, content: bytes) -> Image.Image:
    """Decode `content`, the bytes of `path`, to an upright sRGB image of mode RGB.

    Raises:
        DataError: not an image, damaged, animated, too large, too small, or in a mode with no agreed meaning.
    """
    try:
        with without_warnings():
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_header(path, image)
            image.load()
            image = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        hint = "replace it by a JPEG, PNG, WebP, BMP or TIFF, or remove it"
        raise _refusal(path, _describe_content(content), hint, "not-an-image") from None
    except Image.DecompressionBombError:
        raise _too_large(path, "") from None
    except Exception as error:  # noqa: BLE001  on damaged bytes the decoders raise whatever their parsing runs into
        raise _refusal(path, f"damaged or cut off ({error})", "export it again or remove it", "damaged-image") from None
    if image.mode not in MODES:
        raise _refusal(path, f"pixels of mode {image.mode} are not read", "export it as RGB", "unsupported-pixels")
    return _to_rgb(image)


def has_alpha(path: Path) -> bool:
    """Return whether the image at `path` has transparency; False if it cannot be read."""
    try:
        with without_warnings(), Image.open(path, formats=FORMATS) as image:
            return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def load_alpha(path: Path, content: bytes) -> Image.Image:
    """Return the alpha channel of an image that `load` accepts, upright, as mode L.

    Raises:
        DataError: as in `load`.
    """
    load(path, content)  # only to raise for an image that is not accepted
    with without_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def fit(image: Image.Image, size: Bucket) -> Image.Image:
    """Scale `image` so that it covers `size`, and crop the centre."""
    if image.size == tuple(size):
        return image
    return ImageOps.fit(image, (size.width, size.height), method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def _check_header(path: Path, image: Image.Image) -> None:
    """Refuse what the header alone rules out, before the pixels are decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} px is ")
    if min(width, height) < MIN_SIDE_PX:
        message = f"{width}x{height} px is under {MIN_SIDE_PX} px"
        raise _refusal(path, message, "use a larger image or remove it", "too-small")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO's first frame is the photo
        raise _refusal(path, f"animated ({frames} frames)", "export one frame of it", "animated-image")
    # "I" is how Pillow reads a 16-bit PNG, whose range is known. In a TIFF the values of "I" and "F" may be anything.
    if image.mode in ("F", "I") and image.format != "PNG":
        message = f"pixels of mode {image.mode} have no agreed range"
        raise _refusal(path, message, "export it as 8 or 16 bit", "unsupported-pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    # Read first, since the image that `_from_16_bit` returns has no profile.
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.mode in ("LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        # The profile describes the colours alone, and the white beneath is sRGB already.
        colours = _to_srgb(image.convert("RGB"), profile)
        return Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)
    return _to_srgb(image, profile).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Return 8-bit grey, with alpha if a grey value stands for transparent."""
    # Pillow's own conversion does not scale but clips, so that nearly everything becomes white. 257 = 65535 / 255.
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).strip().lower().startswith(SRGB_NAMES):
            return image
        converted = ImageCms.profileToProfile(
            image, source, _SRGB, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):  # a damaged profile, or a profile for another mode; viewers ignore these too
        return image
    return converted if converted is not None else image


def _describe_content(content: bytes) -> str:
    """Return what `content` probably is, for a message."""
    head = content[:512].lstrip().lower()
    if not content:
        return "an empty file"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "a web page or SVG, not an image"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image itself"
    if head.startswith((b"gif87a", b"gif89a")):
        return "a GIF"
    if b"ftypavif" in head or b"ftyphei" in head or b"ftypmif1" in head:
        return "an AVIF or HEIC image"
    return "not an image, or one that is damaged"


def _too_large(path: Path, size: str) -> DataError:
    return _refusal(path, f"{size}over {MAX_PIXELS // 1_000_000} megapixels", "scale it down", "too-large")


def _refusal(path: Path, message: str, hint: str, code: str) -> DataError:
    return DataError(Problem(str(path), message, hint, code))


@dataclass(frozen=True)
class ImageInfo:
    """Facts about an image that the checks before a run need."""

    digest: str
    """SHA-256 of the file."""
    width: int
    height: int
    """Upright size, px."""
    thumbnail: str
    """8 x 8 RGB, in hexadecimal."""


class ImageIndex:
    """Remembers the `ImageInfo` of each file in a JSON file, so that an unchanged image is decoded once.

    A file is known by its path, its size and its times of change. Without a JSON file nothing is kept between commands.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._infos: dict[str, ImageInfo] = {}
        self._is_changed = False
        if file is not None:
            self._infos = _read_index(file)

    def lookup(self, paths: Iterable[Path], progress: Progress) -> list[ImageInfo | ZImageTrainError]:
        """Return the info of each path, in order, or why it is refused; images are decoded on all cores."""
        paths = list(paths)
        results: list[ImageInfo | ZImageTrainError] = []
        # Threads suffice, since Pillow decodes without the GIL.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for number, result in enumerate(pool.map(self._info_or_error, paths), 1):
                results.append(result)
                progress("checking images", number, len(paths))
        return results

    def save(self) -> None:
        """Write the index for the next command. A failure is ignored: it costs that command time alone."""
        if self._file is None or not self._is_changed:
            return
        infos = {key: astuple(info) for key, info in self._infos.items()}
        try:
            atomic.write_text(self._file, json.dumps({"format": INDEX_FORMAT, "looks": infos}))
        except DiskError:
            return
        self._is_changed = False

    def _info_or_error(self, path: Path) -> ImageInfo | ZImageTrainError:
        try:
            return self._info(path)
        except DataError as error:
            return error

    def _info(self, path: Path) -> ImageInfo:
        key = _file_key(path)
        if key is not None and key in self._infos:
            return self._infos[key]
        content = _read(path)
        image = load(path, content)
        small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
        info = ImageInfo(hashlib.sha256(content).hexdigest(), image.width, image.height, small.tobytes().hex())
        # Not remembered if the file was replaced while it was read: `key` would belong to the other content.
        if key is not None and key == _file_key(path):
            self._infos[key] = info
            self._is_changed = True
        return info


def near_duplicates(thumbnails: list[str]) -> list[tuple[int, int]]:
    """Return pairs (earlier, later) of indices of thumbnails that are nearly equal.

    An image that resembles several earlier images is paired only with the earliest of them.
    """
    if not thumbnails:
        return []
    pixels = np.array([list(bytes.fromhex(thumbnail)) for thumbnail in thumbnails], dtype=np.float32)
    squares = (pixels**2).sum(axis=1)
    max_squared_distance = NEAR_DUPLICATE_RMS**2 * pixels.shape[1]
    pairs: list[tuple[int, int]] = []
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b, for 1000 rows at a time: 40 MB for 10,000 images, where all rows take 400 MB.
    for start in range(0, len(pixels), 1000):
        rows = slice(start, start + 1000)
        squared_distances = squares[rows, None] + squares[None, :] - 2.0 * (pixels[rows] @ pixels.T)
        # Ordered by row, then by column, so that the earliest match of a row comes first.
        for row, earlier in zip(*np.nonzero(squared_distances < max_squared_distance), strict=True):
            later = start + row
            is_first_match = not pairs or pairs[-1][1] != later
            if earlier < later and is_first_match:
                pairs.append((int(earlier), int(later)))
    return pairs


def _read_index(file: Path) -> dict[str, ImageInfo]:
    """Return the valid entries of `file`; an image whose entry is damaged is decoded again."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != INDEX_FORMAT:
        return {}
    entries = content.get("looks")
    if not isinstance(entries, dict):
        return {}
    return {key: ImageInfo(*values) for key, values in entries.items() if _is_valid_entry(values)}


def _is_valid_entry(values: object) -> bool:
    if not isinstance(values, list) or [type(value) for value in values] != [str, int, int, str]:
        return False
    digest, _, _, thumbnail = values
    lengths_are_right = (len(digest), len(thumbnail)) == (64, 2 * 3 * THUMBNAIL_PX**2)
    return lengths_are_right and _HEX.fullmatch(digest + thumbnail) is not None


def _file_key(path: Path) -> str | None:
    """Return a key that changes with the file, or None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    # The change time too: programs can restore size and modification time of a file that they rewrite.
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise _refusal(path, "is not a file", "remove it or check the name", "not-a-file")
        return path.read_bytes()
    except FileNotFoundError:
        raise _refusal(path, "does not exist", "check the name", "missing-file") from None
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})", "check the file", "unreadable-file") from None
