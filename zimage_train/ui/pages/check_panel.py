"""The panel of a folder's problems, each with a button for its fix, and of images that are nearly equal."""

from functools import partial
from pathlib import Path

from nicegui import run, ui

from zimage_train.errors import ZImageTrainError
from zimage_train.ui.caption_edits import spelling_trigger, writing_where_empty
from zimage_train.ui.folder_check import DuplicatePair, FolderCheck, FolderProblem, list_moved
from zimage_train.ui.media import small_url
from zimage_train.ui.pages.image_session import ImageSession, News
from zimage_train.ui.site import show_problems

MAX_PROBLEMS, MAX_PAIRS, MAX_MOVED = 40, 24, 24
POLL_SECONDS = 0.5
THUMBNAIL_PX = 192
CSS = """
.zt-problem { border-left: 3px solid #b7791f; padding: .1rem 0 .1rem .5rem; font-size: .85rem; width: 100%;
  overflow-wrap: anywhere; }
.zt-problem-error { border-color: var(--bad); }
.zt-pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; width: 100%; border-top: 1px solid var(--line);
  padding-top: .5rem; font-size: .8rem; overflow-wrap: anywhere; }
.zt-pair img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--soft); border-radius: 6px; }
"""


class CheckPanel:
    """Checks the folder on request, and lists its problems."""

    def __init__(self, session: ImageSession) -> None:
        self._session = session
        self._check: FolderCheck | None = None
        self._is_running = False

    def build(self) -> None:
        """Build the panels."""
        t = self._session.t
        self._panel = ui.expansion(t("images.problems"), icon="rule").classes("w-full")
        with self._panel:
            self._trigger = ui.input(label=t("images.trigger")).props("dense outlined clearable").classes("w-full")
            self._button = ui.button(t("images.check"), icon="fact_check", on_click=self.run).props("no-caps")
            self._bar = ui.linear_progress(0, show_value=False, size="8px").props("rounded")
            self._bar.props(f'aria-label="{t("images.check")}"').set_visibility(False)
            self._problems = ui.column().classes("w-full gap-2")
        self._pairs_panel = ui.expansion(t("images.duplicates"), icon="content_copy").classes("w-full")
        with self._pairs_panel:
            self._pairs = ui.column().classes("w-full gap-2")
            with self._pairs:
                ui.label(t("images.check_first")).classes("zt-quiet")
        self._moved_panel = ui.expansion(t("images.moved"), icon="drive_file_move").classes("w-full")
        with self._moved_panel:
            self._moved = ui.column().classes("w-full gap-2")
        self._timer = ui.timer(POLL_SECONDS, self._show_progress, active=False)
        self._session.listen(self._hear)
        self._draw_moved()

    def _hear(self, news: News) -> None:
        if news == "images":
            self._draw_moved()

    async def run(self) -> None:
        """Check every image in a thread."""
        if self._is_running:
            return
        session = self._session
        self._is_running = True
        check = self._check = FolderCheck(session.folder, (self._trigger.value or "").strip() or None)
        self._button.disable()
        self._bar.set_visibility(True)
        self._timer.activate()
        try:
            await run.io_bound(check.run)
        except ZImageTrainError as error:
            show_problems(error)
        finally:
            self._is_running = False
            self._timer.deactivate()
            self._bar.set_visibility(False)
            self._button.enable()
        self._draw(check)

    def _show_progress(self) -> None:
        if self._check is not None and self._check.total:
            self._bar.value = self._check.done / self._check.total

    def _draw(self, check: FolderCheck) -> None:
        t = self._session.t
        self._panel.text = f"{t('images.problems')} ({len(check.problems)})"
        self._problems.clear()
        with self._problems:
            if not check.problems:
                ui.label(t("images.no_problems", count=check.num_images)).classes("zt-quiet")
            unusable = [one for one in check.problems if one.fix == "move" and len(one.files) == 1]
            if len(unusable) > 1:
                ui.button(t("images.move_all", count=len(unusable)), on_click=partial(self._move_all, unusable)).props(
                    "flat dense no-caps"
                )
            for problem in check.problems[:MAX_PROBLEMS]:
                self._draw_problem(problem)
            self._draw_more(len(check.problems) - MAX_PROBLEMS)
        self._draw_pairs(check.pairs)

    def _draw_problem(self, problem: FolderProblem) -> None:
        t = self._session.t
        with ui.element("div").classes("zt-problem" + (" zt-problem-error" if problem.is_error else "")):
            ui.label(problem.text.replace(f"{self._session.path}/", ""))
            if problem.fix == "move":
                for path in problem.files:
                    text = t("images.move") if len(problem.files) == 1 else t("images.move_name", name=path.name)
                    ui.button(text, on_click=partial(self._move, path, problem)).props("flat dense no-caps")
            elif problem.fix == "write":
                ui.button(t("images.write_trigger"), on_click=self._write_trigger).props("flat dense no-caps")
                ui.button(t("images.show_uncaptioned"), on_click=self._show_uncaptioned).props("flat dense no-caps")
            elif problem.fix == "spell":
                ui.button(t("images.spell_trigger"), on_click=self._spell_trigger).props("flat dense no-caps")
            elif problem.fix == "trigger":
                ui.button(t("images.give_trigger"), on_click=lambda: self._trigger.run_method("focus")).props(
                    "flat dense no-caps"
                )

    def _draw_more(self, count: int) -> None:
        if count > 0:
            ui.label(self._session.t("images.and_more", count=count)).classes("zt-quiet")

    def _draw_pairs(self, pairs: list[DuplicatePair]) -> None:
        t = self._session.t
        self._pairs_panel.text = f"{t('images.duplicates')} ({len(pairs)})"
        self._pairs.clear()
        with self._pairs:
            if not pairs:
                ui.label(t("images.no_duplicates")).classes("zt-quiet")
            for pair in pairs[:MAX_PAIRS]:
                ui.label(t("images.equal" if pair.is_equal else "images.similar")).classes("zt-quiet text-xs")
                with ui.element("div").classes("zt-pair"):
                    for path in (pair.earlier, pair.later):
                        self._draw_half(path)
            self._draw_more(len(pairs) - MAX_PAIRS)

    def _draw_half(self, path: Path) -> None:
        session, t = self._session, self._session.t
        name = path.relative_to(session.path).as_posix()
        image = session.folder.images.get(name)
        size = session.sizes.get(path)
        with ui.element("div"):
            if size is not None:
                _thumbnail(path)
            ui.label(name).classes("zt-head")
            ui.label(f"{size[0]} × {size[1]}" if size else t("images.unreadable")).classes("zt-quiet")
            ui.label(image.caption if image else "").classes("zt-quiet")
            ui.button(t("images.move"), on_click=partial(self._move, path)).props("flat dense no-caps").props(
                f'aria-label="{t("images.move")} {name}"'
            )

    def _draw_moved(self) -> None:
        session, t = self._session, self._session.t
        moved = list_moved(session.path)
        self._moved_panel.text = f"{t('images.moved')} ({len(moved)})"
        self._moved_panel.set_visibility(bool(moved))
        self._moved.clear()
        with self._moved:
            ui.label(t("images.moved_hint")).classes("zt-quiet text-xs")
            for image in moved[:MAX_MOVED]:
                with ui.element("div").classes("zt-pair"):
                    with ui.element("div"):
                        _thumbnail(image.path)
                    with ui.element("div"):
                        ui.label(image.name).classes("zt-head")
                        ui.label(image.caption).classes("zt-quiet")
                        ui.button(t("images.move_back"), on_click=partial(session.move_back, image.path)).props(
                            "flat dense no-caps"
                        )
            self._draw_more(len(moved) - MAX_MOVED)

    async def _move(self, path: Path, problem: FolderProblem | None = None) -> None:
        if problem is None:
            await self._session.move_away([path])
        else:
            await self._session.move_away([path], problem.problem)
        await self.run()

    async def _move_all(self, problems: list[FolderProblem]) -> None:
        for problem in problems:
            await self._session.move_away(problem.files, problem.problem)
        await self.run()

    async def _write_trigger(self) -> None:
        trigger = (self._trigger.value or "").strip()
        if not trigger:
            ui.notify(self._session.t("images.give_trigger"))
            self._trigger.run_method("focus")
            return
        await self._session.edit(writing_where_empty(trigger))
        await self.run()

    async def _spell_trigger(self) -> None:
        trigger = (self._trigger.value or "").strip()
        if trigger:
            await self._session.edit(spelling_trigger(trigger))
            await self.run()

    def _show_uncaptioned(self) -> None:
        self._session.filter(is_uncaptioned=True)


def _thumbnail(path: Path) -> None:
    ui.element("img").props(f'src="{small_url(path, THUMBNAIL_PX)}" loading=lazy alt="{path.stem}"')
