"""A config as the text of an editor: its problems with their lines, and changes that keep its comments."""

import io
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, CommentedMap
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError

from zimage_train.compat.aitoolkit.convert import write_config
from zimage_train.config import load, strict_yaml
from zimage_train.config.foreign import FOREIGN_FORMATS
from zimage_train.config.key_names import is_setting
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath
from zimage_train.errors import ConfigError, Problem, ZImageTrainError

NAME = Path("config.yaml")
"""The name that the text has in locations."""


@dataclass(frozen=True)
class CheckedText:
    """A text and its config."""

    config: Config | None
    values: dict[str, Any]
    """The settings as they are written, empty if it is no YAML."""
    problems: list[Problem] = field(default_factory=list)
    """Of settings and lines; nothing of the files that they name is checked."""


def check_text(text: str) -> CheckedText:
    """Check the settings in `text`."""
    try:
        document = load.parse(NAME, text)
    except ConfigError as error:
        return CheckedText(None, {}, list(error.problems))
    values = document.value if isinstance(document.value, dict) else {}
    try:
        return CheckedText(load.load_document(NAME, document, []), values)
    except ConfigError as error:
        return CheckedText(None, values, list(error.problems))


def convert_foreign(name: str, text: str) -> tuple[str, list[str]]:
    """Return the config that a file of another trainer becomes, and notes; a config of this trainer stays as it is.

    Raises:
        ConfigError: lists the keys that cannot be honoured.
    """
    for foreign in FOREIGN_FORMATS.values():
        if foreign.recognizes(text):
            converted = foreign.convert(Path(name), text, [])
            if converted is not None:
                return write_config(converted.config, converted.notes, Path(name)), converted.notes
    return text, []


def without_defaults(text: str) -> str:
    """Return a config in which every setting stands, as a run writes it, with those alone that differ from defaults."""
    config = check_text(text).config
    if config is None:
        return text
    short = strict_yaml.dump(config.model_dump(exclude_defaults=True))
    return short if check_text(short).config == config else text


def set_value(text: str, path: KeyPath, value: Any) -> str:
    """Return `text` with the setting at `path` set, and everything else as it is written.

    Raises:
        ConfigError: the text is no YAML, so that nothing can be set in it, or it has no place for the setting.
    """
    document = _load(text)
    target: Any = document
    try:
        for index, part in enumerate(path[:-1]):
            if isinstance(target, list):
                target = target[int(part)]
                continue
            if target.get(part) is None:
                target[part] = [] if isinstance(path[index + 1], int) else CommentedMap()
            target = target[part]
        target[path[-1]] = _on_one_line(value)
    except (TypeError, ValueError, IndexError, AttributeError):
        what = "has no place in this config"
        raise ConfigError(Problem(".".join(map(str, path)), what, "set it in the text", "no-place")) from None
    return _dump(document)


def set_setting(text: str, key: str, value: Any) -> str:
    """Return `text` with the setting `key` set, such as `lora.rank`; `data.*.x` is that of every entry.

    Raises:
        ConfigError: the text is no YAML, or there is no such setting.
    """
    if not is_setting(key.replace("data.*.", "data.0.")):
        raise ConfigError(Problem(key, "is no setting", "see docs/config.md", "unknown-key"))
    entries = range(1)
    if key.startswith("data.*."):
        listed = check_text(text).values.get("data")
        entries = range(len(listed) if isinstance(listed, list) else 1)
    for index in entries:
        path = tuple(index if part == "*" else part for part in key.split("."))
        text = set_value(text, path, value)
    return text


def remove_value(text: str, path: KeyPath) -> str:
    """Return `text` without the setting at `path`, which then has its default; sections that become empty go too.

    Raises:
        ConfigError: the text is no YAML.
    """
    document = _load(text)
    targets: list[Any] = [document]
    for part in path[:-1]:
        try:
            targets.append(targets[-1][part])
        except (KeyError, IndexError, TypeError):
            return text
    for target, part in zip(reversed(targets), reversed(path), strict=True):
        if not isinstance(target, dict) or part not in target:
            break
        del target[part]
        if target:
            break
    return _dump(document)


def parse_value(text: str) -> Any:
    """Return the value that a field's text has as YAML.

    Raises:
        ConfigError: it has none.
    """
    try:
        return load.parse(NAME, f"value: {text}").value["value"]
    except ZImageTrainError as error:
        problem = error.problems[0]
        raise ConfigError(Problem("value", problem.message, problem.hint, "bad-value")) from None


def dump_value(value: Any) -> str:
    """Return a value as YAML on one line, as the config would have it."""
    return strict_yaml.dump_inline(value)


def value_at(values: Any, path: KeyPath) -> Any:
    """Return the value at `path`, or None."""
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _on_one_line(value: Any) -> Any:
    """Return a list of plain values as one that is written on a line, and any other value as it is."""
    if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
        return value
    line = CommentedSeq(value)
    line.fa.set_flow_style()
    return line


@cache
def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _represent_null)
    return yaml


def _represent_null(representer: Any, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _load(text: str) -> CommentedMap:
    # This trainer's own strict reader first; the other one keeps comments.
    load.parse(NAME, text)
    try:
        document = _yaml().load(text)
    except (YAMLError, ValueError) as error:  # a number of thousands of digits, which this trainer reads as text
        raise ConfigError(Problem(str(NAME), "is no YAML", str(error).splitlines()[0], "bad-yaml")) from None
    return document if isinstance(document, CommentedMap) else CommentedMap()


def _dump(document: CommentedMap) -> str:
    stream = io.StringIO()
    _yaml().dump(document, stream)
    return stream.getvalue()
