"""Masks over the images: where they are, and overlays that darken the untrained part."""

import io
from collections.abc import Iterable
from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from PIL import Image

from zimage_train.dataset import images, masks
from zimage_train.dataset.images import ImageIndex
from zimage_train.dataset.masks import Mask
from zimage_train.dataset.sources import MASK_FOLDER, MASK_NAME
from zimage_train.errors import ZImageTrainError
from zimage_train.io.progress import no_progress
from zimage_train.ui.folder_browser import list_subfolders
from zimage_train.ui.image_folder import ImageFolder
from zimage_train.ui.media import FOREVER
from zimage_train.ui.workspace import Workspace

OVERLAY_PX = 384
OPACITY = 0.75
"""Opacity of the darkness over the untrained part."""


def mask_folders(workspace: Workspace, folder: Path) -> list[Path]:
    """Return the folders that probably hold the masks of a folder of images: those in it, then those beside it."""
    found: list[Path] = []
    for place in (folder, folder.parent):
        try:
            subfolders = list_subfolders(workspace, place).subfolders
        except ZImageTrainError:
            continue
        for path in subfolders:
            is_own = place == folder or path.name.startswith(folder.name)
            if MASK_FOLDER.fullmatch(path.name) or (is_own and MASK_NAME.fullmatch(path.name)):
                found.append(path)
    return found


def masks_of(folder: ImageFolder, paths: Iterable[Path], index: ImageIndex) -> dict[Path, Mask]:
    """Return image -> its mask, for those of `paths` that have one."""
    if folder.mask is None:
        return {}
    return masks.find_masks(list(paths), folder.entry, folder.mask, "data.0", [], index, no_progress)


def mask_router(workspace: Workspace) -> APIRouter:
    """Return the route of the overlays that darken the part outside a mask."""
    router = APIRouter()

    # Not async: it runs in a thread, as the other media.
    @router.get("/media/mask", include_in_schema=False)
    def mask(path: str, alpha: bool, v: str = "") -> Response:
        try:
            content = _darkness(workspace.contain(Path(path)), alpha)
        except (ZImageTrainError, OSError, ValueError):
            raise HTTPException(404, "no such mask") from None
        return Response(content, media_type="image/png", headers=FOREVER if v else {})

    return router


def _darkness(path: Path, is_alpha: bool) -> bytes:
    """Return a PNG that is black where nothing is trained and transparent where all is."""
    content = path.read_bytes()
    grey = images.load_alpha(path, content) if is_alpha else images.load(path, content).convert("L")
    grey.thumbnail((OVERLAY_PX, OVERLAY_PX), Image.Resampling.BILINEAR)
    black = Image.new("LA", grey.size, 0)
    black.putalpha(grey.point([round((255 - value) * OPACITY) for value in range(256)]))
    buffer = io.BytesIO()
    black.save(buffer, "PNG")
    return buffer.getvalue()
