"""Every image file becomes the RGB image that its owner sees, or is refused with a reason; none is decoded twice."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from zimage_train import mini
from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import images
from zimage_train.dataset.images import ImageIndex, ImageInfo, near_duplicates
from zimage_train.dataset.scan import scan_entry
from zimage_train.errors import DataError, Note

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


# The index: nothing is decoded twice, nothing stale is believed


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were decoded."""
    names: list[str] = []
    original = images.load

    def load(path: Path, content: bytes) -> Image.Image:
        names.append(path.name)
        return original(path, content)

    monkeypatch.setattr(images, "load", load)
    return names


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    (tmp_path / "photos").mkdir()
    found = sorted(mini.IMAGES.glob("*.[jp][pn]g"))[:4]
    return [Path(shutil.copy(path, tmp_path / "photos")) for path in found]


def look_again(memo: Path, photos: list[Path]) -> list:
    seen = ImageIndex(memo)
    found = seen.lookup(photos, silent)
    seen.save()
    return found


def test_known_images_are_not_decoded(tmp_path: Path, photos: list[Path], decoded: list[str]):
    """An image that was seen before is not decoded again."""
    first = look_again(tmp_path / "memo.json", photos)
    assert sorted(decoded) == sorted(path.name for path in photos)
    assert look_again(tmp_path / "memo.json", photos) == first
    assert len(decoded) == len(photos)


def test_changed_image_is_decoded(tmp_path, photos, decoded):
    """A changed image is decoded again, even with its old time and size."""
    first = look_again(tmp_path / "memo.json", photos)
    before = photos[0].stat()
    content = bytearray(photos[0].read_bytes())
    other = Image.open(photos[0]).convert("RGB").transpose(Image.Transpose.ROTATE_180)
    other.save(photos[0])
    photos[0].write_bytes(photos[0].read_bytes().ljust(len(content), b"\0"))
    os.utime(photos[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    decoded.clear()
    again = look_again(tmp_path / "memo.json", photos)
    assert decoded == [photos[0].name] and again[0].digest != first[0].digest and again[1:] == first[1:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda memo: memo.write_text("{"),
        lambda memo: memo.write_text("[]"),
        lambda memo: memo.write_text(json.dumps({"format": 0, "looks": {}})),
        lambda memo: memo.write_text(json.dumps({"format": images.INDEX_FORMAT, "looks": 5})),
        lambda memo: memo.write_text(memo.read_text().replace('", ', '", "x", ')),
        lambda memo: memo.write_text(memo.read_text().replace('"]', 'zz"]')),
        lambda memo: memo.write_bytes(b"\xff\xfe"),
        lambda memo: (memo.unlink(), memo.mkdir()),
    ],
)
def test_a_spoilt_memo_is_no_memo(tmp_path: Path, photos: list[Path], decoded: list[str], spoil):
    first = look_again(tmp_path / "memo.json", photos)
    spoil(tmp_path / "memo.json")
    assert look_again(tmp_path / "memo.json", photos) == first
    assert len(decoded) == 2 * len(photos)


def test_a_bad_image_is_told_every_time(tmp_path: Path, photos: list[Path]):
    photos[1].write_bytes(b"no image")
    for _ in range(2):
        found = look_again(tmp_path / "memo.json", photos)
        assert [type(one) for one in found] == [ImageInfo, DataError, ImageInfo, ImageInfo]


@pytest.mark.slow
def test_index_of_ten_thousand_images(tmp_path: Path):
    """Ten thousand known images take seconds."""
    folder = tmp_path / "many"
    folder.mkdir()
    content = Path(min(mini.IMAGES.glob("*.png"))).read_bytes()
    known, rng = {}, np.random.default_rng(0)
    for number in range(10_000):
        path = folder / f"{number:05d}.png"
        path.write_bytes(content)
        thumbnail = rng.integers(0, 256, 192, dtype=np.uint8).tobytes().hex()
        known[images._file_key(path)] = [f"{number:064x}", 96, 96, thumbnail]
    (tmp_path / "memo.json").write_text(json.dumps({"format": images.INDEX_FORMAT, "looks": known}))
    start = time.monotonic()
    found = scan_entry(DataEntry(folder=str(folder), default_caption="x"), "data.0", ImageIndex(tmp_path / "memo.json"))
    assert len(found.images) == 10_000 and found.errors == [] and found.notes == []
    assert time.monotonic() - start < 30, "seconds; this bound is for a crowded machine"


# Nearly the same


def thumbnail(image: Image.Image, path: Path, **options) -> str:
    image.save(path, **options)
    (look,) = ImageIndex().lookup([path], silent)
    assert isinstance(look, ImageInfo)
    return look.thumbnail


def test_thumbnails_find_rescaled_images(tmp_path: Path):
    """An image saved again or scaled is a near duplicate, and other images are not."""
    found = []
    for path in sorted(mini.IMAGES.glob("*.[jp][pn]g")):
        image = Image.open(path).convert("RGB")
        larger = image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS)
        found.append(thumbnail(image, tmp_path / "a.png"))
        found.append(thumbnail(image, tmp_path / "a.jpg", quality=60))
        found.append(thumbnail(larger, tmp_path / "b.webp", quality=80))
    expected = [(first, first + other) for first in range(0, len(found), 3) for other in (1, 2)]
    assert near_duplicates(found) == expected
    assert near_duplicates([]) == []


def test_near_duplicates_by_mean_square():
    """Near duplicates are found by the mean square, wherever they are in the list."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(20, 230, (2500, 192)).astype(int)
    pixels[2400] = pixels[7] + 3  # root mean square 3
    pixels[2401] = pixels[8] + 5
    assert near_duplicates([bytes(row.astype(np.uint8)).hex() for row in pixels]) == [(7, 2400)]


def test_a_scan_notes_near_duplicates(photos: list[Path]):
    Image.open(photos[0]).convert("RGB").save(photos[0].with_name("again.jpg"), quality=70)
    found = scan_entry(DataEntry(folder=str(photos[0].parent), default_caption="x"), "data.0")
    said = f"{photos[0]}: nearly the same image as {photos[0].with_name('again.jpg')}"
    assert found.notes == [Note("similar-image", said)]
