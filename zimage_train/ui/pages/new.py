"""A new run: form and YAML side by side, the plan, and the start."""

import asyncio
from pathlib import Path
from typing import Any

from nicegui import events, run, ui

from zimage_train.commands import init
from zimage_train.config.templates import MODEL_TEMPLATES, SUBJECT_KINDS, render_template
from zimage_train.errors import Problem, ZImageTrainError
from zimage_train.io.progress import no_progress
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.ui import config_text, run_plan, run_state
from zimage_train.ui.config_text import CheckedText
from zimage_train.ui.jobs import name_in
from zimage_train.ui.layout import page_frame
from zimage_train.ui.pages.config_form import ConfigForm
from zimage_train.ui.pages.plan_view import show_plan
from zimage_train.ui.site import CLOSE, Site, run_address, show_problems
from zimage_train.ui.texts import Translate

MAX_UPLOAD_BYTES = 1_000_000
WAIT_SECONDS = 0.6
"""From the last change of the text to its plan."""


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/new")
    def new_page(clone: str = "", change: str = "", folder: str = "") -> None:
        with page_frame("new") as t:
            NewRunPage(site, t).build(clone, change, folder)


class NewRunPage:
    """The page of a run that is being written, for one browser."""

    def __init__(self, site: Site, t: Translate) -> None:
        self._site, self._t = site, t
        self._text = ""
        self._checked = CheckedText(None, {})
        self._planning: asyncio.Task[None] | None = None

    def build(self, clone: str, change: str, folder: str) -> None:
        """Build the page with the config of the run `clone`, in which `change`, a `key=value`, is made."""
        t = self._t
        ui.label(t("new.title")).classes("zt-title").props("role=heading aria-level=1")
        self._build_start(folder)
        with (
            ui.element("div")
            .classes("grid w-full gap-4")
            .style("grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); align-items: start")
        ):
            with ui.element("section").classes("zt-card"):
                self._form = ConfigForm(t, self._set)
            with ui.column().classes("w-full gap-4 md:sticky").style("top: 5.5rem"):
                self._build_text()
        self._show_text(self._first_text(clone, change))

    def _build_start(self, folder: str) -> None:
        t = self._t
        with ui.element("section").classes("zt-card"):
            ui.label(t("new.from_folder")).classes("zt-head")
            with ui.row().classes("w-full items-center gap-3"):
                self._folder = ui.input(t("new.folder"), value=folder).props("dense outlined").classes("grow")
                kinds = {name: t(f"kind.{name}") for name in SUBJECT_KINDS}
                self._kind = ui.select(kinds, value=next(iter(kinds)), label=t("new.kind")).props("dense outlined")
                models = {name: name for name in MODEL_TEMPLATES} | {"miniature": t("new.miniature")}
                self._model = ui.select(models, value="turbo", label=t("new.model")).props("dense outlined")
                ui.button(t("new.write"), icon="edit_note", on_click=self._write).props("no-caps outline color=link")
            ui.upload(
                label=t("new.drop"), auto_upload=True, max_file_size=MAX_UPLOAD_BYTES, on_upload=self._uploaded
            ).props('flat bordered accept=".yaml,.yml,.json,.toml"').classes("zt-drop w-full mt-3")

    def _build_text(self) -> None:
        t = self._t
        with ui.element("section").classes("zt-card"):
            ui.label(t("new.yaml")).classes("zt-head")
            self._editor = ui.codemirror(language="YAML", line_wrapping=True, indent="  ").classes("w-full")
            self._editor.style("height: 26rem").on_value_change(lambda event: self._typed(event.value))
            self._problems = ui.column().classes("w-full gap-1")
        with ui.element("section").classes("zt-card"):
            ui.label(t("plan.title")).classes("zt-head")
            with ui.row().classes("w-full items-center gap-3"):
                cards = {"": t("new.this_gpu")} | {name: card.label for name, card in GPU_SPECS.items()}
                self._card = ui.select(cards, value="", label=t("new.card"), with_input=True).props("dense outlined")
                self._card.classes("grow").on_value_change(lambda: self._plan_later())
                self._price = ui.number(t("new.price"), min=0, step=0.01).props("dense outlined").classes("w-28")
                self._price.on_value_change(lambda: self._plan_later())
            self._plan = ui.column().classes("w-full gap-1 mt-2")
        with ui.row().classes("items-center gap-3"):
            slots = {None: t("new.any_gpu")} | {slot: f"GPU {slot}" for slot in self._site.queue.slots if slot != "cpu"}
            self._gpu = ui.select(slots, value=None).props(f'dense outlined aria-label="{t("new.which_gpu")}"')
            self._gpu.set_visibility(len(slots) > 2)
            self._start = ui.button(t("new.start"), icon="play_arrow", on_click=self._queue).props("no-caps")

    def _first_text(self, clone: str, change: str) -> str:
        if not clone:
            return render_template("turbo", "character")
        try:
            text = self._site.queue.config_text(clone)
            if not self._site.queue.has_job(clone):
                text = config_text.without_defaults(text)
            text = config_text.set_value(text, ("name",), self._free_name(clone))
        except ZImageTrainError as error:
            show_problems(error)
            return render_template("turbo", "character")
        if not change:
            return text
        try:
            key, _, value = change.partition("=")
            return config_text.set_setting(text, key, config_text.parse_value(value))
        except ZImageTrainError as error:
            show_problems(error)
            return text

    def _free_name(self, name: str) -> str:
        """Return a name like `name` that no run has."""
        number = 2
        while self._site.queue.is_taken(f"{name}_{number}"):
            number += 1
        return f"{name}_{number}"

    async def _write(self) -> None:
        """Write the config that `zimage-train init` would write for the folder."""
        try:
            folder = Path(self._folder.value or "")
            resolved = self._site.workspace.contain(folder)
            if not folder.exists():  # `~`, which a config has no name for
                folder = resolved
            text = await run.io_bound(_config_for, folder, self._kind.value, self._model.value)
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._show_text(text or "")

    async def _uploaded(self, event: events.UploadEventArguments) -> None:
        content = await event.file.read()
        try:
            text, notes = config_text.convert_foreign(event.file.name, content.decode("utf-8-sig", "replace"))
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._show_text(text)
        for note in notes:
            ui.notify(note, type="info", multi_line=True, actions=CLOSE, timeout=0)

    def _set(self, path: Any, value: Any) -> None:
        """Take over a change of the form; `ConfigForm.REMOVED` removes the setting."""
        try:
            is_removed = value is ConfigForm.REMOVED
            text = (
                config_text.remove_value(self._text, path)
                if is_removed
                else (config_text.set_value(self._text, path, value))
            )
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._show_text(text)

    def _show_text(self, text: str) -> None:
        self._text = text
        if self._editor.value != text:
            self._editor.value = text
        self._check()

    def _typed(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._check()

    def _check(self) -> None:
        self._checked = config_text.check_text(self._text)
        problems = self._checked.problems
        self._form.show(self._checked)
        self._start.set_enabled(self._checked.config is not None)
        # The plan of a text that had no error stays, and is marked as such.
        self._plan.style("opacity: 1" if self._checked.config is not None else "opacity: 0.5")
        lines = sorted({problem.place.line for problem in problems if problem.place.line})
        total = self._text.count("\n") + 1
        marks = [{"kind": "line", "line": line, "class": "zt-bad-line"} for line in lines if line <= total]
        self._editor.decorations = marks
        self._problems.clear()
        with self._problems:
            for problem in problems:
                _problem_label(problem, lambda line: self._editor.reveal_line(line))
        self._plan_later()

    def _plan_later(self) -> None:
        """Plan the run when the text has rested, in place of a planning under way."""
        if self._planning is not None:
            self._planning.cancel()
        self._planning = asyncio.create_task(self._make_plan())

    async def _make_plan(self) -> None:
        await asyncio.sleep(WAIT_SECONDS)
        config = self._checked.config
        if config is None:
            return
        gpu, price = self._card.value or None, self._price.value
        plan = await asyncio.to_thread(run_plan.plan_run, config, gpu, price, no_progress)
        if config is self._checked.config:
            self._plan.clear()
            with self._plan:
                show_plan(plan, self._t, self._apply)

    def _apply(self, key: str, value: Any) -> None:
        """Set a setting that the plan proposes."""
        try:
            self._show_text(config_text.set_setting(self._text, key, value))
        except ZImageTrainError as error:
            show_problems(error)

    def _queue(self) -> None:
        try:
            name, text = name_in(self._text), self._text
            if run_state.is_run(self._site.workspace.run(name)):
                ui.notify(self._t("new.exists", name=name), type="negative", multi_line=True, actions=CLOSE, timeout=0)
                return
            assert self._checked.config is not None
            if Path(self._checked.config.output_dir).absolute() != self._site.workspace.runs:
                text = config_text.set_value(text, ("output_dir",), str(self._site.workspace.runs))
            self._site.queue.add(name, text, self._gpu.value)
        except ZImageTrainError as error:
            show_problems(error)
            return
        ui.navigate.to(run_address(name))


def _config_for(folder: Path, kind: str, model: str) -> str:
    """Return the config that `zimage-train init` writes for a folder."""
    summary = init.summarize_folder(folder, no_progress)
    is_miniature = model == "miniature"
    variant = "turbo" if is_miniature else model
    trigger = init.likely_trigger(summary.captions, summary.kohya) or SUBJECT_KINDS[kind].trigger
    values = init.template_values_for(
        summary, init.Answers(kind, variant, trigger, None), init.name_of(folder, None), is_miniature
    )
    return render_template(variant, kind, values)


def _problem_label(problem: Problem, reveal: Any) -> None:
    line = problem.place.line
    label = ui.label(str(problem)).style("color: var(--bad); overflow-wrap: anywhere")
    if line:
        label.props("role=button tabindex=0").classes("cursor-pointer").on("click", lambda: reveal(line))
