"""The panel that captions one image or all with a vision-language model."""

from pathlib import Path

from nicegui import run, ui

from zimage_train.config.templates import SUBJECT_KINDS
from zimage_train.dataset.caption_prompts import CAPTION_STYLES
from zimage_train.ui.caption_job import DEFAULT_MODEL, CaptionJob, CaptionWish
from zimage_train.ui.pages.image_session import ImageSession

POLL_SECONDS = 1.0

CaptionJobs = dict[Path, CaptionJob]
"""Folder -> its last captioning, whichever browser has started it."""


class CaptioningPanel:
    """Starts and stops captioning, and shows how far it is."""

    def __init__(self, session: ImageSession, jobs: CaptionJobs) -> None:
        self._session, self._jobs = session, jobs
        self._followed: CaptionJob | None = None
        """The job whose end this page waits for."""
        self._before: dict[str, str] = {}
        """Captions when it started, for the undo."""
        self._shown_done = 0

    def build(self) -> None:
        """Build the panel."""
        t = self._session.t
        self._panel = ui.expansion(t("images.captioning"), icon="auto_awesome").classes("w-full")
        with self._panel:
            self._model = ui.input(label=t("images.model"), value=DEFAULT_MODEL).props("dense outlined")
            self._style = ui.select(
                {name: t(f"images.style_{name}") for name in CAPTION_STYLES}, value="sentences", label=t("images.style")
            ).props("dense outlined")
            kinds = {"": t("images.any_kind")} | {name: t(f"images.kind_{name}") for name in SUBJECT_KINDS}
            self._kind = ui.select(kinds, value="", label=t("images.kind")).props("dense outlined")
            self._trigger = ui.input(label=t("images.trigger")).props("dense outlined clearable")
            self._replaces = ui.checkbox(t("images.replaces"))
            for part in (self._model, self._style, self._kind, self._trigger):
                part.classes("w-full")
            with ui.row().classes("gap-2"):
                self._start = ui.button(t("images.describe_all"), icon="auto_awesome", on_click=self.start)
                self._stop = ui.button(t("images.stop"), icon="stop", on_click=self.stop).props("outline")
                self._start.props("no-caps")
                self._stop.props("no-caps")
            self._bar = ui.linear_progress(0, show_value=False, size="8px").props("rounded")
            self._bar.props(f'aria-label="{t("images.captioning")}"')
            self._state = ui.label().props("role=status").classes("zt-quiet")
            self._log = ui.label().classes("zt-log").style("max-height: 9rem")
        ui.timer(POLL_SECONDS, self.refresh)
        self._show()

    async def start(self) -> None:
        """Caption the images of the folder."""
        self._begin(CaptionJob(self._session.path, self._wish(bool(self._replaces.value))))

    async def start_one(self, name: str) -> None:
        """Caption one image; its caption is replaced."""
        session = self._session
        image = session.folder.images.get(name)
        if image is None:
            return
        before = image.caption

        def save(caption: str) -> None:
            session.editor.save(name, caption, before)

        self._begin(CaptionJob(session.path, self._wish(True), image.path, save))

    def _wish(self, replaces: bool) -> CaptionWish:
        trigger = (self._trigger.value or "").strip() or None
        model = (self._model.value or "").strip() or DEFAULT_MODEL
        return CaptionWish(model, self._style.value, self._kind.value or None, trigger, replaces)

    def _begin(self, job: CaptionJob) -> None:
        running = self._job
        if running is not None and running.is_running:
            ui.notify(self._session.t("images.already_captioning"))
            return
        self._jobs[self._session.path] = job
        self._follow(job)
        job.start()
        if job.image is not None:
            self._session.busy_name = job.image.relative_to(self._session.path).as_posix()
            self._session.tell("captions")
        self._panel.open()
        self._show()

    def _follow(self, job: CaptionJob) -> None:
        self._followed, self._shown_done = job, 0
        self._before = {image.name: image.caption for image in self._session.folder.images.values()}

    @property
    def _job(self) -> CaptionJob | None:
        return self._jobs.get(self._session.path)

    async def stop(self) -> None:
        """Stop the captioning; finished captions stay."""
        job = self._job
        if job is not None:
            await run.io_bound(job.stop)
        self._show()

    async def refresh(self) -> None:
        """Show how far the captioning is, and the captions that it has written."""
        job = self._job
        if job is not None and job.is_running and self._followed is not job:
            self._follow(job)
        followed = self._followed
        if followed is None:
            return
        self._show()
        has_ended = not followed.is_running
        if not has_ended and followed.done == self._shown_done:
            return
        self._shown_done = followed.done
        await run.io_bound(self._session.folder.read_captions, list(self._session.folder.images))
        if has_ended:
            self._end(followed)
        self._session.tell("captions")

    def _end(self, job: CaptionJob) -> None:
        """Let the captions of a whole folder be undone; that of a single image can be already."""
        self._followed, self._session.busy_name = None, ""
        if job.image is None:
            after = {image.name: image.caption for image in self._session.folder.images.values()}
            changes = {name: (text, after.get(name, text)) for name, text in self._before.items()}
            self._session.editor.record(changes)

    def _show(self) -> None:
        t, job = self._session.t, self._job
        is_running = job is not None and job.is_running
        self._start.set_enabled(not is_running)
        for part in (self._stop, self._bar):
            part.set_visibility(is_running)
        if job is None:
            self._state.text = t("images.captioning_hint")
            self._log.set_visibility(False)
            return
        self._bar.value = job.done / job.total if job.total else 0
        self._state.text = self._describe(job)
        lines = [*job.lines[-6:], *job.errors]
        self._log.text = "\n".join(lines)
        self._log.set_visibility(bool(lines))

    def _describe(self, job: CaptionJob) -> str:
        t = self._session.t
        if job.is_running:
            return t("images.captioning_at", done=job.done, total=job.total) if job.total else t("images.loading_model")
        if job.is_stopped:
            return t("images.captioning_stopped", done=job.done)
        return t("images.captioning_failed" if job.errors else "images.captioning_done", done=job.done)
