"""Sampling with a LoRA: the queue, and the images that were drawn."""

from collections.abc import Callable
from typing import Any

from nicegui import events, ui

from zimage_train.ui.pages.buttons import icon_button
from zimage_train.ui.sampling import Sample
from zimage_train.ui.site import Site
from zimage_train.ui.texts import Translate

REFRESH_SECONDS = 0.7
SHOWN = 24
SMALL_SIDE = 384
PIXELATED_SIDE = 256
"""Images up to this size are enlarged pixel by pixel."""


class SampleResults:
    """The queue and the images for one browser.

    Args:
        use: called with a sample whose settings are to be used again.
    """

    def __init__(self, site: Site, t: Translate, use: Callable[[Sample], None]) -> None:
        self._site, self._t, self._use = site, t, use
        self._rows: list[_WaitingRow] = []
        self._shown_images: Any = None
        self._samples: list[Sample] = []
        self._zoomed = -1
        """Index of the image that is shown large; -1 for none."""

    def build(self) -> None:
        """Build both, and keep them up to date."""
        t = self._t
        # Hidden until something waits, so that nothing moves when the page opens.
        self._queue_card = ui.element("section").classes("zt-card").props('aria-live="polite"')
        with self._queue_card:
            ui.label(t("try.queue")).classes("zt-head")
            self._queue = ui.column().classes("w-full gap-2")
        with ui.element("section").classes("zt-card"):
            ui.label(t("try.results")).classes("zt-head")
            self._images = ui.element("div").classes("zt-results")
        ui.add_css(
            ".zt-results { display: grid; gap: 1rem; width: 100%; margin-top: .5rem;"
            " grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }"
            " .zt-pair { display: flex; gap: 4px; width: 100%; }"
            " .zt-pair figure { flex: 1 1 0; min-width: 0; margin: 0; }"
            " .zt-pair img { width: 100%; display: block; border-radius: 8px; background: var(--soft); }"
            " .zt-pair figcaption { font-size: .78rem; color: var(--quiet); text-align: center; }"
            " .zt-zoom { cursor: zoom-in; border: 0; padding: 0; background: none; width: 100%; display: block; }"
        )
        with ui.dialog().props("maximized") as self._dialog, ui.card().classes("items-center"):
            icon_button("close", t("common.close"), self._dialog.close)
            self._large = ui.column().classes("w-full items-center")
        self._dialog.on("hide", self._unzoom)
        self.refresh()
        ui.timer(REFRESH_SECONDS, self.refresh)
        ui.keyboard(on_key=self._key)

    def refresh(self) -> None:
        """Show what has changed."""
        active = self._site.sampler.active()
        ids = [sample.id for sample in active]
        if ids != [row.sample.id for row in self._rows]:
            self._show_queue(active)
        for row in self._rows:
            row.update(self._site.sampler.place(row.sample), self._t)
        finished = self._site.sampler.finished(SHOWN)
        images = [(one.id, one.status) for one in finished]
        if images != self._shown_images:
            self._shown_images, self._samples = images, finished
            self._show_images()

    def _show_queue(self, active: list[Sample]) -> None:
        self._queue_card.set_visibility(bool(active))
        self._queue.clear()
        with self._queue:
            self._rows = [_WaitingRow(sample, self._t, self._cancel) for sample in active]

    def _cancel(self, sample: Sample) -> None:
        self._site.sampler.cancel(sample.id)
        self.refresh()

    def _remove(self, sample: Sample) -> None:
        self._site.sampler.remove(sample.id)
        self.refresh()

    def _show_images(self) -> None:
        self._images.clear()
        with self._images:
            if not self._samples:
                ui.label(self._t("try.no_results")).classes("zt-quiet")
            for index, sample in enumerate(self._samples):
                with ui.element("article").classes("flex flex-col gap-1 min-w-0"):
                    if sample.status == "failed":
                        self._build_failure(sample)
                    else:
                        self._build_image(index, sample)
                    self._build_facts(sample)

    def _build_image(self, index: int, sample: Sample) -> None:
        label = self._t("try.zoom", prompt=sample.drawing.request["prompt"])
        with ui.element("button").classes("zt-zoom").props('type="button"') as button:
            self._build_pair(sample, SMALL_SIDE)
        button.props["aria-label"] = label
        button.on("click", lambda: self._zoom(index))

    def _build_pair(self, sample: Sample, side: int | None) -> None:
        """Build an image, with the one without LoRAs before it."""
        t, request = self._t, sample.drawing.request
        suffix = "" if side is None else f"?side={side}"
        images = [(t("try.with_lora"), "image")]
        if sample.asked.base:
            images.insert(0, (t("try.without_lora"), "base"))
        style = f"aspect-ratio: {request['width']} / {request['height']}; object-fit: contain; "
        if max(request["width"], request["height"]) <= PIXELATED_SIDE:
            style += "image-rendering: pixelated; "
        if side is None:
            style += "max-height: 78vh; "
        with ui.element("div").classes("zt-pair"):
            for caption, name in images:
                with ui.element("figure"):
                    picture = ui.element("img").style(style)
                    picture.props["src"] = f"/api/sample/{sample.id}/{name}{suffix}"
                    picture.props["alt"] = f"{request['prompt']} ({caption})" if len(images) > 1 else request["prompt"]
                    picture.props["loading"] = "lazy"
                    if len(images) > 1:
                        with ui.element("figcaption"):
                            ui.label(caption)

    def _build_failure(self, sample: Sample) -> None:
        ui.label(self._t("try.failed")).classes("zt-status zt-status-failed self-start")
        for problem in sample.problems:
            text = f"{problem['where']}: {problem['found']}" + (f"; {problem['todo']}" if problem["todo"] else "")
            ui.label(text).classes("zt-log")

    def _build_facts(self, sample: Sample) -> None:
        t = self._t
        ui.label(sample.drawing.request["prompt"]).classes("text-sm").style(
            "display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden"
        )
        ui.label(facts_of(sample)).classes("zt-quiet").style("font-size: .8rem; overflow-wrap: anywhere")
        with ui.row().classes("gap-0"):
            icon_button("replay", t("try.again"), lambda: self._use(sample))
            if sample.status == "done":
                address = f"/api/sample/{sample.id}/image"
                icon_button("download", t("try.download"), lambda: ui.download(address, f"{sample.id}.png"))
            icon_button("delete_outline", t("try.remove"), lambda: self._remove(sample))

    def _zoom(self, index: int) -> None:
        """Show an image as large as fits, beside the one without LoRAs; arrows lead to others."""
        self._zoomed, sample = index, self._samples[index]
        self._large.clear()
        with self._large:
            self._build_pair(sample, None)
            ui.label(sample.drawing.request["prompt"]).classes("text-center")
            ui.label(facts_of(sample)).classes("zt-quiet text-sm")
        self._dialog.open()

    def _unzoom(self) -> None:
        self._zoomed = -1

    def _key(self, event: events.KeyEventArguments) -> None:
        move = {"ArrowLeft": -1, "ArrowRight": 1}.get(str(event.key), 0)
        if self._zoomed < 0 or not move or not event.action.keydown:
            return
        index = self._zoomed + move
        while 0 <= index < len(self._samples) and self._samples[index].status != "done":
            index += move
        if 0 <= index < len(self._samples):
            self._zoom(index)


class _WaitingRow:
    """An image in the queue; its button stays in place while its progress changes."""

    def __init__(self, sample: Sample, t: Translate, cancel: Callable[[Sample], None]) -> None:
        self.sample = sample
        self._bar_shown: Any = None
        with ui.row().classes("w-full no-wrap items-center gap-3"):
            with ui.column().classes("flex-1 min-w-0 gap-1"):
                ui.label(sample.drawing.request["prompt"]).classes("w-full truncate")
                with ui.row().classes("w-full no-wrap items-center gap-3"):
                    self._text = ui.label().classes("zt-quiet text-sm whitespace-nowrap")
                    self._bar = ui.linear_progress(0.0, show_value=False, size="6px").props("rounded indeterminate")
            icon_button("close", t("try.cancel"), lambda: cancel(sample))

    def update(self, place: int | None, t: Translate) -> None:
        """Show the place in the queue, or how far the image is."""
        sample, is_drawn = self.sample, place is None and self.sample.phase == "drawing"
        if place is not None:
            text = t("try.before", count=place)
        elif is_drawn:
            text = t("try.phase_drawing", done=sample.done, total=sample.total)
        else:
            text = t(f"try.phase_{sample.phase or 'start'}")
        shown = (text, place is None, is_drawn)
        if shown == self._bar_shown:
            return
        self._bar_shown = shown
        self._text.text = text
        self._bar.set_visibility(place is None)
        self._bar.props["aria-label"] = text
        if is_drawn:
            self._bar.props(remove="indeterminate")
            self._bar.value = sample.done / max(sample.total, 1)
        self._bar.update()


def facts_of(sample: Sample) -> str:
    """Return how an image was drawn, in a line."""
    request, settings = sample.drawing.sampling, sample.drawing.settings
    model = sample.asked.run or settings.label
    loras = ", ".join(
        f"{file.rpartition('/')[2].removesuffix('.safetensors')} {weight:g}" for file, weight in _loras(sample)
    )
    parts = [model, loras, f"{request.width}x{request.height}", f"{request.steps} steps", f"g {request.guidance:g}"]
    return " · ".join(part for part in (*parts, f"seed {request.seed}") if part)


def _loras(sample: Sample) -> list[tuple[str, float]]:
    return [(file.replace("\\", "/"), weight) for file, weight in sample.drawing.loras]
