"""Files that the page shows: previews, images of folders, small versions of both, and downloads."""

import io
import mimetypes
from collections import OrderedDict
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, Response, StreamingResponse
from PIL import Image, ImageOps

from zimage_train.dataset.images import without_warnings
from zimage_train.errors import ZImageTrainError
from zimage_train.ui import run_state
from zimage_train.ui.run_archive import stream_archive
from zimage_train.ui.workspace import Workspace

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
DOWNLOADS = {*IMAGES, ".safetensors", ".json", ".html", ".yaml", ".txt", ".jsonl"}
SMALL_SIZES = (96, 192, 384, 768)
"""Longer sides of small versions, px."""
SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'none'"
)
"""Policy for pages that commands have written: they contain all that they need."""
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
MAX_CACHED_BYTES = 128 * 1024**2
MAX_PIXELS = 200_000_000


class _SmallImages:
    """Small versions of images, as JPEG, the last ones used."""

    def __init__(self) -> None:
        self._images: OrderedDict[tuple[Path, int, int], bytes] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path, side: int) -> bytes:
        key = (path, path.stat().st_mtime_ns, side)
        found = self._images.get(key)
        if found is None:
            found = self._images[key] = _small(path, side)
            self._bytes += len(found)
        self._images.move_to_end(key)
        while self._bytes > MAX_CACHED_BYTES:
            self._bytes -= len(self._images.popitem(last=False)[1])
        return found


def _small(path: Path, side: int) -> bytes:
    with without_warnings(), Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{path} has more than {MAX_PIXELS:,} pixels")
        image.draft("RGB", (side, side))  # JPEGs are decoded at a fraction of their size
        small = ImageOps.exif_transpose(image).convert("RGB")
    if max(small.size) <= side // 2:
        # As large as whole pixels allow: images of 64 px are looked at pixel by pixel.
        factor = side // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=86)
    return buffer.getvalue()


def media_router(workspace: Workspace) -> APIRouter:
    """Return the routes that serve files of the workspace, and of no other folder."""
    router = APIRouter()
    small_images = _SmallImages()

    def known_file(path: str, suffixes: set[str]) -> Path:
        try:
            found = workspace.contain(Path(path))
        except (ZImageTrainError, OSError, ValueError):
            raise HTTPException(403, "outside the folders of this page") from None
        hidden = any(part.startswith(".") for part in found.relative_to(_root_of(workspace, found)).parts)
        if hidden or found.suffix.lower() not in suffixes or not found.is_file():
            raise HTTPException(404, "no such file")
        return found

    # Not async: these run in threads, so that decoding an image does not hold up the page.
    @router.get("/media/small", include_in_schema=False)
    def small(path: str, side: int, v: str = "") -> Response:
        file = known_file(path, IMAGES)
        if side not in SMALL_SIZES:
            raise HTTPException(400, f"side is one of {SMALL_SIZES}")
        try:
            content = small_images.get(file, side)
        except (OSError, ValueError, Image.DecompressionBombError):
            raise HTTPException(415, "cannot be read as an image") from None
        return Response(content, media_type="image/jpeg", headers=FOREVER if v else {})

    @router.get("/media/whole", include_in_schema=False)
    def whole(path: str, v: str = "") -> FileResponse:
        return FileResponse(known_file(path, IMAGES), headers=FOREVER if v else {})

    @router.get("/media/download", include_in_schema=False)
    def download(path: str) -> FileResponse:
        file = known_file(path, DOWNLOADS)
        # As a file to be saved: a page of a run's folder is not shown as one of this site.
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return FileResponse(file, media_type=kind, filename=file.name)

    @router.get("/media/page", include_in_schema=False)
    def page(path: str) -> FileResponse:
        # In a sandbox, as if it came from no site at all: a page from a run's folder can do nothing here.
        headers = {"Content-Security-Policy": SANDBOX}
        return FileResponse(known_file(path, {".html"}), media_type="text/html", headers=headers)

    @router.get("/media/archive", include_in_schema=False)
    def archive(run: str) -> StreamingResponse:
        try:
            folder = workspace.run(run)
        except ZImageTrainError:
            raise HTTPException(404, "no such run") from None
        if not run_state.is_run(folder):
            raise HTTPException(404, "no such run")
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(run)}.zip"}
        return StreamingResponse(stream_archive(folder), media_type="application/zip", headers=headers)

    return router


def _root_of(workspace: Workspace, path: Path) -> Path:
    roots = [root.resolve() for root in (workspace.runs, *workspace.folders) if path.is_relative_to(root.resolve())]
    return max(roots, key=lambda root: len(root.parts))


def small_url(path: Path, side: int) -> str:
    """Return the address of the small version of an image, which changes with the file."""
    return f"/media/small?path={quote(str(path))}&side={side}&v={path.stat().st_mtime_ns}"


def whole_url(path: Path) -> str:
    """Return the address of an image, which changes with the file."""
    return f"/media/whole?path={quote(str(path))}&v={path.stat().st_mtime_ns}"


def download_url(path: Path) -> str:
    return f"/media/download?path={quote(str(path))}"


def archive_url(run: str) -> str:
    """Return the address of a run as a zip archive."""
    return f"/media/archive?run={quote(run, safe='')}"


def page_url(path: Path) -> str:
    """Return the address of a page that a run has written, such as its report."""
    return f"/media/page?path={quote(str(path))}"
