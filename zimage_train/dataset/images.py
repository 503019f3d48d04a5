"""An image file to canonical RGB: upright, sRGB, 8 bit, alpha over white; anything doubtful is refused."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import DataError, Problem

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
MIN_SIDE_PX = 64
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", "I;16", "I;16L", "I;16B", "I;16N")
SRGB_NAMES = ("srgb iec61966", "srgb built-in")
"""Profiles that say what is assumed anyway; a conversion would only round."""

Image.init()  # registers every format, which `open` does not do when formats are named

_SRGB = ImageCms.createProfile("sRGB")


def load(path: Path, content: bytes) -> Image.Image:
    """Decode `content`, the bytes of `path`, to an upright sRGB image of mode RGB.

    Raises:
        DataError: not an image, damaged, animated, too large, too small, or in a mode with no agreed meaning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_header(path, image)
            image.load()
            image = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise _refused(
            path, _what_is(content), "replace it by a JPEG, PNG, WebP, BMP or TIFF, or remove it", "not-an-image"
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(path, "") from None
    except Exception as error:  # noqa: BLE001  on damaged bytes the decoders raise whatever their parsing runs into
        raise _refused(path, f"damaged or cut off ({error})", "export it again or remove it", "damaged-image") from None
    if image.mode not in MODES:
        raise _refused(path, f"pixels of mode {image.mode} are not read", "export it as RGB", "unsupported-pixels")
    return _to_rgb(image)


def has_alpha(path: Path) -> bool:
    """Whether the image at `path` says what is transparent; one that cannot be read has none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def load_alpha(path: Path, content: bytes) -> Image.Image:
    """The alpha channel of an image that `load` takes, upright, as mode L.

    Raises:
        DataError: as `load`.
    """
    load(path, content)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def fit(image: Image.Image, size: Bucket) -> Image.Image:
    """Scale `image` so that it covers `size`, and crop the centre."""
    if image.size == tuple(size):
        return image
    return ImageOps.fit(image, (size.width, size.height), method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} px is ")
    if min(width, height) < MIN_SIDE_PX:
        raise _refused(
            path, f"{width}x{height} px is under {MIN_SIDE_PX} px", "use a larger image or remove it", "too-small"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO's first frame is the photo
        raise _refused(path, f"animated ({frames} frames)", "export one frame of it", "animated-image")
    if image.mode in ("F", "I") and image.format != "PNG":
        raise _refused(
            path, f"pixels of mode {image.mode} have no agreed range", "export it as 8 or 16 bit", "unsupported-pixels"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.mode in ("LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        colours = _to_srgb(image.convert("RGB"), profile)
        return Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)
    return _to_srgb(image, profile).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 8 bits, with alpha if one value stands for transparent: Pillow's own conversion clips to white."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
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
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for another mode: viewers ignore it too
        return image
    return converted if converted is not None else image


def _what_is(content: bytes) -> str:
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
    return _refused(path, f"{size}over {MAX_PIXELS // 1_000_000} megapixels", "scale it down", "too-large")


def _refused(path: Path, what: str, todo: str, code: str) -> DataError:
    return DataError(Problem(str(path), what, todo, code))
