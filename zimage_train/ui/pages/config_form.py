"""The form of a config: the most common settings, and every other by its section."""

from collections.abc import Callable
from typing import Any, ClassVar

from nicegui import ui

from zimage_train.config.strict_yaml import KeyPath, dump_inline
from zimage_train.errors import ZImageTrainError
from zimage_train.ui import config_text
from zimage_train.ui.config_text import CheckedText, value_at
from zimage_train.ui.form_fields import ESSENTIALS, FormField, field_at, fields_of, sections
from zimage_train.ui.site import show_problems
from zimage_train.ui.texts import Translate

COLUMNS = "grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr))"


class ConfigForm:
    """A form that shows a checked text; each change goes to `on_set(path, value)`.

    While the text is no YAML, the form keeps its last values and cannot be used.
    """

    REMOVED: ClassVar[object] = object()
    """The value of a setting that is to be removed from the text."""

    def __init__(self, t: Translate, on_set: Callable[[KeyPath, Any], None]) -> None:
        self._t, self._on_set = t, on_set
        self._widgets: dict[KeyPath, tuple[FormField, Any]] = {}
        self._checked = CheckedText(None, {})
        self._is_showing = False
        self._titles: list[str] = []
        self._notice = ui.label().style("color: var(--bad)")
        ui.label(t("new.form")).classes("zt-head")
        with ui.element("div").classes("grid w-full gap-2").style(COLUMNS):
            for path in ESSENTIALS:
                self._build_field(field_at(path), _words_for(field_at(path), t))
        ui.separator()
        self._sections = ui.column().classes("w-full gap-0")

    def show(self, checked: CheckedText) -> None:
        """Show the settings of a text with their problems."""
        is_broken = not checked.values
        self._notice.text = self._t("new.broken") if is_broken else ""
        for _, widget in self._widgets.values():
            widget.set_enabled(not is_broken)
        if is_broken:
            return
        self._checked = checked
        found = sections(checked.values)
        titles = [title for title, _, _ in found]
        if titles != self._titles:
            self._titles = titles
            self._build_sections(found)
        self._fill()

    def _fill(self) -> None:
        self._is_showing = True
        try:
            for field, widget in self._widgets.values():
                _fill_widget(field, widget, self._checked)
        finally:
            self._is_showing = False

    def _build_sections(self, found: list[tuple[str, KeyPath, str]]) -> None:
        essentials = {path: self._widgets[path] for path in ESSENTIALS}
        self._widgets = dict(essentials)
        self._sections.clear()
        with self._sections:
            for title, path, caption in found:
                expansion = ui.expansion(title, caption=caption).classes("w-full").props("dense")
                # A section is built when it is opened: all at once would be slow.
                expansion.on_value_change(
                    lambda event, place=expansion, path=path: self._open(place, path) if event.value else None
                )

    def _open(self, place: ui.expansion, path: KeyPath) -> None:
        if place.default_slot.children:
            return
        with place, ui.column().classes("w-full gap-2"):
            for field in fields_of(path):
                self._build_field(field)
        self._fill()

    def _build_field(self, field: FormField, label: str | None = None) -> None:
        label = label or field.name
        if field.kind == "switch":
            widget: Any = ui.switch(label)
        elif field.kind == "choice":
            widget = ui.select(list(field.choices), label=label).props("dense outlined options-dense")
        elif field.kind == "lines":
            widget = ui.textarea(label).props("dense outlined autogrow")
        else:
            widget = ui.input(label).props("dense outlined stack-label")  # so that a default is seen
        widget.classes("w-full" + (" col-span-full" if field.kind == "lines" else "")).tooltip(field.help)
        if field.kind in ("switch", "choice"):
            widget.on_value_change(lambda event: self._changed(field, event.value))
        else:
            widget.on("change", lambda: self._changed(field, widget.value))
        essential = field.path in self._widgets
        if not essential:
            self._widgets[field.path] = (field, widget)
            return
        # The same setting stands among the common ones too; both show it.
        self._widgets[(*field.path, "again")] = (field, widget)

    def _changed(self, field: FormField, shown: Any) -> None:
        if self._is_showing:
            return
        try:
            value = _value_of(field, shown)
        except ZImageTrainError as error:
            show_problems(error)
            return
        if value != value_at(self._checked.values, field.path):
            self._on_set(field.path, value)


def _words_for(field: FormField, t: Translate) -> str:
    """Return the label of a common setting: in words, and as the YAML has it."""
    key = field.name.replace("data.0.", "data.")
    return t(f"field.{key}") + f" · {field.name}"


def _value_of(field: FormField, shown: Any) -> Any:
    """Return the value of a setting that a field shows; an empty line removes the setting."""
    if field.kind == "switch":
        return bool(shown)
    if field.kind == "lines":
        return [line.strip() for line in str(shown or "").splitlines() if line.strip()]
    text = "" if shown is None else str(shown).strip()
    return config_text.parse_value(text) if text else ConfigForm.REMOVED


def _fill_widget(field: FormField, widget: Any, checked: CheckedText) -> None:
    written = value_at(checked.values, field.path)
    is_written = written is not None or _is_written(checked.values, field.path)
    if field.kind == "switch":
        value: Any = written if isinstance(written, bool) else field.default == "true"
    elif field.kind == "lines":
        prompts = [_plain_prompt(prompt) for prompt in written] if isinstance(written, list) else []
        # A prompt with a size or a seed of its own is for the editor.
        widget.set_enabled(None not in prompts)
        value = "\n".join(prompt for prompt in prompts if prompt is not None)
    else:
        effective = dump_inline(written) if is_written else field.default
        value = effective if field.kind == "choice" or is_written else ""
        if field.kind == "choice" and value not in field.choices:
            value = None
        elif field.kind == "line":
            widget.props(f'placeholder="{_attribute(field.default)}"')
    if widget.value != value:
        widget.value = value
    problem = next((one for one in checked.problems if one.place.key == field.name), None)
    if problem is None:
        widget.props(remove="error error-message")
    else:
        widget.props(f'error error-message="{_attribute(f"{problem.message}; {problem.hint}".rstrip("; "))}"')


def _plain_prompt(prompt: Any) -> str | None:
    """Return the text of a prompt that has nothing else, or None."""
    if isinstance(prompt, dict) and not any(value for name, value in prompt.items() if name != "prompt"):
        return str(prompt.get("prompt"))
    return prompt if isinstance(prompt, str) else None


def _is_written(values: Any, path: KeyPath) -> bool:
    parent = value_at(values, path[:-1])
    return isinstance(parent, dict) and path[-1] in parent


def _attribute(text: str) -> str:
    return text.replace('"', "'").replace("\n", " ")
