"""An image as large as fits, with its caption; the arrow keys go on to the next."""

from functools import partial

from nicegui import events, ui

from zimage_train.ui.media import whole_url
from zimage_train.ui.pages.image_grid import ImageGrid, frame_of
from zimage_train.ui.pages.image_session import ImageSession

MOVES = {"ArrowLeft": -1, "ArrowRight": 1}


class ImageZoom:
    """The dialog of a single image."""

    def __init__(self, session: ImageSession, grid: ImageGrid) -> None:
        self._session, self._grid = session, grid
        self._name = ""

    def build(self) -> None:
        """Build the dialog, closed."""
        t = self._session.t
        with ui.dialog().props("maximized") as self._dialog, ui.card().classes("w-full h-full no-wrap"):
            with ui.row().classes("w-full items-center justify-between no-wrap"):
                self._title = ui.label().classes("zt-head").style("overflow-wrap: anywhere")
                with ui.row().classes("no-wrap gap-1"):
                    for icon, move, text in (("chevron_left", -1, "previous"), ("chevron_right", 1, "next")):
                        button = ui.button(icon=icon, on_click=partial(self.move, move)).props("flat round")
                        button.props(f'aria-label="{t("images." + text)}"')
                    ui.button(icon="close", on_click=self._dialog.close).props(
                        f'flat round aria-label="{t("common.close")}"'
                    )
            box = ui.element("div").classes("flex-1 w-full flex items-center justify-center").style("min-height: 0")
            with box, ui.element("div").classes("zt-image-frame") as self._frame:
                self._picture = ui.element("img")
                self._crop = ui.element("div").classes("zt-image-crop")
            self._facts = ui.label().classes("zt-quiet")
            self._caption = ui.textarea(label=t("images.caption")).props("outlined autogrow").classes("w-full")
            self._caption.style("max-height: 30vh; overflow: auto").on("blur", self._save)
        self._dialog.on("hide", self._save)

    def open(self, name: str) -> None:
        """Show an image."""
        if self._show(name):
            self._dialog.open()

    def _show(self, name: str) -> bool:
        image = self._session.folder.images.get(name)
        if image is None or not image.path.exists():
            return False
        self._name = name
        layout = frame_of(self._session, image, self._grid.resolution)
        size = self._session.sizes.get(image.path) or (1, 1)
        self._title.text, self._facts.text = name, layout["facts"]
        self._picture.props(f'src="{whole_url(image.path)}" alt="{self._session.t("images.image")}"')
        self._frame.style(
            f"aspect-ratio: {size[0]} / {size[1]}; width: min(100%, {58 * size[0] / size[1]:.2f}vh)",
        )
        self._crop.style(replace=layout["crop"]).set_visibility(bool(layout["crop"]))
        self._caption.value = image.caption
        return True

    async def move(self, move: int) -> None:
        """Save the caption, and show the next image of the search, or an earlier one."""
        await self._save()
        names = self._session.names
        if self._name in names:
            self._show(names[(names.index(self._name) + move) % len(names)])

    async def key(self, event: events.KeyEventArguments) -> None:
        """Go on by the arrow keys."""
        if self.is_open and event.action.keydown and str(event.key) in MOVES:
            await self.move(MOVES[str(event.key)])

    @property
    def is_open(self) -> bool:
        return self._dialog.value

    async def _save(self) -> None:
        image = self._session.folder.images.get(self._name)
        text = self._caption.value or ""
        if image is not None and text.strip() != image.caption:
            await self._grid.save(self._name, text, image.caption)
