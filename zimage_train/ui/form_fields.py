"""The fields of the form, from the schema of the config: a switch, a choice, or a line of YAML for each setting."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zimage_train.config.key_names import LISTS_OF_SECTIONS, model_of
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath, dump_inline

FieldKind = Literal["switch", "choice", "line", "lines"]
ESSENTIALS: tuple[KeyPath, ...] = (
    ("name",),
    ("model", "variant"),
    ("data", 0, "folder"),
    ("data", 0, "trigger"),
    ("data", 0, "resolution"),
    ("lora", "type"),
    ("lora", "rank"),
    ("train", "steps"),
    ("train", "batch_size"),
    ("optimizer", "name"),
    ("optimizer", "lr"),
    ("model", "quantize"),
    ("sample", "every"),
    ("sample", "prompts"),
)
"""The most common settings, in the order of the form."""


@dataclass(frozen=True)
class FormField:
    """A setting in the form."""

    path: KeyPath
    kind: FieldKind
    choices: tuple[str, ...]
    """Of a choice, as YAML."""
    help: str
    default: str
    """As YAML; empty if there is none."""

    @property
    def name(self) -> str:
        """The full name of the setting, such as `data.0.folder`."""
        return ".".join(map(str, self.path))


def sections(values: dict[str, Any]) -> list[tuple[str, KeyPath, str]]:
    """Return (title, path, help) of the sections of a config, with one for each entry of `data`."""
    found: list[tuple[str, KeyPath, str]] = [("config", (), "")]
    for name, info in Config.model_fields.items():
        if model_of(info.annotation) is None:
            continue
        if name != "data":
            found.append((name, (name,), info.description or ""))
            continue
        entries = values.get("data")
        for index in range(len(entries) if isinstance(entries, list) else 1):
            found.append((f"data.{index}", ("data", index), info.description or ""))
    return found


def fields_of(path: KeyPath) -> list[FormField]:
    """Return the fields of the section at `path`; the settings of the top for an empty path."""
    section: type[BaseModel] = Config
    for part in path:
        if isinstance(part, str):
            inner = model_of(section.model_fields[part].annotation)
            assert inner is not None
            section = inner
    found: list[FormField] = []
    for name, info in section.model_fields.items():
        # Lists of sections, such as prompts with sizes of their own, are for the editor; prompts as lines are not.
        if model_of(info.annotation) is None or name in LISTS_OF_SECTIONS[1:]:
            found.append(_field(((*path, name)), info))
    return found


def field_at(path: KeyPath) -> FormField:
    """Return the field of the setting at `path`."""
    return next(field for field in fields_of(path[:-1]) if field.path == path)


def _field(path: KeyPath, info: FieldInfo) -> FormField:
    values = _literals(info.annotation)
    kind: FieldKind = "line"
    if path == ("sample", "prompts"):
        kind = "lines"
    elif values == [False, True]:
        kind = "switch"
    elif values is not None:
        kind = "choice"
    choices = tuple(map(dump_inline, values)) if values is not None else ()
    has_default = not info.is_required() and not isinstance(info.get_default(call_default_factory=False), BaseModel)
    default = dump_inline(_plain(info.get_default(call_default_factory=True))) if has_default else ""
    return FormField(path, kind, choices, " ".join((info.description or "").split()), default)


def _literals(annotation: Any) -> list[Any] | None:
    """Return all values that an annotation admits, or None if they are not a list of names."""
    if annotation is bool:
        return [False, True]
    if annotation is type(None):
        return [None]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = get_args(annotation)
    if not parts or get_origin(annotation) in (list, dict, tuple):
        return None
    values: list[Any] = []
    for part in parts:
        inner = _literals(part)
        if inner is None:
            return None
        values += inner
    return values


def _plain(value: Any) -> Any:
    """Return a default as plain values."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
