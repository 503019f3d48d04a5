"""A run: its curves, previews, log and files, live."""

from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from zimage_train.training.requests import RequestName
from zimage_train.ui import run_state
from zimage_train.ui.charts import Points, chart_options, curve, histogram_options
from zimage_train.ui.findings import Finding, findings_of
from zimage_train.ui.layout import page_frame
from zimage_train.ui.media import archive_url, download_url, page_url
from zimage_train.ui.pages.findings_view import show_findings
from zimage_train.ui.pages.preview_panel import PreviewPanel
from zimage_train.ui.pages.runs import confirmed, note_of
from zimage_train.ui.run_state import RunState
from zimage_train.ui.site import Site, told
from zimage_train.ui.texts import Translate
from zimage_train.ui.workspace import RUN_NAME

REFRESH_SECONDS = 2.0
CURVES = (
    ("loss", "records"),
    ("lr", "records"),
    ("grad_norm", "records"),
    ("drift", "events"),
    ("validation", "validations"),
    ("gb", "records"),
)
"""(name of a curve, where its values are)."""
LAST_SIGMAS = 5000
MAX_FILES = 40
SMOOTHING = {0.0: "0", 0.6: "0.6", 0.9: "0.9", 0.98: "0.98"}


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/run/{name}")
    def run_page(name: str) -> None:
        with page_frame("runs") as t:
            waits = any(job.name == name for job in site.queue.waiting())
            if not RUN_NAME.fullmatch(name) or not (waits or run_state.is_run(site.workspace.run(name))):
                ui.label(t("run.missing", name=name)).classes("zt-title")
                return
            RunPage(site, name, t).build()


class RunPage:
    """The page of a run for one browser."""

    def __init__(self, site: Site, name: str, t: Translate) -> None:
        self._site, self._name, self._t = site, name, t
        self._folder = site.workspace.run(name)
        self._smoothing, self._is_log = 0.9, False
        self._others: list[str] = []
        self._previews = PreviewPanel(self._folder, t)
        self._acting_on: tuple[str, bool] | None = None
        """What the buttons are for: the state, and whether there are previews."""
        self._found: list[Finding] = []
        self._listed: list[Path] = []
        """The files that the page lists."""
        self._shown: Any = None
        """The state that the page shows; nothing is sent while it stays the same."""

    def build(self) -> None:
        t = self._t
        with ui.row().classes("w-full items-center justify-between"):
            with ui.row().classes("items-center gap-3"):
                ui.label(self._name).classes("zt-title").props("role=heading aria-level=1")
                self._status = ui.label()
            self._actions = ui.row().classes("gap-1")
        self._bar = ui.linear_progress(show_value=False, size="8px").props(f'rounded aria-label="{t("runs.step")}"')
        self._note = ui.label().classes("zt-quiet").style("white-space: pre-wrap")
        self._findings = ui.column().classes("w-full gap-1")
        self._previews.build()
        self._build_charts()
        with ui.element("section").classes("zt-card"):
            ui.label(t("run.log")).classes("zt-head")
            with ui.element("div").classes("zt-log flex flex-col-reverse flex-nowrap").props("role=log tabindex=0"):
                self._log = ui.label()  # in a reversed column, so that its end is in sight as it grows
        with ui.element("section").classes("zt-card"):
            ui.label(t("run.files")).classes("zt-head")
            self._files = ui.column().classes("gap-1")
        self.refresh()
        ui.timer(REFRESH_SECONDS, self.refresh)

    def _build_charts(self) -> None:
        t = self._t
        with ui.element("section").classes("zt-card"):
            with ui.row().classes("w-full items-center gap-4"):
                ui.label(t("run.curves")).classes("zt-head")
                smoothing = ui.select(SMOOTHING, value=self._smoothing, label=t("run.smoothing")).props(
                    "dense outlined"
                )
                smoothing.classes("w-28").on_value_change(lambda event: self._set(smoothing=event.value))
                ui.checkbox(t("run.log_axis")).on_value_change(lambda event: self._set(is_log=event.value))
                names = [
                    state.name for state in run_state.list_runs(self._site.workspace.runs) if state.name != self._name
                ]
                others = ui.select(names, value=[], multiple=True, label=t("run.over")).props(
                    "dense outlined use-chips"
                )
                others.classes("min-w-40").on_value_change(lambda event: self._set(others=event.value))
            with (
                ui.element("div")
                .classes("grid w-full gap-2")
                .style("grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr))")
            ):
                self._charts = {name: ui.echart({}).classes("h-56 w-full") for name, _ in CURVES}
                self._sigmas = ui.echart({}).classes("h-56 w-full")

    def _set(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, f"_{name}", value)
        self._draw_charts()

    def refresh(self) -> None:
        """Show the present state of the folder."""
        state = run_state.read_run(self._folder)
        previews = run_state.previews_of(self._folder)
        waits = any(job.name == self._name for job in self._site.queue.waiting())
        shown = (state, previews, waits)
        if shown == self._shown:
            return
        before, self._shown = self._shown, shown
        if not (waits or run_state.is_run(self._folder)):
            self._show_gone()
            return
        self._show_state(state, waits, bool(previews))
        if before is None or before[1] != shown[1]:
            self._previews.show(previews)
        if before is None or before[0].changed_at != state.changed_at:
            self._draw_charts()
            self._show_findings(state)
            self._show_files()

    def _show_state(self, state: RunState, waits: bool, has_previews: bool) -> None:
        t = self._t
        status = "waiting" if waits else state.status
        self._status.text = t(f"status.{status.replace(' ', '_')}")
        self._status.classes(replace=f"zt-status zt-status-{status.split(' ')[0]}")
        self._bar.value = state.fraction
        progress = f"{state.step} / {state.steps}" if state.steps else ""
        self._note.text = " · ".join(part for part in (progress, _pace(self._folder, state, t), note_of(state)) if part)
        self._log.text = "\n".join(run_state.log_tail(self._folder, state.output))
        self._show_actions(status, has_previews)

    def _show_actions(self, status: str, has_previews: bool) -> None:
        """Show the buttons for a state; as long as they stay the same, so does the keyboard's focus on them."""
        if (status, has_previews) == self._acting_on:
            return
        self._acting_on = (status, has_previews)
        name = quote(self._name, safe="")
        self._actions.clear()
        with self._actions:
            if status == "running":
                self._button("save_now", "save", partial(self._ask, "save"))
                if has_previews:
                    self._button("preview_now", "add_photo_alternate", partial(self._ask, "preview"))
            if status in ("running", "starting", "waiting"):
                self._button("stop", "stop_circle", told(self._site.queue.stop, self._name))
            elif status != "done":
                self._button("continue", "play_arrow", told(self._site.queue.resume, self._name))
            if has_previews or status == "done":
                self._button("try", "auto_awesome", lambda: ui.navigate.to(f"/try?run={name}"))
            self._button("clone", "content_copy", lambda: ui.navigate.to(f"/new?clone={name}"))
            if status not in ("running", "starting"):
                self._button("delete", "delete_outline", self._delete)

    def _show_gone(self) -> None:
        """Say that the folder of the run is gone."""
        self._status.text, self._acting_on = "", None
        self._status.classes(replace="")
        self._note.text = self._t("run.missing", name=self._name)
        self._actions.clear()

    def _button(self, key: str, icon: str, action: Any) -> None:
        ui.button(self._t(f"runs.{key}"), icon=icon, on_click=action).props("flat no-caps dense color=link")

    def _ask(self, request: RequestName) -> None:
        if told(self._site.queue.ask, self._name, request)():
            ui.notify(self._t(f"asked.{request}"))

    async def _delete(self) -> None:
        question = self._t("runs.delete_question", name=self._name)
        if await confirmed(question, self._t("runs.delete"), self._t) and told(self._site.queue.delete, self._name)():
            ui.navigate.to("/")

    def _draw_charts(self) -> None:
        folders = {self._name: self._folder}
        folders |= {name: self._site.workspace.run(name) for name in self._others}
        for name, source in CURVES:
            curves: dict[str, Points] = {}
            for run, folder in folders.items():
                points = _points(folder, name, source)
                if len(points) > 1:
                    curves[run] = points
            chart = self._charts[name]
            chart.set_visibility(bool(curves))
            if curves:
                smoothing = self._smoothing if name in ("loss", "grad_norm") else 0.0
                title = self._t(f"curve.{name}")
                options = chart_options(curves, smoothing, self._is_log and name != "lr", title, len(folders) > 1)
                chart.options.clear()
                chart.options.update(options)
        sigmas: list[float] = []
        for record in run_state.records_of(self._folder):
            value = record.get("sigma", [])
            sigmas += value if isinstance(value, list) else [value]
        self._sigmas.set_visibility(bool(sigmas))
        self._sigmas.options.clear()
        self._sigmas.options.update(histogram_options(sigmas[-LAST_SIGMAS:], self._t("curve.sigma")))

    def _show_findings(self, state: RunState) -> None:
        found = findings_of(state)
        if found != self._found:
            self._found = found
            self._findings.clear()
            with self._findings:
                show_findings(state, found, self._t)

    def _show_files(self) -> None:
        lora = self._folder / "lora"
        paths = [path for path in (self._folder / "report.html", self._folder / "config.yaml") if path.exists()]
        paths += [*sorted(lora.glob(f"{self._name}.*json")), *sorted(lora.rglob("*.safetensors"), reverse=True)]
        if paths == self._listed:
            return
        self._listed = paths
        self._files.clear()
        with self._files:
            ui.link(self._t("run.archive"), archive_url(self._name)).classes("zt-link")
            for path in paths[:MAX_FILES]:
                address = page_url(path) if path.name == "report.html" else download_url(path)
                ui.link(str(path.relative_to(self._folder)), address).classes("zt-link")
            if len(paths) > MAX_FILES:
                ui.label(self._t("run.more_files", count=len(paths) - MAX_FILES)).classes("zt-quiet")


def _points(folder: Any, name: str, source: str) -> Points:
    if source == "records":
        return curve(run_state.records_of(folder), name)
    events_there = run_state.events_of(folder)
    if source == "validations":
        return curve([event for event in events_there if event.get("event") == "validation"], "loss")
    return curve(events_there, name)


def _pace(folder: Any, state: RunState, t: Translate) -> str:
    """Return the time of a step and the remaining time, from the last steps."""
    seconds = [record["seconds"] for record in run_state.records_of(folder)[-20:] if "seconds" in record]
    if not seconds or state.status != "running":
        return ""
    mean = sum(seconds) / len(seconds)
    minutes = round(mean * (state.steps - state.step) / 60)
    if minutes == 0:
        return t("run.pace_soon", seconds=f"{mean:.2f}")
    return t("run.pace", seconds=f"{mean:.2f}", minutes=minutes)
