"""Buttons that several pages have."""

from collections.abc import Callable
from typing import Any

from nicegui import ui


def icon_button(icon: str, label: str, on_click: Callable[[], Any]) -> ui.button:
    """Build a round button whose label is read out, and shown when the mouse is over it."""
    button = ui.button(icon=icon, on_click=on_click, color=None).style("color: var(--accent)")
    # No tooltip of Quasar, which complains when rows that are built anew take its button away.
    button.props["aria-label"] = button.props["title"] = label
    return button.props("flat round dense")


def flat_button(icon: str, label: str, on_click: Callable[[], Any]) -> ui.button:
    """Build a button with a text that stands out less than the main one of a form."""
    button = ui.button(label, icon=icon, on_click=on_click, color=None).style("color: var(--accent)")
    return button.props("flat dense no-caps")
