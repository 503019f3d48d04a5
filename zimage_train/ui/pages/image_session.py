"""The state that the parts of the page of images share: folder, filter, and the changes made."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from nicegui import run, ui

from zimage_train.dataset.images import ImageIndex
from zimage_train.errors import Problem, ZImageTrainError
from zimage_train.ui.caption_edits import CaptionEditor, Change, EditResult
from zimage_train.ui.folder_check import MOVED_BY_HAND, move_away, move_back
from zimage_train.ui.image_folder import ImageFolder
from zimage_train.ui.image_frames import ImageSizes
from zimage_train.ui.site import Site, show_problems
from zimage_train.ui.texts import Translate

MAX_MESSAGES = 5
"""Problems that are shown one by one; of more, only the number."""
MANY_CAPTIONS = 200
"""Captions whose writing takes a second."""

News = Literal["images", "captions", "filter"]
"""The list of images is another, captions are others, or other images are shown."""


class ImageSession:
    """A folder as one browser looks at it."""

    def __init__(self, site: Site, t: Translate, path: Path, mask: str | None) -> None:
        self.site, self.t, self.path = site, t, path
        self.folder = ImageFolder(path, mask)
        self.editor = CaptionEditor(self.folder)
        self.sizes, self.mask_index = ImageSizes(), ImageIndex()
        self.query, self.is_uncaptioned = "", False
        self.tag: str | None = None
        self.busy_name = ""
        """The image that a model is captioning by itself."""
        self.names: list[str] = []
        """The images that the search leaves, in their order."""
        self._listeners: list[Callable[[News], None]] = []

    def listen(self, listener: Callable[[News], None]) -> None:
        """Call `listener` whenever something has changed."""
        self._listeners.append(listener)

    def tell(self, news: News) -> None:
        """Let every part of the page show the changes."""
        for listener in self._listeners:
            listener(news)

    async def read(self) -> None:
        """Read the folder again, in a thread; at first, show it before the captions of all images are read."""
        try:
            if not self.folder.images:
                await run.io_bound(self.folder.read_names)
                self._search()
                self.tell("images")
            await run.io_bound(self.folder.read)
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._search()
        self.tell("images")

    def filter(self, **changes: object) -> None:
        """Show other images: `query`, `tag` or `is_uncaptioned`."""
        for name, value in changes.items():
            setattr(self, name, value)
        self._search()
        self.tell("filter")

    def _search(self) -> None:
        self.names = self.folder.search(self.query, self.tag, self.is_uncaptioned)

    @property
    def captions(self) -> list[str]:
        """The captions of all images."""
        return [image.caption for image in self.folder.images.values()]

    @property
    def num_uncaptioned(self) -> int:
        return sum(not caption for caption in self.captions)

    async def edit(self, change: Change, names: Iterable[str] | None = None) -> None:
        """Change the captions of some images, or of all, and report the result."""
        previewed = self.editor.preview(change, self.folder.images if names is None else names)
        await self.apply(previewed)

    async def apply(self, previewed: dict[str, tuple[str, str]]) -> None:
        """Write the captions of a preview in a thread, and report the result."""
        with self._waiting(len(previewed)):
            result = await run.io_bound(self.editor.apply, previewed)
        self._say(result)

    async def undo(self) -> None:
        """Undo the last edit, and report the result."""
        with self._waiting(self.editor.undo_count):
            result = await run.io_bound(self.editor.undo)
        self._say(result)

    @contextmanager
    def _waiting(self, count: int) -> Iterator[None]:
        """Say that captions are being written, where that takes a while."""
        if count < MANY_CAPTIONS:
            yield
            return
        message = ui.notification(self.t("images.writing", count=count), spinner=True, timeout=None)
        try:
            yield
        finally:
            message.dismiss()

    def _say(self, result: EditResult | None) -> None:
        if result is None:  # the server is ending
            return
        ui.notify(self.t("images.changed", count=len(result.changed)), type="positive")
        problems = [problem for error in result.errors for problem in error.problems]
        if problems:
            # Of many files that changed meanwhile, the first tell enough.
            show_problems(ZImageTrainError(*problems[:MAX_MESSAGES]))
            if len(problems) > MAX_MESSAGES:
                ui.notify(self.t("images.and_more", count=len(problems) - MAX_MESSAGES), type="negative")
        self.tell("captions")

    async def move_away(self, paths: Iterable[Path], problem: Problem = MOVED_BY_HAND) -> None:
        """Move images into `_rejected`, and show the folder without them."""
        for path in paths:
            try:
                await run.io_bound(move_away, self.path, path, problem)
            except ZImageTrainError as error:
                show_problems(error)
        await self.read()

    async def move_back(self, path: Path) -> None:
        """Move an image back from `_rejected`."""
        try:
            await run.io_bound(move_back, self.path, path)
        except ZImageTrainError as error:
            show_problems(error)
        await self.read()
