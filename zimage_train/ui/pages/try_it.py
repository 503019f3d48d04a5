"""Sampling with a LoRA: the form. `try_results` shows the images."""

import secrets
from pathlib import Path
from typing import Any

from nicegui import events, run, ui
from pydantic import ValidationError

from zimage_train.config.variants import VARIANTS
from zimage_train.errors import ZImageTrainError
from zimage_train.io.units import format_bytes
from zimage_train.report.preview_images import NAME, request_of
from zimage_train.ui import run_state
from zimage_train.ui.layout import page_frame
from zimage_train.ui.lora_files import list_loras, loras_of_run
from zimage_train.ui.pages.buttons import icon_button
from zimage_train.ui.pages.lora_rows import LoraRows
from zimage_train.ui.pages.try_results import SampleResults
from zimage_train.ui.sample_request import (
    SampleLora,
    SampleRequest,
    config_of,
    invalid_request,
    previews_of_run,
    resolve,
    run_loras,
)
from zimage_train.ui.sampling import Sample
from zimage_train.ui.sampling_memory import MemoryNeeds, memory_needs
from zimage_train.ui.site import Site, show_problems
from zimage_train.ui.texts import Translate

NOTE_SECONDS = 1.0
RUN, OTHER = "run:", "other"
MAX_SEED = 2**32


def register(site: Site) -> None:
    """Add the page; `?run=NAME&preview=FILE` opens it with the settings of a run and of one of its previews."""

    @ui.page("/try")
    def try_it_page(run: str = "", preview: str = "") -> None:
        with page_frame("try") as t:
            ui.label(t("nav.try")).classes("zt-title").props("role=heading aria-level=1")
            TryPage(site, t).build(run, preview)


class TryPage:
    """The page for one browser."""

    def __init__(self, site: Site, t: Translate) -> None:
        self._site, self._t = site, t
        self._runs = {state.name for state in run_state.list_runs(site.workspace.runs) if _has_config(state.folder)}
        self._rows = LoraRows(t, t("try.no_loras"))
        self._noted: Any = None
        """The request whose memory the note tells."""

    def build(self, run_name: str, preview: str) -> None:
        """Build the form and the results."""
        with ui.element("div").classes("zt-try"):
            ui.add_css(".zt-try { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); width: 100%; }")
            ui.add_css("@media (min-width: 900px) { .zt-try { grid-template-columns: 380px minmax(0, 1fr); } }")
            with ui.element("section").classes("zt-card self-start"), ui.column().classes("w-full gap-3"):
                self._build_form()
            with ui.column().classes("w-full gap-4"):
                SampleResults(self._site, self._t, self.use).build()
        first = next(iter(self._runs_in_order()), None)
        chosen = run_name if run_name in self._runs else first
        if chosen is not None:
            self._model.value = RUN + chosen
            if NAME.fullmatch(preview):
                self._use_preview_file(chosen, preview)
        ui.timer(0.05, self._list_loras, once=True)
        ui.timer(NOTE_SECONDS, self._note_memory)
        ui.keyboard(on_key=self._key, ignore=[])

    def _runs_in_order(self) -> list[str]:
        states = run_state.list_runs(self._site.workspace.runs)
        return [state.name for state in states if state.name in self._runs]

    def _build_form(self) -> None:
        t = self._t
        models = {RUN + name: t("try.run", name=name) for name in self._runs_in_order()}
        models |= {name: t(f"try.{name}") for name in (*VARIANTS, OTHER)}
        self._model = ui.select(models, value="turbo", label=t("try.model"), on_change=self._choose_model)
        self._model.props("dense outlined").classes("w-full")
        with ui.column().classes("w-full gap-2").bind_visibility_from(self._model, "value", lambda name: name == OTHER):
            self._path = ui.input(t("try.path")).props("dense outlined").classes("w-full")
            with ui.row().classes("w-full gap-2 no-wrap"):
                variants = {name: t(f"try.{name}") for name in VARIANTS}
                self._variant = ui.select(variants, value="turbo", label=t("try.variant"))
                self._dtype = ui.select(["bf16", "fp32"], value="bf16", label=t("try.dtype"))
                for choice in (self._variant, self._dtype):
                    choice.props("dense outlined").classes("flex-1")
        self._preview = ui.select({}, label=t("try.preview"), on_change=self._choose_preview)
        self._preview.props("dense outlined options-dense").classes("w-full")
        self._prompt = ui.textarea(t("try.prompt")).props("dense outlined autogrow").classes("w-full")
        self._negative = ui.input(t("try.negative")).props(f'dense outlined hint="{t("try.negative_hint")}"')
        self._negative.classes("w-full")
        with ui.row().classes("w-full gap-2 no-wrap items-center"):
            self._seed = self._number("try.seed", 42, 1, 0)
            icon_button("casino", t("try.dice"), self._draw_seed)
        with ui.element("div").classes("grid grid-cols-2 gap-2 w-full"):
            self._width = self._number("try.width", 1024, 16, 32)
            self._height = self._number("try.height", 1024, 16, 32)
            self._steps = self._number("try.steps", None, 1, 1)
            self._guidance = self._number("try.guidance", None, 0.5, 0)
        for field in (self._steps, self._guidance):
            field.props(f'placeholder="{t("try.auto")}" stack-label clearable')
        ui.label(t("try.loras")).classes("zt-head")
        self._rows.build()
        self._base = ui.checkbox(t("try.with_base"), value=True)
        self._note = ui.label().classes("zt-quiet text-sm")
        self._warning = ui.label().classes("text-sm").style("color: var(--bad)")
        draw = ui.button(t("try.draw"), icon="brush", on_click=self._draw).classes("w-full")
        draw.props('no-caps title="Ctrl+Enter"')

    def _number(self, key: str, value: float | None, step: float, least: float) -> ui.number:
        field = ui.number(self._t(key), value=value, step=step, min=least).props("dense outlined")
        return field.classes("flex-1 w-full")

    def _draw_seed(self) -> None:
        self._seed.value = secrets.randbelow(MAX_SEED)

    def _key(self, event: events.KeyEventArguments) -> Any:
        if event.action.keydown and event.key == "Enter" and event.modifiers.ctrl:
            return self._draw()
        return None

    @property
    def _run(self) -> str | None:
        chosen = self._model.value or ""
        return chosen.removeprefix(RUN) if chosen.startswith(RUN) else None

    def _choose_model(self) -> None:
        """Take over the settings of the chosen run's previews."""
        name = self._run
        self._preview.set_visibility(name is not None)
        if name is None:
            self._preview.set_options({}, value=None)
            return
        try:
            config = config_of(self._site.workspace, name)
            loras = run_loras(self._site.workspace, name, config)
            previews = previews_of_run(self._site.workspace, name)
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._width.value, self._height.value = config.sample.width, config.sample.height
        self._preview.set_options({number: request.prompt for number, request in enumerate(previews)}, value=None)
        if previews and not self._prompt.value:
            self._preview.value = 0
        self._preview.set_visibility(bool(previews))
        self._rows.set(loras)

    def _choose_preview(self) -> None:
        name, number = self._run, self._preview.value
        if name is None or number is None:
            return
        request = previews_of_run(self._site.workspace, name)[number]
        self._fill(request.prompt, request.negative, request.seed, request.width, request.height)
        self._steps.value = self._guidance.value = None  # as the run has them

    def _use_preview_file(self, name: str, file: str) -> None:
        """Take the settings that a preview's image has in its metadata, and the LoRA of its step."""
        folder = self._site.workspace.run(name)
        try:
            request = request_of(folder / "samples" / file)
        except ZImageTrainError as error:
            show_problems(error)
            return
        self._fill(request.prompt, request.negative, request.seed, request.width, request.height)
        self._steps.value, self._guidance.value = request.steps, request.guidance
        step = file.partition("-")[0]
        of_step = [path for path in loras_of_run(folder) if path.stem == f"{name}-{step}"]
        is_last = int(step) == run_state.read_run(folder).steps
        if of_step and self._rows.loras:
            self._rows.set([SampleLora(file=str(of_step[0])), *self._rows.loras[1:]])
        elif not is_last:
            ui.notify(self._t("try.no_lora_of_step", step=int(step)), type="warning")

    def _fill(self, prompt: str, negative: str, seed: int, width: int, height: int) -> None:
        self._prompt.value, self._negative.value, self._seed.value = prompt, negative, seed
        self._width.value, self._height.value = width, height

    def use(self, sample: Sample) -> None:
        """Fill the form with the settings of an image."""
        asked, request = sample.asked, sample.drawing.sampling
        if asked.run is not None and asked.run in self._runs:
            self._model.value = RUN + asked.run
        elif asked.model in VARIANTS:
            self._model.value = asked.model
        else:
            self._model.value, self._path.value = OTHER, asked.model
            self._variant.value, self._dtype.value = asked.variant, asked.dtype
        self._preview.value = None
        self._fill(request.prompt, request.negative, request.seed, request.width, request.height)
        self._steps.value, self._guidance.value = asked.steps, asked.guidance
        self._base.value = asked.base
        self._rows.set([SampleLora(file=file, weight=weight) for file, weight in sample.drawing.loras])

    async def _list_loras(self) -> None:
        choices = await run.io_bound(list_loras, self._site.workspace)
        self._rows.labels = {str(choice.path): choice.label for choice in choices or []}
        self._rows.show()

    def _asked(self) -> SampleRequest:
        """Return the request of the form.

        Raises:
            ConfigError: a value is none that a request can have.
        """
        model = self._model.value or ""
        values = {
            "run": self._run,
            "model": (self._path.value or "") if model == OTHER else model,
            "prompt": self._prompt.value or "",
            "negative": self._negative.value or "",
            "seed": _whole(self._seed.value, 42),
            "width": _whole(self._width.value, None),
            "height": _whole(self._height.value, None),
            "steps": _whole(self._steps.value, None),
            "guidance": self._guidance.value,
            "loras": [lora.model_dump() for lora in self._rows.loras],
            "base": bool(self._base.value and self._rows.loras),
        }
        if self._run is not None:
            values["model"] = "turbo"
        if model == OTHER:
            values |= {"variant": self._variant.value, "dtype": self._dtype.value}
        try:
            return SampleRequest.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error.errors()) from None

    async def _draw(self) -> None:
        try:
            await run.io_bound(self._site.sampler.submit, self._asked())
        except ZImageTrainError as error:
            show_problems(error)

    async def _note_memory(self) -> None:
        """Show the memory that the image in the form needs, and the runs that train beside it."""
        try:
            asked = self._asked()
            key = (asked, tuple(self._site.queue.busy().values()))
            if key == self._noted:
                return
            self._noted = key
            needs = await run.io_bound(self._needs, asked)
        except ZImageTrainError:
            needs = None  # drawing says what is wrong
        self._show_needs(needs)

    def _needs(self, asked: SampleRequest) -> MemoryNeeds:
        drawing = resolve(asked, self._site.workspace)
        return memory_needs(drawing, self._site.queue, self._site.machine(), self._site.sampler.slot)

    def _show_needs(self, needs: MemoryNeeds | None) -> None:
        t, notes, warnings = self._t, [], []
        if needs is not None:
            if not needs.is_downloaded:
                notes.append(t("try.needs_download"))
            if needs.needed_bytes is not None and needs.free_bytes is not None:
                needed, free = format_bytes(needs.needed_bytes), format_bytes(needs.free_bytes)
                notes.append(t("try.needs", needed=needed, free=free))
            if needs.training:
                warnings.append(t("try.beside", names=", ".join(needs.training)))
            if needs.is_tight:
                warnings.append(t("try.tight"))
        self._note.text, self._warning.text = " ".join(notes), " ".join(warnings)


def _has_config(folder: Path) -> bool:
    return (folder / "config.yaml").exists()


def _whole(value: float | None, default: int | None) -> int | None:
    return default if value is None else int(value)
