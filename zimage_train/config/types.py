"""Types of settings that several sections use, their errors, and the base class of all sections."""

import re
import unicodedata
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from zimage_train.config.strict_yaml import KeyPath
from zimage_train.io.operating_system import is_too_long

Quantization = Literal["fp8", "fp8_fast", "int8", "nf4"]
"""Formats of quantised frozen weights."""
MetadataLevel = Literal["minimal", "full", "none"]
AttentionName = Literal["auto", "sdpa", "cudnn", "flash3", "flash4"]
RecomputeMode = Literal["none", "elementwise", "w1w3", "attention", "full"]
"""Modes of activation checkpointing, from nothing recomputed to everything; see models/checkpointing.py."""
RECOMPUTE_MODES: tuple[RecomputeMode, ...] = get_args(RecomputeMode)
ScheduleName = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial", "step", "rex",
    "one_cycle",
]  # fmt: skip

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""Validation without conversions: `"8"` is no number, and 8.0 no whole number."""


_VARIABLE = re.compile(r"(~|\$\w+|\$\{\w+\}|%\w+%)(?:[/\\]|$)")
"""The start of a path that a shell would expand."""


class SettingError(ValueError):
    """An invalid value: what was found, and what to do about it, empty if that is obvious.

    `key` is the path of the setting below the section whose validator raises it.
    """

    code = "bad-value"

    def __init__(self, finding: str, hint: str = "", key: KeyPath = ()) -> None:
        super().__init__("; ".join(filter(None, (finding, hint))))
        self.finding, self.hint, self.key = finding, hint, key


class ConflictError(SettingError):
    """Settings that are valid by themselves, but not together."""

    code = "conflicting-settings"


class UnknownParamError(SettingError):
    """A name in `params` that the optimizer or schedule does not have."""

    code = "unknown-key"


class Section(BaseModel):
    """A section of the config: strict, frozen, without unknown keys, and with docstrings as descriptions."""

    model_config = STRICT | ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def as_prompt(value: object) -> object:
    """Return `{prompt: text}` for `text`, and any other value as it is."""
    return {"prompt": value} if isinstance(value, str) else value


def as_lora(value: object) -> object:
    """Return `{file, weight}` for `FILE` or `FILE=WEIGHT`, and any other value as it is.

    A text that is the path of a file is taken as such, even if it has a `=`.
    """
    if not isinstance(value, str):
        return value
    file, equals, weight = value.rpartition("=")
    if not equals or (not is_too_long(value) and Path(value).exists()):
        return {"file": value}
    try:
        return {"file": file, "weight": float(weight)}
    except ValueError:
        return {"file": file, "weight": weight}  # the schema reports that it is no number


def _without_control_characters(value: str) -> str:
    found = next((char for char in value if not char.isprintable() and unicodedata.category(char) == "Cc"), None)
    if found is not None:
        name = {"\n": "a line break", "\t": "a tab"}.get(found, f"the control character {ord(found):#04x}")
        hint = (
            "a backslash in double quotes begins an escape: use single quotes, or write / or two backslashes for each"
        )
        raise SettingError(f"is {value!r}, with {name}", hint)
    return value


def _without_variables(value: str) -> str:
    """Refuse what a shell would expand: taken as it is, it names a folder `~` where the command runs."""
    match = _VARIABLE.match(value)
    if match is None:
        return value
    raise SettingError(f"is '{value}', and {match[1]} is not expanded in a config", "write the whole path")


def _multiple_of_16(value: int) -> int:
    if value % 16:
        raise SettingError(f"{value} is no multiple of 16", f"{value // 16 * 16} or {-(-value // 16) * 16} would do")
    return value


def _of_a_possible_length(value: str) -> str:
    if is_too_long(value):
        raise SettingError(f"is {value[:40]!r}... ({len(value)} characters)", "give a path that a file can have")
    return value


Pixels = Annotated[int, Field(ge=32, le=4096, json_schema_extra={"multipleOf": 16}), AfterValidator(_multiple_of_16)]
PathText = Annotated[
    str,
    AfterValidator(_without_control_characters),
    AfterValidator(_without_variables),
    AfterValidator(_of_a_possible_length),
]
"""A path, or something else that names files, such as a hub id."""
NonEmptyPath = Annotated[PathText, Field(min_length=1)]
EverySteps = Annotated[int, Field(ge=1)] | None
Resolutions = Annotated[
    list[Pixels], BeforeValidator(_as_list, json_schema_input_type=Pixels | list[Pixels]), Field(min_length=1)
]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
LrFactor = Annotated[float, Field(gt=0.0, le=1000.0)]
UpToOne = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
_END = {"end_factor": UpToOne}
SCHEDULE_PARAMS: dict[ScheduleName, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "cosine": _END,
    "cosine_with_restarts": _END | {"cycles": Count},
    "linear": _END,
    "polynomial": _END | {"power": PositiveFloat},
    "step": {"every": Count, "factor": Annotated[float, Field(gt=0.0, le=1.0)]},
    "rex": _END,
    "one_cycle": _END | {"start_factor": Annotated[float, Field(gt=0.0, le=1.0)], "peak_at": Share},
}
"""Schedule -> the keys that `schedule.params` may have, with their types."""


def without_folder(name: str) -> str:
    """Return the last part of a path, and a hub id (`org/repo`) or short name as it is.

    For texts that others may read, where a path would say whose machine it was.
    """
    parts = PureWindowsPath(name).parts  # knows the separators of all systems
    is_path = Path(name).exists() or re.match(r"[/\\.~]|[A-Za-z]:", name) is not None or len(parts) > 2
    return parts[-1] if is_path and parts else name


def check_params(params: dict[str, Any], known: dict[str, Any], owner: str) -> dict[str, Any]:
    """Return `params`, validated against the types in `known`.

    Args:
        known: name -> type of each parameter that `owner` has.
        owner: the optimizer or schedule, for messages.

    Raises:
        SettingError: a name is unknown, or a value is invalid; names the first.
    """
    checked: dict[str, Any] = {}
    for key, value in params.items():
        if key not in known:
            choices = f"it has {', '.join(sorted(known))}" if known else "it has no params"
            raise UnknownParamError(f"{owner} has no {key!r}", choices)
        try:
            checked[key] = TypeAdapter(known[key], config=STRICT).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            message = first["msg"]
            if first["type"] in ("too_short", "too_long"):  # lists have a fixed length, such as 2 betas
                limits = first.get("ctx", {})
                message = f"{limits.get('min_length', limits.get('max_length'))} numbers"
            raise SettingError(f"{key} is {value!r}", f"expected {message.removeprefix('Input should be ')}") from None
    return checked


def without_default(schema: dict[str, Any]) -> None:
    """Remove the default from the JSON schema of a setting whose default depends on another."""
    schema.pop("default")
