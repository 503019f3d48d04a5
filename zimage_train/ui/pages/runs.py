"""The list of runs: state, progress, actions."""

import time
from typing import Any
from urllib.parse import quote

from nicegui import events, ui

from zimage_train.io.units import format_bytes
from zimage_train.ui import run_state
from zimage_train.ui.layout import page_frame
from zimage_train.ui.media import small_url
from zimage_train.ui.run_state import RunState
from zimage_train.ui.site import Site, run_address, told
from zimage_train.ui.texts import Translate

REFRESH_SECONDS = 1.5
ROWS_A_PAGE = 25
BODY = """
<q-tr :props="props" @click="$parent.$emit('open', props.row.name)" style="cursor: pointer">
  <q-td key="picture" :props="props" style="width: 60px">
    <img v-if="props.row.picture" :src="props.row.picture" width="56" height="56" loading="lazy" alt=""
         style="border-radius: 6px; object-fit: cover; display: block">
  </q-td>
  <q-td key="name" :props="props">
    <a class="zt-link" :href="'/run/' + encodeURIComponent(props.row.name)" @click.stop>{{ props.row.name }}</a>
    <div class="zt-quiet" style="font-size: .8rem; white-space: normal">{{ props.row.note }}</div>
  </q-td>
  <q-td key="status" :props="props">
    <span :class="'zt-status zt-status-' + props.row.status.split(' ')[0]">{{ props.row.label }}</span>
  </q-td>
  <q-td key="step" :props="props" style="min-width: 90px">
    <q-linear-progress :value="props.row.fraction" rounded size="6px" :aria-label="props.row.progress" />
    <span class="zt-quiet" style="font-size: .8rem">{{ props.row.progress }}</span>
  </q-td>
  <q-td key="loss" :props="props">{{ props.row.loss }}</q-td>
  <q-td key="changed" :props="props">{{ props.row.changed }}</q-td>
  <q-td key="actions" :props="props" @click.stop>
    <q-btn v-for="action in props.row.actions" :key="action.name" flat round dense size="sm" :icon="action.icon"
           :aria-label="action.label + ' ' + props.row.name"
           @click="$parent.$emit('act', { action: action.name, name: props.row.name })">
      <q-tooltip>{{ action.label }}</q-tooltip>
    </q-btn>
  </q-td>
</q-tr>
"""
CSS = """
@media (max-width: 700px) {
  .zt-runs :is(th, td):is(:nth-child(5), :nth-child(6)) { display: none; }
  .zt-runs th, .zt-runs td { padding: 4px 6px; }
  .zt-runs { padding: .3rem; }
}
"""
"""A small screen shows neither loss nor time."""
ICONS = {
    "stop": "stop_circle",
    "continue": "play_arrow",
    "clone": "content_copy",
    "delete": "delete_outline",
    "up": "arrow_upward",
}


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/")
    def runs_page() -> None:
        with page_frame("runs") as t:
            _build(site, t)


def _build(site: Site, t: Translate) -> None:
    with ui.row().classes("w-full items-center justify-between"):
        ui.label(t("runs.title")).classes("zt-title").props("role=heading aria-level=1")
        search = ui.input(placeholder=t("runs.search")).props(
            f'dense outlined clearable aria-label="{t("runs.search")}"'
        )
        search.classes("zt-search")
    machine = ui.label().classes("zt-quiet")
    columns = [{"name": "picture", "label": "", "field": "picture", "align": "left"}]
    for name, align in (("name", "left"), ("status", "left"), ("step", "left"), ("loss", "right"), ("changed", "left")):
        columns.append({"name": name, "label": t(f"runs.{name}"), "field": name, "align": align})
    columns.append({"name": "actions", "label": "", "field": "actions", "align": "right"})
    table = ui.table(columns=columns, rows=[], row_key="name", pagination=ROWS_A_PAGE)
    table.classes("w-full zt-card zt-runs")
    ui.add_css(CSS)
    table.props("flat").add_slot("body", BODY)
    table.add_slot("body-cell-actions", "")  # NiceGUI asks for one where a row has a list, which `BODY` shows
    table.add_slot("no-data", f'<div class="zt-quiet" style="padding: 1rem">{t("runs.empty")}</div>')
    table.bind_filter_from(search, "value", lambda text: text or "")
    table.on("open", lambda event: ui.navigate.to(run_address(event.args)))
    trash = ui.row().classes("items-center gap-2")

    def refresh() -> None:
        rows = rows_of(site, t)
        if rows != table.rows:
            table.rows = rows
        text = describe_machine(site, t)
        if machine.text != text:
            machine.text = text

    async def act(event: events.GenericEventArguments) -> None:
        name, action = event.args["name"], event.args["action"]
        if action == "clone":
            ui.navigate.to(f"/new?clone={quote(name, safe='')}")
            return
        if action == "delete" and not await confirmed(t("runs.delete_question", name=name), t("runs.delete"), t):
            return
        actions = {"stop": site.queue.stop, "continue": site.queue.resume, "delete": site.queue.delete}
        told(actions.get(action, site.queue.move_up), name)()
        refresh()
        build_trash()

    async def empty() -> None:
        size = format_bytes(site.queue.trash_bytes())
        if await confirmed(t("runs.empty_question", size=size), t("runs.empty_trash", size=size), t):
            told(site.queue.empty_trash)()
            build_trash()

    def build_trash() -> None:
        trash.clear()
        size = site.queue.trash_bytes()
        if size:
            with trash:
                ui.button(t("runs.empty_trash", size=format_bytes(size)), icon="delete_forever", on_click=empty).props(
                    "flat no-caps color=link"
                )

    table.on("act", act)
    refresh()
    build_trash()
    ui.timer(REFRESH_SECONDS, refresh)


async def confirmed(question: str, yes: str, t: Translate) -> bool:
    """Ask a question in a dialog, and return whether the answer was `yes`."""
    with ui.dialog() as dialog, ui.card():
        ui.label(question)
        with ui.row().classes("w-full justify-end"):
            ui.button(t("common.cancel"), on_click=lambda: dialog.submit(False)).props("flat no-caps color=link")
            ui.button(yes, on_click=lambda: dialog.submit(True)).props("no-caps color=negative")
    answer = await dialog
    dialog.delete()
    return answer is True


def rows_of(site: Site, t: Translate) -> list[dict[str, Any]]:
    """Return the rows of the table: waiting jobs in their order, then runs."""
    rows: list[dict[str, Any]] = []
    waiting = site.queue.waiting()
    for job in waiting:
        note = t("runs.waits_for", gpu=job.gpu) if job.gpu else ""
        rows.append(_row(job.name, "waiting", t, note=note, actions=("up", "stop", "clone")))
    names = {job.name for job in waiting}
    for state in run_state.list_runs(site.workspace.runs):
        if state.name not in names:
            rows.append(_row_of(state, t))
    return rows


def _row_of(state: RunState, t: Translate) -> dict[str, Any]:
    is_live = state.status in ("running", "starting")
    actions = ("stop", "clone") if is_live else ("continue", "clone", "delete")
    if state.status == "done":
        actions = ("clone", "delete")
    row = _row(state.name, state.status, t, note=note_of(state), actions=actions)
    previews = run_state.previews_of(state.folder)
    if previews:
        newest = previews[max(previews)][0]
        row["picture"] = small_url(state.folder / "samples" / newest, 96)
    row["fraction"] = round(state.fraction, 4)
    row["progress"] = f"{state.step} / {state.steps}" if state.steps else ""
    row["loss"] = "" if state.loss is None else f"{state.loss:.4f}"
    row["changed"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.changed_at))
    return row


def _row(name: str, status: str, t: Translate, note: str, actions: tuple[str, ...]) -> dict[str, Any]:
    buttons = [{"name": action, "icon": ICONS[action], "label": t(f"runs.{action}")} for action in actions]
    label = t(f"status.{status.replace(' ', '_')}")
    return {"name": name, "status": status, "label": label, "note": note, "actions": buttons, "fraction": 0}


def note_of(state: RunState) -> str:
    """Return the present task of a run, or why it has ended."""
    if state.output.errors and state.status in ("failed", "stopped"):
        return run_state.text_of(state.output.errors[-1])
    progress = state.output.progress
    if progress and state.status in ("running", "starting"):
        return f"{progress['what']} {progress['done']}/{progress['total']} {progress['note']}".strip()
    if state.status == "failed":
        return state.output.lines[-1] if state.output.lines else ""
    return ""


def describe_machine(site: Site, t: Translate) -> str:
    """Return the GPUs, their temperatures and the free disk space in a line."""
    machine = site.machine()
    parts: list[str] = []
    for gpu in machine.gpus:
        temperature = "" if gpu.temperature is None else f", {gpu.temperature:.0f} °C"
        load = "" if gpu.load is None else f", {gpu.load:.0f} %"
        used = (
            ""
            if gpu.used_bytes is None or gpu.total_bytes is None
            else (f", {gpu.used_bytes / 1e9:.1f} / {gpu.total_bytes / 1e9:.0f} GB")
        )
        parts.append(f"GPU {gpu.index} {gpu.name}{temperature}{load}{used}")
    if not machine.gpus:
        parts.append(t("machine.no_gpu"))
    parts.append(t("machine.disk", size=format_bytes(machine.free_disk_bytes)))
    return " · ".join(parts)
