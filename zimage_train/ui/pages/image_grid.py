"""The grid of images: a page of them at a time, each with its crop, mask and caption."""

import zlib
from typing import Any
from urllib.parse import quote

from nicegui import background_tasks, events, run, ui

from zimage_train.errors import ZImageTrainError
from zimage_train.ui.image_folder import CaptionConflict, FolderImage
from zimage_train.ui.image_frames import bucket_of, crop_rectangle
from zimage_train.ui.mask_overlay import masks_of
from zimage_train.ui.media import small_url
from zimage_train.ui.pages.image_session import ImageSession, News
from zimage_train.ui.site import show_problems
from zimage_train.ui.texts import Translate

IMAGES_A_PAGE = 48
THUMBNAIL_PX = 192
CSS = """
.zt-images { display: grid; gap: .75rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 180px), 1fr)); }
@media (max-width: 500px) { .zt-images { grid-template-columns: 1fr 1fr; gap: .4rem; } }
.zt-image { border: 1px solid var(--line); border-radius: 10px; padding: .5rem; min-width: 0; }
.zt-image-box { aspect-ratio: 1; display: flex; align-items: center; justify-content: center; cursor: zoom-in;
  background: var(--soft); border-radius: 6px; overflow: hidden; position: relative; }
.zt-image-frame { position: relative; line-height: 0; overflow: hidden; }
.zt-image-frame img { width: 100%; height: 100%; display: block; position: absolute; inset: 0; }
.zt-image-crop { position: absolute; outline: 2px solid #ffd54a; outline-offset: -2px;
  box-shadow: 0 0 0 9999px rgba(0, 0, 0, .55); }
.zt-image-line { display: flex; align-items: center; gap: .15rem; font-size: .75rem; }
.zt-image-name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; flex: 1; min-width: 0; }
.zt-caption { width: 100%; box-sizing: border-box; font-family: inherit; font-size: 13px; color: inherit;
  background: transparent; border: 1px solid var(--line); border-radius: 6px; padding: .3rem .4rem; display: block;
  min-height: 4.4em; max-height: 13em; resize: vertical; field-sizing: content; }
.zt-caption::placeholder { color: var(--quiet); opacity: 1; }
.zt-caption:focus { outline: 2px solid var(--accent); outline-offset: -1px; }
.zt-conflict { border-left: 3px solid var(--bad); padding-left: .4rem; margin-top: .3rem; font-size: .8rem; }
.zt-conflict button { color: var(--accent); text-decoration: underline; background: none; border: 0; padding: .2rem 0;
  margin-right: .6rem; cursor: pointer; font: inherit; }
"""
TEXTS = ("zoom", "describe", "move", "caption", "no_caption", "conflict", "theirs", "mine", "none")


class ImageCards(ui.element, component="image_cards.js"):
    """The cards of some images, which `image_cards.js` draws."""

    def __init__(self, t: Translate) -> None:
        super().__init__()
        self._props["rows"] = []
        self._props["texts"] = {name: t(f"images.{name}") for name in TEXTS}
        self._props["is_read"] = False

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Show these images."""
        if rows != self._props["rows"] or not self._props["is_read"]:
            self._props["rows"], self._props["is_read"] = rows, True
            self.update()


class ImageGrid:
    """A page of the images that the search leaves."""

    def __init__(self, session: ImageSession) -> None:
        self._session = session
        self.resolution: int | None = None
        """The resolution whose buckets are shown; None for none."""
        self._page = 1
        self._drawing = 0
        """Number of the last drawing."""
        self._conflicts: dict[str, tuple[str, str]] = {}
        """Name -> caption of the file, and the caption that was to be written."""

    def build(self, on_zoom: Any, on_describe: Any) -> None:
        """Build the grid; the handlers get the name of an image."""
        t, session = self._session.t, self._session
        self._count = ui.label().classes("zt-quiet").props("role=status")
        self._cards = ImageCards(t)
        self._cards.on("zoom", lambda event: on_zoom(event.args))
        self._cards.on("describe", lambda event: on_describe(event.args))
        self._cards.on("move", self._move)
        self._cards.on("save", self._save)
        self._cards.on("theirs", self._take_theirs)
        self._cards.on("mine", self._keep_mine)
        with ui.row().classes("w-full justify-center"):
            self._pages = ui.pagination(1, 1, direction_links=True).props('max-pages=7 boundary-numbers gutter="4px"')
            self._pages.on_value_change(self._turn)
        session.listen(self._hear)

    @property
    def num_pages(self) -> int:
        return max(-(-len(self._session.names) // IMAGES_A_PAGE), 1)

    @property
    def shown(self) -> list[str]:
        """The names of the images of the page."""
        start = (self._page - 1) * IMAGES_A_PAGE
        return self._session.names[start : start + IMAGES_A_PAGE]

    def _hear(self, news: News) -> None:
        if news == "filter":
            self._page = 1
        self._page = min(self._page, self.num_pages)
        background_tasks.create(self.draw())

    def turn(self, move: int) -> None:
        """Show the next page, or an earlier one."""
        self._pages.value = min(max(self._page + move, 1), self.num_pages)

    def _turn(self, event: events.ValueChangeEventArguments) -> None:
        page = event.value or 1
        if page != self._page:
            self._page = page
            background_tasks.create(self.draw())

    def set_resolution(self, resolution: int | None) -> None:
        """Show the buckets and crops of a resolution, or none."""
        self.resolution = resolution
        background_tasks.create(self.draw())

    async def draw(self) -> None:
        """Show the page; the sizes of its images, and of no others, are looked at in a thread."""
        session = self._session
        known = session.folder.images
        images = [known[name] for name in self.shown if name in known]
        self._drawing += 1
        drawing = self._drawing
        rows = await run.io_bound(self._rows, images) or []
        if drawing != self._drawing:  # another page was turned to meanwhile
            return
        self._pages.max = self.num_pages
        self._pages.value = self._page
        self._pages.set_visibility(self.num_pages > 1)
        total, count = len(session.folder.images), len(session.names)
        if session.folder.has_captions:
            self._count.text = session.t("images.count", shown=count, total=total, empty=session.num_uncaptioned)
        else:
            self._count.text = session.t("images.reading", total=total)
        self._cards.show(rows)

    def _rows(self, images: list[FolderImage]) -> list[dict[str, Any]]:
        session = self._session
        if not session.folder.has_captions:
            session.folder.read_captions(image.name for image in images)
        masks = masks_of(session.folder, [image.path for image in images], session.mask_index)
        rows: list[dict[str, Any]] = []
        for image in images:
            row = self._row(image)
            mask = masks.get(image.path)
            if mask is not None:
                alpha = "true" if mask.is_alpha else "false"
                version = mask.path.stat().st_mtime_ns
                row["mask"] = f"/media/mask?path={quote(str(mask.path))}&alpha={alpha}&v={version}"
            rows.append(row)
        return rows

    def _row(self, image: FolderImage) -> dict[str, Any]:
        session = self._session
        try:
            source = small_url(image.path, THUMBNAIL_PX)
        except OSError:  # it was removed since
            source = ""
        conflict = self._conflicts.get(image.name)
        row: dict[str, Any] = {
            "name": image.name,
            "src": source,
            "caption": image.caption,
            # A caption that has changed is a new element, so that it shows; text that is being typed stays.
            "key": f"{image.name}:{zlib.crc32(image.caption.encode())}",
            "is_busy": image.name == session.busy_name,
            "has_conflict": conflict is not None,
            "conflict": conflict[0] if conflict else "",
        }
        return row | frame_of(session, image, self.resolution)

    async def _save(self, event: events.GenericEventArguments) -> None:
        await self.save(*(str(event.args[key]) for key in ("name", "text", "expected")))

    async def save(self, name: str, text: str, expected: str) -> None:
        """Save a caption; a file that has changed meanwhile is shown beside it, and not overwritten."""
        try:
            await run.io_bound(self._session.editor.save, name, text, expected)
            self._conflicts.pop(name, None)
        except CaptionConflict as conflict:
            self._conflicts[name] = (conflict.current, text)
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._session.tell("captions")

    def _take_theirs(self, event: events.GenericEventArguments) -> None:
        conflict = self._conflicts.pop(event.args, None)
        if conflict is not None and event.args in self._session.folder.images:
            self._session.folder.images[event.args].caption = conflict[0]
            self._session.tell("captions")

    async def _keep_mine(self, event: events.GenericEventArguments) -> None:
        conflict = self._conflicts.pop(event.args, None)
        if conflict is not None:
            await self.save(event.args, text=conflict[1], expected=conflict[0])

    async def _move(self, event: events.GenericEventArguments) -> None:
        image = self._session.folder.images.get(event.args)
        if image is not None:
            await self._session.move_away([image.path])


def frame_of(session: ImageSession, image: FolderImage, resolution: int | None) -> dict[str, str]:
    """Return how an image is laid out in its square, its crop at a resolution, and its sizes as text."""
    size = session.sizes.get(image.path)
    if size is None:
        return {"frame": "display: none", "src": "", "crop": "", "facts": session.t("images.unreadable")}
    width, height = size
    frame = f"width: {100 * min(width / height, 1):.2f}%; aspect-ratio: {width} / {height}"
    facts, crop = f"{width} × {height}", ""
    if resolution is not None:
        bucket = bucket_of(size, resolution)
        if bucket is None:
            return {"frame": frame, "crop": "", "facts": session.t("images.too_small", size=facts)}
        part = crop_rectangle(size, bucket)
        numbers = zip(("left", "top", "width", "height"), (part.left, part.top, part.width, part.height), strict=True)
        crop = "; ".join(f"{name}: {100 * value:.2f}%" for name, value in numbers)
        facts += f" → {bucket.width} × {bucket.height}"
    return {"frame": frame, "crop": crop, "facts": facts}
