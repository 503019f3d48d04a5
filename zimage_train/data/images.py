"""A picture file to canonical RGB: upright, sRGB, 8 bit, alpha over white; anything doubtful is refused."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from zimage_train.data.buckets import Bucket
from zimage_train.errors import DataError, Problem

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
MIN_SIDE_PX = 64

Image.init()  # registers every format, which `open` does not do when formats are named

_SRGB = ImageCms.createProfile("sRGB")


def load(path: Path, content: bytes) -> Image.Image:
    """Decode `content`, the bytes of `path`, to an upright sRGB picture of mode RGB.

    Raises:
        DataError: not a picture, damaged, animated, too large, too small, or in a mode with no agreed meaning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_header(path, image)
            image.load()
            image.info["icc_profile"] = image.info.get("icc_profile") or None
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise _refused(path, _what_is(content), "replace it by a JPEG, PNG, WebP, BMP or TIFF, or remove it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _refused(path, f"damaged or cut off ({error})", "export it again or remove it") from None


def fit(image: Image.Image, size: Bucket) -> Image.Image:
    """Scale `image` so that it covers `size`, and crop the centre."""
    if image.size == tuple(size):
        return image
    return ImageOps.fit(image, tuple(size), method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _refused(path, f"{width}x{height} px is over {MAX_PIXELS // 1_000_000} megapixels", "scale it down")
    if min(width, height) < MIN_SIDE_PX:
        raise _refused(path, f"{width}x{height} px is under {MIN_SIDE_PX} px", "use a larger picture or remove it")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO's first frame is the photo
        raise _refused(path, f"animated ({frames} frames)", "export one frame of it")
    if image.mode in ("F", "I") and image.format != "PNG":
        raise _refused(path, f"pixels of mode {image.mode} have no agreed range", "export it as 8 or 16 bit")


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bit grey: Pillow's own conversion clips it to white
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        colours = _to_srgb(image.convert("RGB"), profile)
        return Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)
    return _to_srgb(image, profile).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
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
        return "a web page or SVG, not a picture"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture itself"
    if head.startswith((b"gif87a", b"gif89a")):
        return "a GIF"
    if b"ftypavif" in head or b"ftyphei" in head or b"ftypmif1" in head:
        return "an AVIF or HEIC picture"
    return "not a picture, or one that is damaged"


def _refused(path: Path, what: str, todo: str) -> DataError:
    return DataError(Problem(str(path), what, todo))
