"""Configs as text, what is said about bad configs, and the list of every option."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zimage_train.config import key_names
from zimage_train.config.load import read_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError

LEAST = "name: a\ndata: [{folder: photos}]\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str, least: str = LEAST) -> list[str]:
    """The lines that a config is refused with, the file called c.yaml."""
    content = text if isinstance(text, bytes) else least + text
    with pytest.raises(ConfigError) as caught:
        read_config(write(folder, content), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}{os.sep}", "").splitlines()


def option_names(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option by its dotted name; `[]` stands for each entry of a list."""
    for name, field in section.model_fields.items():
        inner = key_names.model_of(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            is_list = "list" in str(field.annotation)
            yield from option_names(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


OPTIONS = dict(option_names())
IN_LISTS = {"prompts": {"prompt": "p"}, "extra_loras": {"file": "x.safetensors"}, "beside": {"file": "y.safetensors"}}
"""What an entry of a list that is empty by default needs at least."""


def nested(option: str, value: Any) -> dict[str, Any]:
    """A config that sets a single option, on top of the least config."""
    values: dict[str, Any] = {"name": "a", "data": [{"folder": "photos"}]}
    target: Any = values
    *sections, last = option.split(".")
    for section in sections:
        name = section.removesuffix("[]")
        if name in IN_LISTS:
            target = target.setdefault(name, [dict(IN_LISTS[name])])[0]
        elif section.endswith("[]"):
            target = target[name][0]
        else:
            target = target.setdefault(name, {})
    target[last] = value
    if option in ("data[].metadata", "data[].prompts"):
        del target["folder"]
    if option == "data[].prompts":
        values["train"] = {"method": "de_distill"}
    return values
