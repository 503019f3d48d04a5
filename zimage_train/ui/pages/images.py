"""The images of a folder, with their captions."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import Client, app, background_tasks, events, ui

from zimage_train.config.dataset import ALPHA
from zimage_train.errors import ZImageTrainError
from zimage_train.ui.image_frames import RESOLUTIONS
from zimage_train.ui.layout import page_frame
from zimage_train.ui.mask_overlay import mask_folders, mask_router
from zimage_train.ui.pages import caption_panels, check_panel, image_grid
from zimage_train.ui.pages.caption_panels import ReplacePanel, TagPanel
from zimage_train.ui.pages.captioning_panel import CaptioningPanel, CaptionJobs
from zimage_train.ui.pages.check_panel import CheckPanel
from zimage_train.ui.pages.folder_chooser import FolderChooser, ImageUpload, open_folder
from zimage_train.ui.pages.image_grid import ImageGrid
from zimage_train.ui.pages.image_session import ImageSession, News
from zimage_train.ui.pages.image_zoom import ImageZoom
from zimage_train.ui.site import Site
from zimage_train.ui.texts import Translate

NO_MASK = "none"
CSS = """
.zt-work { display: grid; grid-template-columns: minmax(0, 1fr) 340px; gap: 1rem; width: 100%; align-items: start; }
.zt-side { border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.zt-side .q-expansion-item { border-bottom: 1px solid var(--line); }
.zt-side .q-expansion-item:last-child { border-bottom: 0; }
.zt-choose { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 1rem;
  width: 100%; align-items: start; }
.zt-upload .q-uploader__list { min-height: 9rem; }
.body--dark .q-btn--flat, .body--dark .q-btn--outline { --q-primary: var(--accent); --q-negative: var(--bad); }
@media (max-width: 900px) { .zt-work { grid-template-columns: minmax(0, 1fr); } .zt-side { order: -1; } }
"""

SEARCH_KEY = """
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, textarea, select")) return;
  event.preventDefault();
  document.querySelector(".zt-search input").focus();
});
"""
"""In the browser, since the next keys must already reach the field."""


def register(site: Site) -> None:
    """Add the page."""
    app.include_router(mask_router(site.workspace))
    jobs: CaptionJobs = {}

    @ui.page("/images")
    def images_page(folder: str = "", mask: str = "") -> None:
        with page_frame("images") as t:
            for css in (CSS, image_grid.CSS, caption_panels.CSS, check_panel.CSS):
                ui.add_css(css)
            path = _known_folder(site, folder, t) if folder else None
            if path is None:
                _build_start(site, t)
            else:
                ImagesPage(site, t, path, mask, jobs).build()


def shown_path(path: Path) -> str:
    """Return a path as short as it can be: from the working directory, or from the home directory."""
    working = Path.cwd()
    if path.is_relative_to(working) and path != working:
        return str(path.relative_to(working))
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _known_folder(site: Site, folder: str, t: Translate) -> Path | None:
    """Return the folder of the address, or None if it cannot be opened, with a message on the page."""
    try:
        path = site.workspace.contain(Path(folder))
    except (ZImageTrainError, OSError, ValueError) as error:
        ui.label(str(error)).props("role=alert").style("color: var(--bad)")
        return None
    if not path.is_dir():
        ui.label(t("images.missing", folder=folder)).props("role=alert").style("color: var(--bad)")
        return None
    return path


def _build_start(site: Site, t: Translate) -> None:
    ui.label(t("nav.images")).classes("zt-title").props("role=heading aria-level=1")
    with ui.element("div").classes("zt-choose"):
        with ui.element("section").classes("zt-card"):
            ui.label(t("images.choose")).classes("zt-head")
            FolderChooser(site, t, open_folder).build()
        with ui.element("section").classes("zt-card"):
            ui.label(t("images.upload")).classes("zt-head")
            ImageUpload(site, t).build()


class ImagesPage:
    """The page of a folder for one browser."""

    def __init__(self, site: Site, t: Translate, path: Path, mask: str, jobs: CaptionJobs) -> None:
        self._site, self._t, self._path = site, t, path
        self._masks = mask_folders(site.workspace, path)
        self._mask = self._chosen_mask(mask)
        self._session = ImageSession(site, t, path, self._mask)
        self._grid = ImageGrid(self._session)
        self._zoom = ImageZoom(self._session, self._grid)
        self._captioning = CaptioningPanel(self._session, jobs)

    def _chosen_mask(self, wanted: str) -> str | None:
        """Return the masks that the address names, or else the first that were found in the folder itself."""
        if wanted == ALPHA:
            return ALPHA
        if wanted == NO_MASK:
            return None
        known = [str(path) for path in self._masks]
        if wanted in known:
            return wanted
        return next((str(path) for path in self._masks if path.parent == self._path), None)

    def build(self) -> None:
        """Build the page; the folder is read once the browser shows it."""
        self._build_head()
        self._build_filters()
        with ui.element("div").classes("zt-work"):
            with ui.element("section"):
                self._grid.build(self._zoom.open, self._captioning.start_one)
            with ui.element("aside").classes("zt-side"):
                TagPanel(self._session).build()
                ReplacePanel(self._session).build()
                CheckPanel(self._session).build()
                self._captioning.build()
        self._zoom.build()
        self._session.listen(self._hear)
        ui.keyboard(on_key=self._key, ignore=["input", "select", "textarea"])
        ui.add_body_html(f"<script>{SEARCH_KEY}</script>")
        # At once, while the browser loads the page: a large folder takes as long.
        background_tasks.create(self._read(ui.context.client))

    async def _read(self, client: Client) -> None:
        with client:
            await self._session.read()

    def _build_head(self) -> None:
        t, path = self._t, self._path
        with ui.dialog() as chooser, ui.card().style("width: min(95vw, 640px); max-width: none"):
            FolderChooser(self._site, t, open_folder).build(path)
        with ui.row().classes("w-full items-center justify-between gap-2"):
            with ui.column().classes("gap-0").style("min-width: 0"):
                ui.label(path.name or str(path)).classes("zt-title").props("role=heading aria-level=1")
                ui.label(shown_path(path)).classes("zt-quiet text-xs").style("overflow-wrap: anywhere")
            with ui.row().classes("gap-2 items-center"):
                ui.button(t("images.other_folder"), icon="folder_open", on_click=chooser.open).props("outline no-caps")
                ui.button(t("images.upload"), icon="upload", on_click=lambda: ui.navigate.to("/images")).props(
                    "outline no-caps"
                )
                # A link, so that it opens in a new tab too.
                ui.button(t("images.train"), icon="model_training").props(
                    f'no-caps href="/new?folder={quote(str(path))}"'
                )

    def _build_filters(self) -> None:
        t, session = self._t, self._session
        with ui.row().classes("w-full items-center gap-3"):
            search = ui.input(placeholder=t("images.search")).classes("zt-search flex-1 min-w-48")
            search.props(f'dense outlined clearable debounce=250 aria-label="{t("images.search")}"')
            search.on_value_change(lambda event: session.filter(query=event.value or ""))
            self._empty = ui.checkbox(t("images.uncaptioned"))
            self._empty.on_value_change(lambda event: session.filter(is_uncaptioned=event.value))
            sides = {0: t("images.no_crop")} | {side: f"{side} px" for side in RESOLUTIONS}
            crop = ui.select(sides, value=0, label=t("images.crop")).props("dense outlined options-dense")
            crop.classes("w-36").on_value_change(lambda event: self._grid.set_resolution(event.value or None))
            masks = {NO_MASK: t("images.no_mask"), ALPHA: t("images.alpha")}
            masks |= {str(path): path.name for path in self._masks}
            mask = ui.select(masks, value=self._mask or NO_MASK, label=t("images.mask"))
            mask.props("dense outlined options-dense").classes("w-40").on_value_change(self._choose_mask)
            self._undo = ui.button(t("images.undo", count=0), icon="undo", on_click=session.undo).props("flat no-caps")
            self._undo.set_enabled(False)

    async def _choose_mask(self, event: events.ValueChangeEventArguments) -> None:
        self._session.folder.mask = self._chosen_mask(str(event.value))
        await self._session.read()

    def _hear(self, news: News) -> None:
        session = self._session
        count = session.editor.undo_count
        self._undo.text = self._t("images.undo", count=count)
        self._undo.set_enabled(count > 0)
        if self._empty.value != session.is_uncaptioned:
            self._empty.value = session.is_uncaptioned

    async def _key(self, event: events.KeyEventArguments) -> Any:
        if not event.action.keydown:
            return
        if self._zoom.is_open:
            await self._zoom.key(event)
        elif event.key == "ArrowLeft":
            self._grid.turn(-1)
        elif event.key == "ArrowRight":
            self._grid.turn(1)
