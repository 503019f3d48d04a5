"""Faults in the dataset: a bad image or caption is named before anything is trained, and none is passed over."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from zimage_train import mini
from zimage_train.commands.train import fill_run_caches, run_training
from zimage_train.dataset import captions, encoding
from zimage_train.errors import DataError, Note
from zimage_train.planning import preflight
from zimage_train.report.metrics import read_records

from dataset_folder import image, problems, prompts, scanned
from helpers import folder, losses
from image_files import (
    ADOBE_TO_XYZ,
    HIDDEN,
    as_srgb,
    chunk,
    encoded,
    gradient,
    loaded,
    noise,
    png,
    profile,
    refusal,
    with_hole,
)
from injection import fail_at

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_image_cut_off(kind: str, share: float):
    """10. A JPEG, PNG, WebP, BMP or TIFF that was cut off is refused by name, and never trained on half grey."""
    content = encoded(noise(), kind)
    assert (loaded(content) >= 0).all()
    cut = content[: int(len(content) * share)]
    assert 0 < len(cut) < len(content)
    text = refusal(cut)
    assert text.startswith("damaged or cut off (") and text.endswith("; export it again or remove it")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page or SVG, not an image"),
        (b"\n<html>", "a web page or SVG, not an image"),
        (b"<?xml version='1.0'?><svg/>", "a web page or SVG, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer, not the image itself"),
        (encoded(gradient(), "GIF"), "a GIF"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF or HEIC image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an AVIF or HEIC image"),
        (b"just text", "not an image, or one that is damaged"),
        (bytes(1000), "not an image, or one that is damaged"),
        (encoded(gradient(), "PNG")[8:], "not an image, or one that is damaged"),
    ],
)
def test_image_of_another_file_type(content: bytes, what: str):
    """11. An empty file, a web page, a Git LFS pointer, a GIF or an AVIF under another name is called what it is."""
    assert refusal(content) == f"{what}; replace it by a JPEG, PNG, WebP, BMP or TIFF, or remove it"


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
"""EXIF orientation -> what the camera did to the upright image before it stored it."""


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_image_orientations(kind: str, orientation: int):
    """12. EXIF orientation 1 to 8: whichever way the camera held it, an image is trained upright."""
    turn = STORED_AS[orientation]
    stored = gradient() if turn is None else gradient().transpose(turn)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    content = encoded(stored, kind, exif=exif, **options)
    assert Image.open(io.BytesIO(content)).getexif()[0x112] == orientation
    found = loaded(content)
    assert found.shape == (64, 96, 3)
    assert abs(found - np.asarray(gradient())).max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP"), ("LA", "PNG"), ("LA", "TIFF")]
)
def test_transparency_becomes_white(mode: str, kind: str):
    """13. Transparent parts become white; the colour that an editor hid beneath them is never trained on."""
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = loaded(encoded(with_hole(mode), kind, **options))
    assert (found[:, :48] == 255).all()
    assert (found[:, 48:] == ((0, 0, 255) if mode == "RGBA" else (90, 90, 90))).all()


def test_transparency_hides_a_colour():
    """13. Check: a plain conversion would show the hidden colour: it is really in these files."""
    image = Image.open(io.BytesIO(encoded(with_hole("RGBA"), "PNG"))).convert("RGB")
    assert image.getpixel((0, 0)) == HIDDEN


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "P with alpha of each entry"])
def test_transparency_by_palette_or_colour(mode: str):
    """13. A palette entry or a colour that stands for transparent becomes white too."""
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


def test_16_bit_grey_keeps_its_brightness():
    """14. A 16-bit grey image keeps its brightness; Pillow's own conversion makes it almost white."""
    values = np.linspace(0, 65535, 96 * 64).astype(np.uint16).reshape(64, 96)
    little, big = (Image.fromarray(values), Image.frombytes("I;16B", (96, 64), values.astype(">u2").tobytes()))
    for content in (encoded(little, "PNG"), encoded(little, "TIFF"), encoded(big, "TIFF")):
        assert np.abs(loaded(content) - (values / 257)[..., None]).max() <= 1
    naive = np.asarray(Image.open(io.BytesIO(encoded(little, "PNG"))).convert("RGB"))
    assert naive.mean() > 250  # what is guarded against


def test_16_bit_colour_keeps_its_brightness():
    """14. A 16-bit colour image keeps its brightness."""
    values = np.random.default_rng(1).integers(0, 65536, (64, 96, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.abs(loaded(png(96, 64, 16, 2, rows)) - values / 257).max() <= 1


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_image_without_an_agreed_range(mode: str, dtype: type):
    """15. Pixels of floating point or 32 bits, whose range nobody agreed on, are refused with their mode."""
    image = Image.fromarray(np.full((64, 64), 0.5 if mode == "F" else 70_000, dtype=dtype))
    assert refusal(encoded(image, "TIFF")) == f"pixels of mode {mode} have no agreed range; export it as 8 or 16 bit"


def test_cmyk_is_converted():
    """15. CMYK images are converted to the colours that they show."""
    image = Image.new("CMYK", (96, 64), (0, 255, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 48, 64))
    for content, tolerance in ((encoded(image, "TIFF"), 0), (encoded(image, "JPEG", quality=100), 4)):
        found = loaded(content)
        assert np.abs(found[:, 60:] - (255, 0, 0)).max() <= tolerance
        assert np.abs(found[:, :36] - (0, 0, 0)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colour", [(200, 60, 60), (100, 150, 90), (120, 120, 120), (255, 255, 255)])
def test_image_of_wide_gamut(kind: str, colour: tuple[int, int, int]):
    """16. A wide-gamut image is converted to sRGB by its profile, and keeps its saturation."""
    wide = profile(ADOBE_TO_XYZ, 563 / 256, "Wide RGB")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = loaded(encoded(Image.new("RGB", (64, 64), colour), kind, icc_profile=wide, **options))
    assert np.abs(found[32, 32] - as_srgb(colour, ADOBE_TO_XYZ, 563 / 256)).max() <= 2
    if colour == (200, 60, 60):
        assert found[32, 32, 0] > 215  # without conversion 200


@pytest.mark.parametrize(("side", "size"), [(20_000, ""), (10_001, "10001x10001 px is ")])
def test_image_of_too_many_pixels(monkeypatch, side: int, size: str):
    """17. An image of more than 100 megapixels is refused by its header, before any memory is taken for it."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    rows = zlib.compress(b"cut off anyway")
    assert refusal(png(side, side, 8, 2, rows)) == f"{size}over 100 megapixels; scale it down"


def test_exactly_too_many_pixels():
    """17. 100 megapixels are the limit, and one row more is over it."""
    assert "megapixels" not in refusal(png(10_000, 10_000, 8, 2, b""))
    assert "megapixels" in refusal(png(10_000, 10_001, 8, 2, b""))


def test_image_with_a_huge_comment():
    """17. A PNG whose comment unpacks to megabytes is refused."""
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000)))
    rows = (b"\0" + bytes(64 * 3)) * 64
    assert (loaded(png(64, 64, 8, 2, rows)) == 0).all()
    assert refusal(png(64, 64, 8, 2, rows, bomb)).startswith("damaged or cut off (Decompressed data too large")


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (63, 500), (500, 63), (1, 5000)])
def test_image_too_small(size: tuple[int, int]):
    """18. An image with a side under 64 px is refused with its size."""
    text = refusal(encoded(Image.new("RGB", size), "PNG"))
    assert text == f"{size[0]}x{size[1]} px is under 64 px; use a larger image or remove it"


def test_image_below_the_resolution(make_config, tmp_path: Path):
    """18. An image smaller than a listed resolution is trained at its own size, never blown up, and that is said."""
    Image.new("RGB", (80, 64)).save(tmp_path / "small.png")
    checked = preflight.check_run(make_config(data=[{"folder": str(tmp_path), "resolution": [1024]}]))
    assert [tuple(item.size) for item in checked.items] == [(80, 64)]
    note = checked.notes[-1]
    assert note.code == "smaller-than-resolution" and note.text.startswith("smaller than 1024x1024 px, so trained")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("frames", [2, 5])
def test_image_animated(kind: str, frames: int):
    """19. An animated PNG, WebP or a TIFF of several pages is refused with the number of its frames."""
    all_frames = [noise(seed=number) for number in range(frames)]
    content = encoded(all_frames[0], kind, save_all=True, append_images=all_frames[1:])
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == frames
    assert refusal(content) == f"animated ({frames} frames); export one frame of it"


def test_image_of_a_phone_mpo():
    """19. A phone's multi-picture JPEG (MPO) is its first image, the photo."""
    content = encoded(gradient(), "MPO", save_all=True, append_images=[noise(96, 64)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.abs(loaded(content) - np.asarray(gradient())).mean() < 6


@pytest.fixture
def file(tmp_path: Path):
    """`file(content)`: a caption file."""

    def make(content: bytes) -> Path:
        path = tmp_path / "a.txt"
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a red car", "a red car"),
        (b"  a red car\n\n", "a red car"),
        (b"\xef\xbb\xbfa red car", "a red car"),
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree"),
        ("café, 猫, 😀".encode(), "café, 猫, 😀"),
        ("a\u200bb\ufeffc\u2060d".encode(), "abcd"),
        ("\u200b\u200d\n".encode(), ""),
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        (b"a\tb  c", "a\tb  c"),
        (b"x" * 20_000, "x" * 20_000),
    ],
)
def test_caption_is_cleaned(file, content: bytes, text: str):
    """20. Byte order marks, Windows line ends and zero-width characters are taken out of captions, and nothing else."""
    assert captions.read_caption(file(content)) == text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("café".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("\ufeffcafé".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ("café".encode("latin-1"), "is not UTF-8 (byte 3); save it as UTF-8"),
        (b"\xef\xbb\xbfok \xff", "is not UTF-8 (byte"),
        (b"a\0b", "contains NUL bytes, so it is not a text"),
        ("a red car".encode("utf-16-le"), "contains NUL bytes, so it is not a text"),
        (b"x" * 20_001, "has 20001 bytes; captions end at 512 tokens; shorten it"),
    ],
)
def test_caption_that_is_no_text(file, content: bytes, what: str):
    """20. A caption in UTF-16 or Latin-1, with NUL bytes or beyond all length is refused by its file and byte."""
    path = file(content)
    with pytest.raises(DataError) as caught:
        captions.read_caption(path)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"{path}: {what}")


def test_caption_missing(photos: Path):
    """21. Images without a caption, or with an invisible caption, are counted and named."""
    (photos / "a.txt").unlink()
    (photos / "b.txt").write_text("\ufeff \n")
    result = scanned(photos)
    assert prompts(result) == {"a.jpg": "", "b.png": "", "c.webp": "caption c"}
    alone = "so they are trained on ''"
    todo = "write captions or set default_caption"
    said = f"data.0: 2 of 3 images have no caption of their own (a.jpg, b.png), {alone}; {todo}"
    assert result.notes == [Note("no-caption", said)]
    (note,) = scanned(photos, trigger="zorb").notes  # a trigger in front of nothing is no caption
    assert note.code == "no-caption" and "trained on 'zorb' alone" in note.text
    unread, note = scanned(photos, trigger="zorb", caption_ext=".caption").notes
    assert "3 of 3 images" in note.text
    said = (
        f"{photos}: 2 files, such as b.txt: not read, though it looks like captions; to use them, set caption_ext: .txt"
    )
    assert unread == Note("unread-captions", said)
    assert scanned(photos, default_caption="a thing").notes == []
    for name in ("d.png", "e.png"):
        image(photos / name, (9, 9, ord(name[0])))
    assert "4 of 5 images have no caption of their own (a.jpg, b.png, d.png, ...)" in scanned(photos).notes[0].text


def test_caption_too_long(photos: Path):
    """20. A caption of surely more than 512 tokens is named with its length; nothing of it is lost silently."""
    (photos / "b.txt").write_text("a blue circle, " * 130)
    (note,) = scanned(photos).notes
    assert note.code == "long-caption"
    assert note.text.startswith(f"{photos / 'b.png'}: its caption has 520 words and signs")


def test_unused_captions_and_images(photos: Path):
    """21. A caption named .TXT and an image in a format that is not read are said, and not left out silently."""
    (photos / "b.txt").rename(photos / "b.TXT")
    (photos / "x.gif").write_bytes(b"GIF89a")
    (photos / "y.heic").write_bytes(b"")
    (photos / "notes.md").write_text("anything")
    notes = scanned(photos, default_caption="d").notes
    assert notes[0] == Note("unused-caption", f"{photos / 'b.TXT'}: not read, its extension is not exactly .txt")
    assert [one.code for one in notes[1:]] == ["unused-image", "unused-image"]
    assert [one.text.split(": ")[0] for one in notes[1:]] == [str(photos / "x.gif"), str(photos / "y.heic")]


def test_two_images_of_one_name(tmp_path: Path):
    """21. a.jpg and a.png without a caption between them are two images."""
    image(tmp_path / "a.png", (1, 1, 1))
    image(tmp_path / "a.jpg", (2, 2, 2))
    result = scanned(tmp_path, default_caption="x")
    assert (prompts(result), problems(result)) == ({"a.jpg": "x", "a.png": "x"}, [])


def test_caption_of_another_normalization(tmp_path: Path):
    """21. A caption whose accents are stored another way than its image's (as macOS does) is said to be alone."""
    name = "caf\u00e9"
    assert unicodedata.normalize("NFD", name) != name
    image(tmp_path / f"{name}.png")
    (tmp_path / f"{unicodedata.normalize('NFD', name)}.txt").write_text("a caption")
    if len(list(tmp_path.iterdir())) != 2 or (tmp_path / f"{name}.txt").exists():
        pytest.skip("this file system takes the two spellings for one")
    result = scanned(tmp_path)
    assert prompts(result) == {f"{name}.png": ""}
    alone, without = result.notes
    assert (alone.code, without.code) == ("unused-caption", "no-caption")
    assert f"1 of 1 images have no caption of their own ({name}.png)" in without.text


def test_broken_links_and_pipes(photos: Path):
    """22. A link that leads nowhere or to itself, a pipe and a socket are listed, and never waited for."""
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    os.mkfifo(photos / "pipe.png")
    (photos / "c.txt").symlink_to(photos / "nothing.txt")
    image(photos / "c.png", (9, 9, 9))
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(photos):  # a socket's path has to be short
        server.bind("sock.png")
        result = scanned(photos)
    found = problems(result)
    assert [Path(one.split(": ")[0]).name for one in sorted(found)] == [
        "c.txt",
        "gone.png",
        "loop.png",
        "pipe.png",
        "sock.png",
    ]
    assert len(result.images) == 4  # c.png is read; its caption is the error


def test_hidden_files_and_linked_folders(photos: Path):
    """22. A linked folder could lead out of the data or round in circles: it is not searched, and a note says so."""
    for name in (".hidden.png", ".thumbs/t.png", "_rejected/r.png"):
        image(photos / name)
    (photos / "link").symlink_to(photos / "sub", target_is_directory=True)
    result = scanned(photos)
    assert len(result.images) == 3
    assert [one.code for one in result.notes] == ["not-searched", "not-searched"]
    assert [one.text.split(": ")[0] for one in result.notes] == [str(photos / "_rejected"), str(photos / "link")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_an_error(photos: Path):
    """22. What may not be read is listed: an image, a caption, a folder."""
    (photos / "a.jpg").chmod(0)
    (photos / "b.txt").chmod(0)
    (photos / "sub").chmod(0)
    try:
        found = problems(scanned(photos))
    finally:
        (photos / "sub").chmod(0o755)
    assert sum("Permission denied" in one for one in found) == 3


def test_subfolder_not_listable(photos: Path, monkeypatch: pytest.MonkeyPatch):
    """22. A subfolder that cannot be listed is an error, not an empty folder."""
    real = os.scandir

    def scandir(path: str):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result = scanned(photos)
    assert len(result.images) == 2
    assert problems(result) == [f"{photos / 'sub'}: cannot be read (Permission denied); check its permissions"]


@pytest.mark.parametrize(("nth_read", "images"), [(2, 3), (5, 2)], ids=["caption", "picture"])
def test_file_not_readable(photos: Path, nth_read: int, images: int):
    """22. A caption or image that the disk does not give out is listed with the reason, and the others are read."""
    with fail_at("read", nth_read, PermissionError(13, "Permission denied")) as fault:
        found = scanned(photos)
    assert fault.fired == 1
    assert len(found.images) == images
    assert [one.split(": ", 1)[1] for one in problems(found)] == ["cannot be read (Permission denied); check the file"]


def test_nothing_at_all_is_an_error(tmp_path: Path):
    """23. A folder without images is refused, with the extensions that are looked for."""
    (tmp_path / "a.txt").write_text("x")
    (found,) = problems(scanned(tmp_path))
    assert found.startswith(f"data.0: {tmp_path}: holds no images; put images there (.bmp, .jpeg, .jpg, .png")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 64), (96, 64), (64, 64)]], ids=["one image", "a size of one"])
def test_fewer_images_than_a_batch(make_config, tmp_path: Path, sizes):
    """23. A single image, or the only image of its size, makes a smaller batch; each image trains once an epoch."""
    for number, size in enumerate(sizes):
        image(tmp_path / "photos" / f"{number}.png", (number, 0, 0), size)
    data = [{"folder": str(tmp_path / "photos"), "resolution": [64], "default_caption": "x"}]
    per_epoch = len(set(sizes))  # the images of a batch have equal sizes
    config = make_config(data=data, train={"steps": 2 * per_epoch, "batch_size": 4})
    run_training(config, fresh=False)
    records = read_records(folder(config) / "metrics.jsonl")
    epochs = [records[:per_epoch], records[per_epoch:]]
    samples = [sorted(name for record in epoch for name in record["samples"]) for epoch in epochs]
    assert samples == [[f"{number}.png@64" for number in range(len(sizes))]] * 2
    assert all(loss > 0 for loss in losses(config))


class Reordered:
    """What os.scandir returns, in another order."""

    def __init__(self, entries: list[os.DirEntry]) -> None:
        self.entries = iter(entries)

    def __enter__(self) -> "Reordered":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[os.DirEntry]:
        return self.entries

    def __next__(self) -> os.DirEntry:
        return next(self.entries)


def test_directory_order_changes_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch):
    """24. The order in which the file system lists images changes neither their order nor anything else."""
    image(photos / "sub" / "deep" / "d.png")
    image(photos / "sub2" / "e.png")
    (photos / "broken.png").write_text("x")
    (photos / "alone.txt").write_text("no image")
    (photos / "_left" / "x").mkdir(parents=True)
    real = os.scandir
    results, orders = [], []
    for order in (lambda one: one.name, lambda one: one.name[::-1], lambda one: hash(one.name)):
        for reverse in (False, True):

            def scandir(path: str, order: Callable = order, reverse: bool = reverse) -> Reordered:
                with real(path) as entries:
                    found = sorted(entries, key=order, reverse=reverse)
                orders.append([one.name for one in found])
                return Reordered(found)

            monkeypatch.setattr(os, "scandir", scandir)
            result = scanned(photos)
            results.append((result.images, problems(result), sorted(map(str, result.notes))))
    assert all(one == results[0] for one in results) and len(results[0][0]) == 5
    assert len({tuple(order) for order in orders if "a.jpg" in order}) > 2, "the order was really changed"


WHAT_IS_TRAINED = """
from pathlib import Path
from zimage_train.config.schema import Config
from zimage_train.dataset.scan import dataset_fingerprint, scan_entry
from zimage_train.dataset.sample_order import make_items, make_sample_order
values = {"name": "a", "data": [{"folder": "photos", "resolution": [64], "caption_dropout": 0.5}]}
config = Config.model_validate(values)
images = [scan_entry(config.data[0], "data.0").images]
plan = make_sample_order(config, make_items(config, images))
print(dataset_fingerprint(images))
print([(sample.key(), sample.prompt) for step in range(1, 20) for batch in plan.step_batches(step) for sample in batch])
"""


@pytest.mark.slow
def test_environment_changes_nothing(photos: Path):
    """24. Another locale, time zone and hash seed change neither the dataset's fingerprint nor the training order."""
    (photos / "caf\u00e9.txt").write_text("caf\u00e9")
    image(photos / "caf\u00e9.png", (7, 7, 7))
    environments = ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "Asia/Tokyo"})
    found = [
        subprocess.run(
            [sys.executable, "-c", WHAT_IS_TRAINED],
            cwd=photos.parent,
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for environment in environments
    ]
    assert found[0] == found[1] and "caf" in found[0] and "''" in found[0]  # some captions are dropped


def swap(path: Path) -> None:
    path.write_bytes((mini.IMAGES / "zorb_07.png").read_bytes())


@pytest.mark.parametrize(
    ("change", "what"), [(swap, "changed while this command ran"), (Path.unlink, "cannot be read any")]
)
def test_image_changes_during_the_command(make_config, tmp_path, monkeypatch, change, what: str):
    """25. An image that is replaced or deleted between the check and its encoding is named, and the run ends."""
    image(tmp_path / "photos" / "a.png")
    data = [{"folder": str(tmp_path / "photos"), "resolution": [64], "default_caption": "x"}]
    config = make_config(data=data, cache={"folder": str(tmp_path / "cache")})
    original, changed = encoding.image_encoder, []

    def encoder(*args):
        changed.append(change(tmp_path / "photos" / "a.png"))
        return original(*args)

    monkeypatch.setattr(encoding, "image_encoder", encoder)
    with pytest.raises(DataError, match=rf"a\.png: {what}") as error:
        fill_run_caches(config)
    assert error.value.exit_code == 3 and len(changed) == 1


def test_all_faults_are_reported_at_once(photos: Path):
    """26. A cut-off image, a bad caption, a shared caption and a web page in one folder: all are listed at once."""
    content = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(content[: len(content) // 2])
    (photos / "a.txt").write_bytes("é".encode("latin-1"))
    image(photos / "twin.png", (1, 1, 1))
    image(photos / "twin.jpg", (2, 2, 2))
    (photos / "twin.txt").write_text("whose?")
    (photos / "page.png").write_text("<html>")
    (photos / "alone.txt").write_text("x")
    result = scanned(photos)
    found = problems(result)
    assert len(found) == 4
    assert sum("b.png: damaged or cut off" in one for one in found) == 1
    assert f"{photos / 'a.txt'}: is not UTF-8 (byte 0); save it as UTF-8" in found
    assert f"{photos / 'twin.txt'}: belongs to several images (twin.jpg, twin.png); rename all but one" in found
    assert sum("page.png: a web page" in one for one in found) == 1
    assert all(error.exit_code == 3 for error in result.errors)
    assert result.notes[0] == Note("unused-caption", f"{photos / 'alone.txt'}: a caption without an image")
