"""LoRA files: inspect, verify, convert, merge, resize, compare."""

from nicegui import ui

from zimage_train.ui.layout import page_frame
from zimage_train.ui.site import Site


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/loras")
    def loras_page() -> None:
        with page_frame("loras") as t:
            ui.label(t("nav.loras")).classes("zt-title").props("role=heading aria-level=1")
