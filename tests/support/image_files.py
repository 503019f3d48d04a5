"""Image files of every kind, made in memory, and what the program makes of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_train.dataset import images
from zimage_train.errors import DataError

NAME = Path("photos/a.png")


HIDDEN = (255, 0, 0)
"""The colour of fully transparent pixels in these tests; it may never be seen."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 160, height: int = 96, seed: int = 0) -> Image.Image:
    """An image that does not compress, so that a cut goes through its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def with_hole(mode: str) -> Image.Image:
    """Blue (or dark grey), with a transparent left half whose hidden colour is red (or black)."""
    if mode == "LA":
        image = Image.new("LA", (96, 64), (90, 255))
        image.paste((0, 0), (0, 0, 48, 64))
    else:
        image = Image.new("RGBA", (96, 64), (0, 0, 255, 255))
        image.paste((*HIDDEN, 0), (0, 0, 48, 64))
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SRGB_TO_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


ADOBE_TO_XYZ = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
"""Relative to D50, as in profiles (Lindbloom)."""  # fmt: skip


def profile(matrix: np.ndarray, gamma: float, name: str) -> bytes:
    """An ICC v2 display profile of primaries and a single gamma."""

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
