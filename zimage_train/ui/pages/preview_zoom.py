"""A preview beside that before training, both as large as fits and zoomed together."""

from collections.abc import Callable
from pathlib import Path

from nicegui import ui

from zimage_train.ui.media import whole_url
from zimage_train.ui.texts import Translate

CSS = """
.zt-zoom { width: 100%; display: flex; flex-direction: column; align-items: center; gap: .5rem; }
.zt-zoom-stage { display: grid; gap: 6px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); 
  width: min(100%, calc(76vh * var(--shape) * var(--columns))); position: relative; cursor: grab; touch-action: none;
  user-select: none; }
.zt-zoom-split { cursor: ew-resize; }
.zt-zoom-pane { position: relative; overflow: hidden; margin: 0; border-radius: 6px; background: var(--soft);
  aspect-ratio: var(--shape); }
.zt-zoom-split .zt-zoom-pane { grid-area: 1 / 1; }
.zt-zoom-pane img { width: 100%; height: 100%; object-fit: contain; transform-origin: 0 0; display: block; }
.zt-zoom-pane .zt-zoom-small { image-rendering: pixelated; }
.zt-zoom-pane figcaption { position: absolute; top: .5rem; left: .5rem; background: #000; color: #fff; padding: 0 .5rem;
  border-radius: 4px; font-size: .85rem; pointer-events: none; }
.zt-zoom-split .zt-zoom-pane:nth-child(2) figcaption { left: auto; right: .5rem; }
.zt-zoom-line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 0 1px #000; pointer-events: none; }
.zt-zoom-bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; justify-content: center;
  font-size: .85rem; text-align: center; }
"""


TEXTS = ("hint", "split", "sides", "in", "out", "earlier", "later")


class ZoomStage(ui.element, component="preview_zoom.js"):
    """One or two images that `preview_zoom.js` zooms."""

    def __init__(self, t: Translate) -> None:
        super().__init__()
        self._props["panes"] = []
        self._props["texts"] = {name: t(f"zoom.{name}") for name in TEXTS}

    def show(self, images: list[tuple[str, Path]]) -> None:
        """Show (label, image); the zoom stays as it is."""
        self._props["panes"] = [{"label": label, "src": whole_url(path)} for label, path in images]
        self.update()


class PreviewZoom:
    """The dialog of a preview."""

    def __init__(self, t: Translate, move: Callable[[int], None]) -> None:
        """Build the dialog, closed; `move(1)` is called for the next step, and `move(-1)` for the one before."""
        ui.add_css(CSS)
        with ui.dialog().props("maximized") as self._dialog, ui.card().classes("w-full items-center no-wrap"):
            with ui.row().classes("w-full items-center justify-between no-wrap"):
                self._title = ui.label().classes("zt-head").style("overflow-wrap: anywhere")
                close = ui.button(icon="close", on_click=self._dialog.close).props("flat round")
                close.props(f'aria-label="{t("common.close")}"')
            self._stage = ZoomStage(t)
            self._stage.on("step", lambda event: move(int(event.args)))
        self.place = ""
        """Which preview is shown, at whatever step."""

    @property
    def is_open(self) -> bool:
        return self._dialog.value

    def show(self, place: str, prompt: str, images: list[tuple[str, Path]]) -> None:
        """Show (label, image) of a preview: before training, if there is that, and at a step."""
        self.place = place
        self._title.text = prompt
        self._stage.show(images)
        self._dialog.open()
