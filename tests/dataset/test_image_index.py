"""What is remembered of images: nothing is decoded twice, nothing stale is believed, near duplicates are found."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_train import mini
from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import image_index, images
from zimage_train.dataset.image_index import ImageIndex, ImageInfo, near_duplicates
from zimage_train.dataset.scan import scan_entry
from zimage_train.errors import DataError, Note


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
        lambda memo: memo.write_text(json.dumps({"format": image_index.FORMAT, "looks": 5})),
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
        known[image_index._key(path)] = [f"{number:064x}", 96, 96, thumbnail]
    (tmp_path / "memo.json").write_text(json.dumps({"format": image_index.FORMAT, "looks": known}))
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
