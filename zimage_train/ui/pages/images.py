"""The images of a folder, with their captions."""

from nicegui import ui

from zimage_train.ui.layout import page_frame
from zimage_train.ui.site import Site


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/images")
    def images_page() -> None:
        with page_frame("images") as t:
            ui.label(t("nav.images")).classes("zt-title").props("role=heading aria-level=1")
