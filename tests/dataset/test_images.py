"""Every image file becomes the RGB image that its owner sees, or is refused with a reason."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from zimage_train.dataset import images
from zimage_train.errors import DataError

from image_files import (
    ADOBE_TO_XYZ,
    NAME,
    SRGB_TO_XYZ,
    as_srgb,
    encoded,
    gradient,
    loaded,
    noise,
    profile,
    refusal,
    with_hole,
)

# Ordinary images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_a_lossless_image_is_itself(kind: str):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (loaded(encoded(noise(), kind, **options)) == np.asarray(noise())).all()


def test_a_jpeg_is_itself_nearly():
    assert abs(loaded(encoded(gradient(), "JPEG", quality=95, subsampling=0)) - np.asarray(gradient())).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_and_palette_values(kind: str):
    """Grey, palette and black-and-white images keep their values."""
    grey = gradient().convert("L")
    assert (loaded(encoded(grey, kind)) == np.asarray(grey)[..., None]).all()
    palette = gradient().quantize(16)
    assert (loaded(encoded(palette, kind)) == np.asarray(palette.convert("RGB"))).all()
    bilevel = grey.point(lambda value: 255 * (value > 99), mode="1")
    found = loaded(encoded(bilevel, kind))
    assert (found == 255 * np.asarray(bilevel).astype(int)[..., None]).all()
    assert set(np.unique(found)) == {0, 255}


def test_formats_in_a_fresh_process(tmp_path: Path):
    """Every format is known in a fresh process."""
    for kind in ("WEBP", "TIFF", "BMP"):
        gradient().save(tmp_path / kind, kind)
    code = """
from pathlib import Path
from zimage_train.dataset import images
print([images.load(Path(kind), Path(kind).read_bytes()).size for kind in ("WEBP", "TIFF", "BMP")])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[(96, 64), (96, 64), (96, 64)]\n", "")


# Orientation


def test_invalid_orientation_is_ignored():
    """An orientation that does not exist changes nothing."""
    exif = Image.Exif()
    exif[0x112] = 9
    assert (loaded(encoded(gradient(), "PNG", exif=exif)) == np.asarray(gradient())).all()


# Alpha


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (64, 64), (0, 100, 200, 128))
    assert np.abs(loaded(encoded(image, "PNG")) - (127, 177, 227)).max() <= 1


# More than 8 bits, CMYK


def test_grey_16_bit_transparency():
    """In 16-bit grey the value that stands for transparent becomes white."""
    values = np.full((64, 96), 30000, dtype=np.uint16)
    values[:, :48] = 77
    found = loaded(encoded(Image.fromarray(values), "PNG", transparency=77))
    assert (found[:, :48] == 255).all() and np.abs(found[:, 48:] - 30000 / 257).max() <= 1


# Colour profiles


def test_profile_of_a_transparent_image():
    """A transparent wide-gamut image is converted, and white where it is transparent."""
    image = Image.new("RGBA", (64, 64), (200, 60, 60, 255))
    image.paste((0, 255, 0, 0), (0, 0, 32, 64))
    found = loaded(encoded(image, "PNG", icc_profile=profile(ADOBE_TO_XYZ, 2.2, "Wide RGB")))
    assert (found[:, :32] == 255).all()
    assert np.abs(found[0, 40] - as_srgb((200, 60, 60), ADOBE_TO_XYZ, 563 / 256)).max() <= 2


def test_profile_that_is_linear():
    """A linear profile is converted although its name says sRGB."""
    found = loaded(
        encoded(Image.new("RGB", (64, 64), (55, 55, 55)), "PNG", icc_profile=profile(SRGB_TO_XYZ, 1.0, "sRGB-linear"))
    )
    assert np.abs(found - as_srgb((55, 55, 55), SRGB_TO_XYZ, 1.0)).max() <= 2 and found.min() > 120  # fmt: skip


def test_srgb_itself_changes_no_bit():
    builtin = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    usual = profile(SRGB_TO_XYZ, 2.2, "sRGB IEC61966-2.1")
    for one in (builtin, usual):
        assert (loaded(encoded(noise(), "PNG", icc_profile=one)) == np.asarray(noise())).all()


@pytest.mark.parametrize("broken", [b"not a profile", b"\0" * 200, profile(ADOBE_TO_XYZ, 2.2, "Wide RGB")[:150]])
def test_profile_that_is_broken(broken: bytes):
    """A broken profile is ignored, as image viewers do."""
    assert (loaded(encoded(noise(), "PNG", icc_profile=broken)) == np.asarray(noise())).all()


def test_profile_on_a_grey_image():
    """A colour profile on a grey image is no error."""
    grey = gradient().convert("L")
    found = loaded(encoded(grey, "PNG", icc_profile=profile(ADOBE_TO_XYZ, 2.2, "Wide RGB")))
    assert (found == np.asarray(grey)[..., None]).all()


# Refused


def test_other_colour_spaces_are_refused():
    assert refusal(encoded(Image.new("LAB", (64, 64)), "TIFF")) == "pixels of mode LAB are not read; export it as RGB"


def test_the_smallest_image_is_fine():
    assert loaded(encoded(Image.new("RGB", (64, 64)), "PNG")).shape == (64, 64, 3)


@pytest.mark.parametrize("mode", images.MODES)
def test_modes_can_all_be_converted(mode: str):
    """Every accepted image mode can be converted."""
    assert images._to_rgb(Image.new(mode, (64, 64))).mode == "RGB"


SEEDS = [
    encoded(gradient(), "JPEG", exif=bytes.fromhex("4578696600004d4d002a000000080001011200030000000100060000")),
    encoded(gradient().convert("CMYK"), "JPEG"),
    encoded(with_hole("RGBA"), "PNG", icc_profile=profile(ADOBE_TO_XYZ, 2.2, "Wide RGB")),
    encoded(gradient().quantize(8), "PNG", transparency=3),
    encoded(Image.fromarray(np.zeros((64, 64), np.uint16)), "PNG"),
    encoded(with_hole("RGBA"), "WEBP"),
    encoded(gradient(), "BMP"),
    encoded(with_hole("RGBA"), "TIFF"),
    encoded(gradient(), "TIFF", compression="tiff_lzw"),
]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.floats(0, 1)
)
def test_damaged_bytes(content: bytes, changes: list[tuple[int, int]], share: float):
    """Damaged bytes are an image or a refusal, and never a crash."""
    damaged = bytearray(content)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    if share < 0.3:
        del damaged[int(len(damaged) * share) :]
    try:
        assert images.load(NAME, bytes(damaged)).mode == "RGB"
    except DataError as error:
        assert str(error).startswith(f"{NAME}: ")
