"""A new run: form, config and plan."""

from nicegui import ui

from zimage_train.ui.layout import page_frame
from zimage_train.ui.site import Site


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/new")
    def new_page() -> None:
        with page_frame("new") as t:
            ui.label(t("nav.new")).classes("zt-title").props("role=heading aria-level=1")
