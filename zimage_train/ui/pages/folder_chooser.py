"""Choosing a folder of images: a browser of the workspace's folders, and an upload into a new one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import events, run, ui

from zimage_train.errors import ZImageTrainError
from zimage_train.ui.folder_browser import FolderListing, list_roots, list_subfolders
from zimage_train.ui.image_upload import EXTENSIONS, MAX_FILE_BYTES, UPLOADS, save_upload, upload_folder
from zimage_train.ui.site import Site, show_problems
from zimage_train.ui.texts import Translate

MAX_SHOWN = 80
DROP_SCRIPT = """
(() => {
  const zone = getHtmlElement(%d), uploader = () => getElement(%d).$refs.qRef;
  const suffixes = %s;
  const read = async (entry, files) => {
    if (entry.isFile) {
      const file = await new Promise((done, fail) => entry.file(done, fail));
      if (suffixes.some((suffix) => file.name.toLowerCase().endsWith(suffix))) files.push(file);
      return;
    }
    if (entry.name.startsWith(".") || entry.name.startsWith("_")) return;
    const reader = entry.createReader();
    for (;;) {
      const part = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!part.length) return;
      for (const one of part) await read(one, files);
    }
  };
  zone.addEventListener("drop", async (event) => {
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const folder = entries.find((entry) => entry.isDirectory);
    if (!folder) return;
    event.preventDefault();
    event.stopPropagation();
    event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
    const files = [];
    for (const entry of entries) await read(entry, files);
    emitEvent("zt-dropped", folder.name);
    // The name of the folder must be there before the first file is.
    setTimeout(() => uploader().addFiles(files), 300);
  }, true);
})();
"""
"""Makes a dropped folder a list of its files, which an uploader alone does not do."""


def open_folder(path: Path) -> None:
    """Go to the page of a folder."""
    ui.navigate.to(f"/images?folder={quote(str(path))}")


class FolderChooser:
    """A browser that goes only where the workspace allows.

    Args:
        on_choose: called with the folder that was chosen.
    """

    def __init__(self, site: Site, t: Translate, on_choose: Callable[[Path], Any]) -> None:
        self._site, self._t, self._choose = site, t, on_choose
        self._here: Path | None = None

    def build(self, start: Path | None = None) -> None:
        """Build the browser, at a folder or at the top of the workspace."""
        t = self._t
        with ui.row().classes("w-full items-center no-wrap"):
            self._up = ui.button(icon="arrow_upward", on_click=self._go_up).props("flat round dense")
            self._up.props(f'aria-label="{t("images.up")}"')
            self._title = ui.label().classes("zt-head flex-1").style("overflow-wrap: anywhere")
            self._open = ui.button(on_click=lambda: self._choose(self._here or Path())).props("no-caps")
        self._find = ui.input(placeholder=t("images.find_folder")).props("dense outlined clearable debounce=200")
        self._find.props(f'aria-label="{t("images.find_folder")}"').classes("w-full")
        self._find.on_value_change(lambda: self._draw())
        self._list = ui.column().classes("w-full gap-0").style("max-height: 50vh; overflow: auto; flex-wrap: nowrap")
        roots = list_roots(self._site.workspace)
        self.go(start or (roots[0] if roots else None))

    def go(self, folder: Path | None) -> None:
        """Show the subfolders of a folder; None for the folders of the workspace."""
        try:
            self._listing: FolderListing | None = (
                None if folder is None else list_subfolders(self._site.workspace, folder)
            )
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._here = self._listing.path if self._listing else None
        self._find.value = ""
        self._draw()

    def _go_up(self) -> None:
        self.go(self._listing.parent if self._listing else None)

    def _draw(self) -> None:
        t, listing = self._t, self._listing
        folders = list_roots(self._site.workspace) if listing is None else listing.subfolders
        self._title.text = t("images.folders") if listing is None else str(listing.path)
        self._up.set_enabled(listing is not None)
        self._open.set_visibility(listing is not None)
        self._open.text = t("images.open_folder", count=listing.num_images if listing else 0)
        query = (self._find.value or "").casefold()
        found = [folder for folder in folders if query in folder.name.casefold()]
        self._list.clear()
        with self._list:
            for folder in found[:MAX_SHOWN]:
                text = str(folder) if listing is None else folder.name
                ui.button(text, icon="folder", on_click=partial(self.go, folder)).props(
                    "flat dense no-caps align=left"
                ).classes("w-full")
            if len(found) > MAX_SHOWN:
                ui.label(t("images.and_more", count=len(found) - MAX_SHOWN)).classes("zt-quiet")
            if not found:
                ui.label(t("images.no_subfolders")).classes("zt-quiet")


class ImageUpload:
    """An uploader of images and captions into a folder of their own."""

    def __init__(self, site: Site, t: Translate) -> None:
        self._site, self._t = site, t
        self._count = self._num_pending = 0
        """Files that were written, and those that are being written: the browser does not wait for that."""
        self._is_finished = False
        self._folder: Path | None = None

    def build(self) -> None:
        """Build the uploader."""
        t = self._t
        self._name = ui.input(label=t("images.new_folder"), value=self._free_name()).props("outlined dense")
        self._name.classes("w-full")
        with ui.element("div").classes("w-full") as zone:
            upload = ui.upload(
                multiple=True,
                auto_upload=True,
                max_file_size=MAX_FILE_BYTES,
                on_upload=self._take,
                on_rejected=lambda: ui.notify(t("images.rejected"), type="negative"),
                label=t("images.drop"),
            )
            upload.props(f'accept="{",".join(EXTENSIONS)}" flat bordered').classes("w-full zt-upload")
            upload.on("finish", self._finish, args=[])
        self._state = ui.label().classes("zt-quiet").props("role=status")
        ui.label(t("images.upload_hint", folder=str(self._site.workspace.folders[0] / UPLOADS))).classes(
            "zt-quiet text-xs"
        )
        ui.on("zt-dropped", self._dropped)
        script = DROP_SCRIPT % (zone.id, upload.id, list(EXTENSIONS))
        ui.timer(0, lambda: ui.run_javascript(script), once=True)

    def _free_name(self) -> str:
        parent = self._site.workspace.folders[0] / UPLOADS
        number = 1
        while (parent / f"images-{number}").exists():
            number += 1
        return f"images-{number}"

    def _dropped(self, event: events.GenericEventArguments) -> None:
        """Call the new folder as the one that was dropped."""
        if event.args:
            self._name.value = str(event.args)

    async def _take(self, event: events.UploadEventArguments) -> None:
        self._num_pending += 1
        try:
            self._folder = upload_folder(self._site.workspace, self._name.value or "")
            content = await event.file.read()
            await run.io_bound(save_upload, self._folder, event.file.name, content)
            self._count += 1
            self._state.text = self._t("images.uploaded", count=self._count)
        except ZImageTrainError as error:
            show_problems(error)
        finally:
            self._num_pending -= 1
        self._open_if_done()

    def _finish(self) -> None:
        self._is_finished = True
        self._open_if_done()

    def _open_if_done(self) -> None:
        """Open the folder once the browser has sent all files, and all are written."""
        if self._is_finished and self._num_pending == 0 and self._folder is not None and self._count:
            open_folder(self._folder)
