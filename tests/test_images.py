"""Every picture file becomes the RGB picture that its owner sees, or is refused with a reason."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from zimage_train.data import images
from zimage_train.errors import DataError

NAME = Path("photos/a.png")
HIDDEN = (255, 0, 0)
"""The colour of fully transparent pixels in these tests; it may never be seen."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 160, height: int = 96, seed: int = 0) -> Image.Image:
    """A picture that does not compress, so that a cut goes through its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def loaded(content: bytes) -> np.ndarray:
    image = images.load(NAME, content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refusal(content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        images.load(NAME, content)
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 1
    text = str(caught.value)
    assert text.startswith(f"{NAME}: ")
    return text.removeprefix(f"{NAME}: ")


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Ordinary pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_a_lossless_picture_is_itself(kind: str):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (loaded(encoded(noise(), kind, **options)) == np.asarray(noise())).all()


def test_a_jpeg_is_itself_nearly():
    assert abs(loaded(encoded(gradient(), "JPEG", quality=95, subsampling=0)) - np.asarray(gradient())).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_palette_and_black_and_white_pictures_keep_their_values(kind: str):
    grey = gradient().convert("L")
    assert (loaded(encoded(grey, kind)) == np.asarray(grey)[..., None]).all()
    palette = gradient().quantize(16)
    assert (loaded(encoded(palette, kind)) == np.asarray(palette.convert("RGB"))).all()
    bilevel = grey.point(lambda value: 255 * (value > 99), mode="1")
    found = loaded(encoded(bilevel, kind))
    assert (found == 255 * np.asarray(bilevel).astype(int)[..., None]).all()
    assert set(np.unique(found)) == {0, 255}


def test_every_format_is_known_in_a_fresh_process(tmp_path: Path):
    for kind in ("WEBP", "TIFF", "BMP"):
        gradient().save(tmp_path / kind, kind)
    code = """
from pathlib import Path
from zimage_train.data import images
print([images.load(Path(kind), Path(kind).read_bytes()).size for kind in ("WEBP", "TIFF", "BMP")])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[(96, 64), (96, 64), (96, 64)]\n", "")


# Orientation

STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> what the camera did to the upright picture before it stored it."""


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_all_eight_orientations_are_the_same_upright_picture(kind: str, orientation: int):
    turn = STORED_AS[orientation]
    stored = gradient() if turn is None else gradient().transpose(turn)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    found = loaded(encoded(stored, kind, exif=exif, **options))
    assert found.shape == (64, 96, 3)
    assert abs(found - np.asarray(gradient())).max() <= (12 if kind == "JPEG" else 0)


def test_an_orientation_that_does_not_exist_changes_nothing():
    exif = Image.Exif()
    exif[0x112] = 9
    assert (loaded(encoded(gradient(), "PNG", exif=exif)) == np.asarray(gradient())).all()


# Alpha


def with_hole(mode: str) -> Image.Image:
    """Blue (or dark grey), with a transparent left half whose hidden colour is red (or black)."""
    if mode == "LA":
        image = Image.new("LA", (96, 64), (90, 255))
        image.paste((0, 0), (0, 0, 48, 64))
    else:
        image = Image.new("RGBA", (96, 64), (0, 0, 255, 255))
        image.paste((*HIDDEN, 0), (0, 0, 48, 64))
    return image


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP"), ("LA", "PNG"), ("LA", "TIFF")]
)
def test_transparent_parts_are_white_and_the_hidden_colour_is_gone(mode: str, kind: str):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = loaded(encoded(with_hole(mode), kind, **options))
    assert (found[:, :48] == 255).all()
    assert (found[:, 48:] == ((0, 0, 255) if mode == "RGBA" else (90, 90, 90))).all()


def test_the_hidden_colour_is_really_in_the_file():
    image = Image.open(io.BytesIO(encoded(with_hole("RGBA"), "PNG"))).convert("RGB")
    assert image.getpixel((0, 0)) == HIDDEN


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (64, 64), (0, 100, 200, 128))
    assert np.abs(loaded(encoded(image, "PNG")) - (127, 177, 227)).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "P with alpha of each entry"])
def test_a_colour_that_stands_for_transparent_is_white(mode: str):
    image = Image.new("RGB", (96, 64), (0, 0, 255))
    image.paste(HIDDEN, (0, 0, 48, 64))
    if mode == "RGB":
        content = encoded(image, "PNG", transparency=HIDDEN)
    elif mode.startswith("P"):
        palette = image.quantize(2)
        hidden = palette.getpixel((0, 0))
        each = bytes(0 if index == hidden else 255 for index in range(2))
        content = encoded(palette, "PNG", transparency=each if "each" in mode else hidden)
    else:
        grey = image.getchannel("B").convert(mode)
        content = encoded(grey, "PNG", transparency=0)
    found = loaded(content)
    assert (found[:, :48] == 255).all()
    assert (found[:, 48:] == ((0, 0, 255) if mode[0] in "RP" else 255)).all()


# More than 8 bits, CMYK


def test_16_bit_grey_keeps_its_brightness():
    values = np.linspace(0, 65535, 96 * 64).astype(np.uint16).reshape(64, 96)
    little, big = (Image.fromarray(values), Image.frombytes("I;16B", (96, 64), values.astype(">u2").tobytes()))
    for content in (encoded(little, "PNG"), encoded(little, "TIFF"), encoded(big, "TIFF")):
        assert np.abs(loaded(content) - (values / 257)[..., None]).max() <= 1


def test_16_bit_colour_keeps_its_brightness():
    values = np.random.default_rng(1).integers(0, 65536, (64, 96, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.abs(loaded(png(96, 64, 16, 2, rows)) - values / 257).max() <= 1


def test_16_bit_grey_with_a_transparent_value_is_white_there():
    values = np.full((64, 96), 30000, dtype=np.uint16)
    values[:, :48] = 77
    found = loaded(encoded(Image.fromarray(values), "PNG", transparency=77))
    assert (found[:, :48] == 255).all() and np.abs(found[:, 48:] - 30000 / 257).max() <= 1


def test_cmyk_is_converted():
    image = Image.new("CMYK", (96, 64), (0, 255, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 48, 64))
    for content, tolerance in ((encoded(image, "TIFF"), 0), (encoded(image, "JPEG", quality=100), 4)):
        found = loaded(content)
        assert np.abs(found[:, 60:] - (255, 0, 0)).max() <= tolerance
        assert np.abs(found[:, :36] - (0, 0, 0)).max() <= tolerance


# Colour profiles

SRGB_TO_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
ADOBE_TO_XYZ = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
"""Relative to D50, as in profiles (Lindbloom)."""  # fmt: skip


def profile(matrix: np.ndarray, gamma: float, name: str) -> bytes:
    """An ICC v2 display profile of primaries and one gamma."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + len(text).to_bytes(4, "big") + text + bytes(12 + 67 - 1),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1.0, 0.8249))),
    }
    for index, colour in enumerate(b"rgb"):
        tags[bytes([colour]) + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, matrix[:, index]))
        tags[bytes([colour]) + b"TRC"] = b"curv\0\0\0\0\0\0\0\1" + round(gamma * 256).to_bytes(2, "big")
    table, body = len(tags).to_bytes(4, "big"), b""
    start = 128 + 4 + 12 * len(tags)
    for key, data in tags.items():
        table += key + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data + bytes(-len(data) % 4)
    header = (
        bytes(4) + b"none" + struct.pack(">I", 0x02100000) + b"mntrRGB XYZ " + struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    )
    header += b"acsp" + bytes(28) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    content = header + bytes(128 - len(header)) + table + body
    return len(content).to_bytes(4, "big") + content[4:]


def as_srgb(colour: tuple[int, int, int], matrix: np.ndarray, gamma: float) -> np.ndarray:
    """The same colour in sRGB, by the textbook."""
    linear = np.linalg.solve(SRGB_TO_XYZ, matrix @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curved


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colour", [(200, 60, 60), (100, 150, 90), (120, 120, 120), (255, 255, 255)])
def test_a_wide_gamut_picture_is_converted_to_srgb(kind: str, colour: tuple[int, int, int]):
    wide = profile(ADOBE_TO_XYZ, 563 / 256, "Wide RGB")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = loaded(encoded(Image.new("RGB", (64, 64), colour), kind, icc_profile=wide, **options))
    assert np.abs(found[32, 32] - as_srgb(colour, ADOBE_TO_XYZ, 563 / 256)).max() <= 2
    if colour == (200, 60, 60):
        assert found[32, 32, 0] > 215  # without conversion 200


def test_a_transparent_wide_gamut_picture_is_converted_and_white():
    image = Image.new("RGBA", (64, 64), (200, 60, 60, 255))
    image.paste((0, 255, 0, 0), (0, 0, 32, 64))
    found = loaded(encoded(image, "PNG", icc_profile=profile(ADOBE_TO_XYZ, 2.2, "Wide RGB")))
    assert (found[:, :32] == 255).all()
    assert np.abs(found[0, 40] - as_srgb((200, 60, 60), ADOBE_TO_XYZ, 563 / 256)).max() <= 2


def test_a_linear_profile_is_converted_although_it_calls_itself_srgb():
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
def test_a_broken_profile_is_ignored_as_viewers_do(broken: bytes):
    assert (loaded(encoded(noise(), "PNG", icc_profile=broken)) == np.asarray(noise())).all()


def test_a_colour_profile_on_a_grey_picture_is_no_reason_to_fail():
    grey = gradient().convert("L")
    found = loaded(encoded(grey, "PNG", icc_profile=profile(ADOBE_TO_XYZ, 2.2, "Wide RGB")))
    assert (found == np.asarray(grey)[..., None]).all()


# Refused


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_picture_that_was_cut_off_is_refused(kind: str, share: float):
    content = encoded(noise(), kind)
    assert (loaded(content) >= 0).all()
    text = refusal(content[: int(len(content) * share)])
    assert text.startswith("damaged or cut off (") and text.endswith("; export it again or remove it")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page or SVG, not a picture"),
        (b"\n<html>", "a web page or SVG, not a picture"),
        (b"<?xml version='1.0'?><svg/>", "a web page or SVG, not a picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer, not the picture itself"),
        (encoded(gradient(), "GIF"), "a GIF"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF or HEIC picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an AVIF or HEIC picture"),
        (b"just text", "not a picture, or one that is damaged"),
        (bytes(1000), "not a picture, or one that is damaged"),
        (encoded(gradient(), "PNG")[8:], "not a picture, or one that is damaged"),
    ],
)
def test_other_files_are_refused_by_what_they_are(content: bytes, what: str):
    assert refusal(content) == f"{what}; replace it by a JPEG, PNG, WebP, BMP or TIFF, or remove it"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("frames", [2, 5])
def test_animations_are_refused_with_their_frames(kind: str, frames: int):
    all_frames = [noise(seed=number) for number in range(frames)]
    content = encoded(all_frames[0], kind, save_all=True, append_images=all_frames[1:])
    assert refusal(content) == f"animated ({frames} frames); export one frame of it"


def test_a_phones_multi_picture_jpeg_is_its_first_picture():
    content = encoded(gradient(), "MPO", save_all=True, append_images=[noise(96, 64)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.abs(loaded(content) - np.asarray(gradient())).mean() < 6


@pytest.mark.parametrize(("side", "size"), [(20_000, ""), (10_001, "10001x10001 px is ")])
def test_too_many_pixels_are_refused_before_any_is_decoded(side: int, size: str):
    rows = zlib.compress(b"cut off anyway")
    assert refusal(png(side, side, 8, 2, rows)) == f"{size}over 100 megapixels; scale it down"


def test_exactly_too_many_pixels():
    assert "megapixels" not in refusal(png(10_000, 10_000, 8, 2, b""))
    assert "megapixels" in refusal(png(10_000, 10_001, 8, 2, b""))


def test_a_text_that_unpacks_to_megabytes_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000)))
    rows = (b"\0" + bytes(64 * 3)) * 64
    assert (loaded(png(64, 64, 8, 2, rows)) == 0).all()
    assert refusal(png(64, 64, 8, 2, rows, bomb)).startswith("damaged or cut off (Decompressed data too large")


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_numbers_without_an_agreed_range_are_refused(mode: str, dtype: type):
    image = Image.fromarray(np.full((64, 64), 0.5 if mode == "F" else 70_000, dtype=dtype))
    assert refusal(encoded(image, "TIFF")) == f"pixels of mode {mode} have no agreed range; export it as 8 or 16 bit"


def test_other_colour_spaces_are_refused():
    assert refusal(encoded(Image.new("LAB", (64, 64)), "TIFF")) == "pixels of mode LAB are not read; export it as RGB"


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (63, 500), (500, 63), (1, 5000)])
def test_small_pictures_are_refused_with_their_size(size: tuple[int, int]):
    text = refusal(encoded(Image.new("RGB", size), "PNG"))
    assert text == f"{size[0]}x{size[1]} px is under 64 px; use a larger picture or remove it"


def test_the_smallest_picture_is_fine():
    assert loaded(encoded(Image.new("RGB", (64, 64)), "PNG")).shape == (64, 64, 3)


@pytest.mark.parametrize("mode", images.MODES)
def test_every_mode_that_is_let_in_can_be_converted(mode: str):
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
def test_damaged_bytes_are_a_picture_or_a_refusal(content: bytes, changes: list[tuple[int, int]], share: float):
    damaged = bytearray(content)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    if share < 0.3:
        del damaged[int(len(damaged) * share) :]
    try:
        assert images.load(NAME, bytes(damaged)).mode == "RGB"
    except DataError as error:
        assert str(error).startswith(f"{NAME}: ")
