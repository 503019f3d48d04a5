"""Sampling with a LoRA."""

from nicegui import ui

from zimage_train.ui.layout import page_frame
from zimage_train.ui.site import Site


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/try")
    def try_it_page() -> None:
        with page_frame("try") as t:
            ui.label(t("nav.try")).classes("zt-title").props("role=heading aria-level=1")
