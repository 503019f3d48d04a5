"""What an image file holds, found by decoding it once and remembered: digest, upright size and a tiny thumbnail."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from zimage_train.dataset import images
from zimage_train.errors import DataError, DiskError, Problem, ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.progress import Progress

FORMAT = 1
"""Raised when images are decoded in another way, so that what is remembered is not used."""
THUMBNAIL_PX = 8
NEARLY_THE_SAME = 4.0
"""Root mean square difference of two thumbnails, of 255: the same image saved again or scaled has less."""

HEX = re.compile("[0-9a-f]+")


@dataclass(frozen=True)
class ImageInfo:
    """An image as far as it matters before it is encoded."""

    digest: str
    width: int
    height: int
    thumbnail: str
    """8 x 8 RGB, in hexadecimal."""


class ImageIndex:
    """Looks by place, size and times of change, in one JSON file; without a file nothing is remembered."""

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo
        self._known: dict[str, ImageInfo] = {}
        self._has_news = False
        if memo is not None:
            self._known = _remembered(memo)

    def lookup(self, paths: Iterable[Path], tick: Progress) -> list[ImageInfo | ZImageTrainError]:
        """The look of every path, in order, or why it is no image; decoded on all cores."""
        wanted, found = list(paths), []
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            for number, look in enumerate(workers.map(self._attempt, wanted), 1):
                found.append(look)
                tick("checking images", number, len(wanted))
        return found

    def save(self) -> None:
        """Keep what was seen for the next time; a memo that cannot be written is no reason to fail."""
        if self._memo is not None and self._has_news:
            try:
                looks = {key: astuple(look) for key, look in self._known.items()}
                atomic.write_text(self._memo, json.dumps({"format": FORMAT, "looks": looks}))
            except DiskError:
                return
            self._has_news = False

    def _attempt(self, path: Path) -> ImageInfo | ZImageTrainError:
        try:
            return self._look(path)
        except DataError as error:
            return error

    def _look(self, path: Path) -> ImageInfo:
        key = _key(path)
        known = self._known.get(key or "")
        if known is not None:
            return known
        content = _read(path)
        image = images.load(path, content)
        small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
        look = ImageInfo(hashlib.sha256(content).hexdigest(), image.width, image.height, small.tobytes().hex())
        if key is not None and key == _key(path):
            self._known[key] = look
            self._has_news = True
        return look


def near_duplicates(thumbnails: list[str]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of thumbnails that are nearly the same: each later one once, with the earliest."""
    if not thumbnails:
        return []
    pixels = np.array([list(bytes.fromhex(one)) for one in thumbnails], dtype=np.float32)
    squares = (pixels**2).sum(axis=1)
    limit = NEARLY_THE_SAME**2 * pixels.shape[1]
    pairs = []
    for start in range(0, len(pixels), 1000):
        rows = slice(start, start + 1000)
        distance = squares[rows, None] + squares[None, :] - 2.0 * (pixels[rows] @ pixels.T)
        for row, column in zip(*np.nonzero(distance < limit), strict=True):
            if column < start + row and (not pairs or pairs[-1][1] != start + row):
                pairs.append((int(column), int(start + row)))
    return pairs


def _remembered(memo: Path) -> dict[str, ImageInfo]:
    """What `memo` holds, as far as it is ours and whole: the rest is decoded again."""
    try:
        content = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("looks"), dict):
        return {}
    return {key: ImageInfo(*values) for key, values in content["looks"].items() if _is_look(values)}


def _is_look(values: object) -> bool:
    if not isinstance(values, list) or [type(value) for value in values] != [str, int, int, str]:
        return False
    digest, _, _, thumbnail = values
    lengths = (len(digest), len(thumbnail)) == (64, 2 * 3 * THUMBNAIL_PX**2)
    return lengths and HEX.fullmatch(digest + thumbnail) is not None


def _key(path: Path) -> str | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise DataError(Problem(str(path), "is not a file", "remove it or check the name"))
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(Problem(str(path), "does not exist", "check the name")) from None
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read ({error.strerror})", "check the file")) from None
