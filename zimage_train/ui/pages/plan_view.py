"""The plan of a run on the page: a bar of memory for each card, time, and buttons for proposed changes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nicegui import ui

from zimage_train.io.units import format_bytes
from zimage_train.planning.suggestions import SettingChange
from zimage_train.ui.run_plan import PARTS, CardPlan, RunPlan
from zimage_train.ui.texts import Translate

COLOURS = {"weights": "#2f6fb8", "lora": "#2e8b57", "activations": "#e08a00", "context": "#8a939e"}


def show_plan(plan: RunPlan, t: Translate, apply: Callable[[str, Any], None]) -> None:
    """Build the plan; `apply(key, value)` sets a setting that is proposed."""
    for problem in plan.problems:
        ui.label(str(problem)).style("color: var(--bad); overflow-wrap: anywhere")
    for card in plan.cards:
        _card_bar(card, t)
    if plan.cards:
        with ui.row().classes("gap-4"):
            for name in PARTS:
                with ui.row().classes("items-center gap-1"):
                    ui.element("span").style(
                        f"width: 12px; height: 12px; border-radius: 3px; background: {COLOURS[name]}"
                    )
                    ui.label(t(f"plan.{name}")).classes("zt-quiet text-sm")
    if plan.changes:
        with ui.row().classes("items-center gap-2"):
            ui.label(t("plan.would_fit"))
            _change_buttons(plan.changes, apply)
    for line in plan.lines:
        ui.label(line).classes("text-sm").style("overflow-wrap: anywhere; white-space: pre-wrap")
    if plan.shorter:
        with ui.row().classes("items-center gap-2"):
            ui.label(t("plan.shorter")).classes("text-sm")
            for run in plan.shorter:
                _change_button(run.change, f"{run.change}, {run.time}", apply)
    for warning in plan.warnings:
        with ui.column().classes("gap-1").style("border-left: 3px solid #b7791f; padding-left: .6rem"):
            ui.label(warning.text).classes("text-sm")
            _change_buttons(warning.changes, apply)
    for text in plan.notes:
        ui.label(text).classes("zt-quiet text-sm").style("overflow-wrap: anywhere")


def _change_buttons(changes: Sequence[SettingChange], apply: Callable[[str, Any], None]) -> None:
    with ui.row().classes("gap-2"):
        for change in changes:
            _change_button(change, str(change), apply)


def _change_button(change: SettingChange, label: str, apply: Callable[[str, Any], None]) -> None:
    button = ui.button(label, on_click=partial(apply, change.key, change.value))
    button.props("no-caps outline dense color=link")


def _card_bar(card: CardPlan, t: Translate) -> None:
    total = format_bytes(card.total_bytes)
    verdict = t("plan.fits") if card.fits else t("plan.does_not_fit")
    with ui.row().classes("w-full items-center gap-2"):
        ui.label(f"{card.card}: {total} / {format_bytes(card.limit_bytes)}, {verdict}").classes("text-sm").style(
            "" if card.fits else "color: var(--bad)"
        )
    scale = max(card.total_bytes, card.limit_bytes)
    sizes = ", ".join(f"{t(f'plan.{name}')} {format_bytes(card.parts[name])}" for name in PARTS)
    with (
        ui.element("div")
        .classes("w-full")
        .style("display: flex; height: 16px; border-radius: 6px; overflow: hidden; background: var(--soft)") as bar
    ):
        bar.props(f'role=img aria-label="{sizes}"').tooltip(sizes)
        for name in PARTS:
            ui.element("div").style(f"width: {100 * card.parts[name] / scale:.2f}%; background: {COLOURS[name]}")
