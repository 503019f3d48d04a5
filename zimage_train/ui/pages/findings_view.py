"""The problems of a run, each with its remedies: an earlier LoRA, the captions, or a new run with other settings."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from nicegui import ui

from zimage_train.planning.suggestions import SettingChange
from zimage_train.training.run_dir import RunDir
from zimage_train.ui import run_state
from zimage_train.ui.findings import Finding
from zimage_train.ui.media import download_url
from zimage_train.ui.run_state import RunState
from zimage_train.ui.texts import Translate

ABOUT_CAPTIONS = ("not_learning", "leaking")


def show_findings(state: RunState, findings: Sequence[Finding], t: Translate) -> None:
    """Build a card for each."""
    for finding in findings:
        with ui.element("section").classes("zt-card zt-finding"):
            if finding.kind is not None:
                ui.label(t(f"verdict.{finding.kind}")).classes("zt-head")
            ui.label(finding.text).classes("text-sm").style("overflow-wrap: anywhere")
            with ui.row().classes("gap-x-4 gap-y-1"):
                _build_remedies(state, finding, t)


def _build_remedies(state: RunState, finding: Finding, t: Translate) -> None:
    if finding.good_step is not None:
        step = finding.good_step
        lora = RunDir(state.folder, state.name).lora(step)
        ui.link(t("verdict.download_step", step=step), download_url(lora)).classes("zt-link")
        previews = run_state.previews_of(state.folder).get(step, [])
        if previews:
            query = urlencode({"run": state.name, "preview": Path(previews[0]).name})
            ui.link(t("verdict.try_step", step=step), f"/try?{query}").classes("zt-link")
    config = run_state.config_of(state.folder) if finding.kind in ABOUT_CAPTIONS else None
    folder = config.data[0].folder if config is not None and config.data else None
    if folder is not None:
        ui.link(t("verdict.captions"), f"/images?folder={quote(folder)}").classes("zt-link")
    for change in finding.changes:
        ui.link(t("verdict.clone_with", change=change), clone_address(state.name, change)).classes("zt-link")


def clone_address(name: str, change: SettingChange) -> str:
    """Return the address at which a copy of the run's config is shown with a setting changed."""
    return f"/new?{urlencode({'clone': name, 'change': f'{change.key}={change.value}'})}"
