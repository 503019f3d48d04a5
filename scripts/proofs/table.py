"""All rows of the proof table, and the settings that they must cover."""

import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zimage_train.config.schema import Config

from proofs import data_rows, model_rows, output_rows, training_rows
from proofs.rows import Row

ROWS: list[Row] = [*model_rows.TABLE, *data_rows.TABLE, *training_rows.TABLE, *output_rows.TABLE]


def settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the key of each setting, with N for a place in a list, and its field."""
    for name, field in section.model_fields.items():
        sections = sections_of(field.annotation)
        is_list = any(get_origin(part) is list for part in parts_of(field.annotation))
        if not sections or (is_list and prefix):
            yield prefix + name, field
        for below in sections:
            yield from settings(below, f"{prefix}{name}." + ("N." if is_list else ""))


def parts_of(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, without annotations."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from parts_of(part)
    elif hasattr(annotation, "__metadata__"):
        yield from parts_of(annotation.__origin__)
    else:
        yield annotation


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in a type, or in the entries of a list."""
    found: list[type[BaseModel]] = []
    for part in parts_of(annotation):
        inner = [part]
        if get_origin(part) is list:
            inner = list(parts_of(get_args(part)[0]))
        found += [one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)]
    return found


def choices_of(annotation: Any) -> set[Any]:
    """Return the values of the enumerations in a type."""
    found: set[Any] = set()
    for part in parts_of(annotation):
        if get_origin(part) is Literal:
            found |= set(get_args(part))
    return found


def plain_key(key: str) -> str:
    """Return a key with N for each place in a list."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", key)
