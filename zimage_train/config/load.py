"""From a config file and `--set key=value` to a `Config`, or to every problem at once, each with its line."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zimage_train.config import strict_yaml
from zimage_train.config.foreign import FOREIGN_FORMATS, ConfigWithNotes
from zimage_train.config.key_names import COMMON_VALUES, dotted_key, suggest_key
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath, YamlDocument, YamlError
from zimage_train.config.types import SettingError
from zimage_train.errors import Argument, ConfigError, Location, Problem
from zimage_train.io.operating_system import user_cache_folder

LocateKey = Callable[[KeyPath], Location | str]
"""The place of a setting for the user."""

JSON_SUFFIXES = (".json", ".jsonc")
KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a section",
}
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "none_required": "null",
}
LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "at least {min_length} entry",
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the file at `path`, apply `key=YAML` overrides, and check everything.

    Raises:
        ConfigError: lists every problem as `file:line: key: what was found; what to do`.
    """
    return read_config_with_notes(path, overrides).config


def read_config_with_notes(path: Path, overrides: Sequence[str] = ()) -> ConfigWithNotes:
    """As `read_config`, with the notes of the conversion if the file is in the format of another trainer.

    Raises:
        ConfigError: as `read_config`.
    """
    text = read_yaml_text(path)
    for foreign in FOREIGN_FORMATS.values():
        if foreign.recognizes(text):
            converted = foreign.convert(path, text, overrides)
            if converted is not None:
                return converted
    return ConfigWithNotes(load_document(path, parse(path, text), overrides), notes=[])


def load_document(
    path: Path, document: YamlDocument, overrides: Sequence[str], found: Sequence[Problem] = ()
) -> Config:
    """Apply `key=YAML` overrides to a document that came from `path`, and check everything.

    Raises:
        ConfigError: lists every problem, and those that were `found` before.
    """
    problems = [yaml_problem(path, problem) for problem in document.problems]
    if document.value is None:
        raise ConfigError(Problem(str(path), "is empty", "see configs/quickstart.yaml for a start", "not-a-config"))
    if not isinstance(document.value, dict):
        what = f"holds {_kind(document.value)}, not settings"
        raise ConfigError(Problem(str(path), what, "write `key: value` lines", "not-a-config"))
    origins: dict[KeyPath, Argument] = {}
    for override in overrides:
        problems += _apply(document.value, override, origins)

    def where(key_path: KeyPath) -> Location:
        return _where(path, document, origins, key_path)

    config, wrong = validate_config(document.value, where)
    problems += sorted([*found, *wrong], key=lambda problem: problem.place.line or 0)
    if problems or config is None:
        raise ConfigError(*problems)
    return config


def validate_config(value: dict[str, Any], where: LocateKey) -> tuple[Config | None, list[Problem]]:
    """Check plain values against the schema; `where(key_path)` names a place for the user."""
    try:
        return Config.model_validate(value), []
    except ValidationError as error:
        return None, _explain(error, value, where)


def dump_config(config: Config) -> str:
    """Every setting with its effective value, as YAML that reads back to the same config."""
    return strict_yaml.dump(config.model_dump())


def resolve_paths(config: Config) -> Config:
    """`config` with absolute paths, so that it means the same in any working directory; hub ids stay as they are."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

    model, cache, sample = config.model, config.cache, config.sample
    paths = {"path": absolute(model.path), "extras": absolute(model.extras), "adapter": absolute(model.adapter)}
    data = [
        entry.model_copy(update={name: absolute(getattr(entry, name)) for name in ("folder", "metadata", "mask")})
        for entry in config.data
    ]
    loras = [one.model_copy(update={"file": absolute(one.file)}) for one in sample.extra_loras]
    validation = config.validation.model_copy(update={"folder": absolute(config.validation.folder)})
    folder = None if cache.folder is None else str(Path(cache.folder).absolute())
    return config.model_copy(
        update={
            "output_dir": str(Path(config.output_dir).absolute()),
            "model": model.model_copy(update=paths),
            "data": data,
            "lora": config.lora.model_copy(update={"init_from": absolute(config.lora.init_from)}),
            "cache": cache.model_copy(update={"folder": folder}),
            "validation": validation,
            "sample": sample.model_copy(update={"compare_on": absolute(sample.compare_on), "extra_loras": loras}),
        }
    )


def cache_dir(config: Config) -> Path:
    """`cache.folder`, or the user's cache directory for this program."""
    if config.cache.folder is not None:
        return Path(config.cache.folder)
    return user_cache_folder() / "zimage-train"


def flatten_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"optimizer.lr": 1e-4, "data.0.folder": ...}`: one line a leaf, for diffs and tables."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten_keys(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def read_text(path: Path) -> str:
    """The text of a config.

    Raises:
        ConfigError: there is none, or it is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(strict_yaml.MAX_BYTES + 1)
        if len(content) > strict_yaml.MAX_BYTES:
            raise ConfigError(
                Problem(str(path), "is larger than 1 MB, so it is not a config", "check the path", "not-a-config")
            )
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            Problem(str(path), "does not exist", "check the path of the config", "missing-file")
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            Problem(str(path), f"is not UTF-8 text (byte {error.start})", "save it as UTF-8", "not-text")
        ) from None
    except OSError as error:
        if path.is_dir():
            todo = "give a file; `zimage-train init FOLDER` writes a config for images"
            raise ConfigError(Problem(str(path), "is a folder", todo, "not-a-file")) from None
        raise ConfigError(
            Problem(str(path), f"cannot be read ({error.strerror})", "check the path", "unreadable-file")
        ) from None


def read_yaml_text(path: Path) -> str:
    """Return the text of a config as YAML; JSON, which may hold comments and tabs, keeps its lines.

    Raises:
        ConfigError: as `read_text`.
    """
    text = read_text(path)
    return strict_yaml.json_to_yaml(text) if path.suffix.lower() in JSON_SUFFIXES else text


def parse(path: Path, text: str) -> YamlDocument:
    """The document in `text`, the content of the file at `path`.

    Raises:
        ConfigError: it is no YAML that this program takes.
    """
    try:
        return strict_yaml.parse(text)
    except YamlError as problem:
        raise ConfigError(yaml_problem(path, problem)) from None


def yaml_problem(path: Path, problem: YamlError) -> Problem:
    """What the reader of YAML found, for the user."""
    place = Location(str(path), problem.line or None, dotted_key(problem.path) or None)
    return Problem(place, problem.what, "correct it", problem.code)


def _apply(root: dict[str, Any], override: str, origins: dict[KeyPath, Argument]) -> list[Problem]:
    argument = Argument("--set", override)

    def wrong(what: str, todo: str, code: str, key: str | None = None) -> Problem:
        return Problem(Location(key=key, argument=argument), what, todo, code)

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return [wrong("is not key=value", "write for example --set train.steps=100", "bad-argument")]
    parts = [int(part) if part.isascii() and part.isdigit() else part for part in key.strip().split(".")]
    if "" in parts:
        return [wrong("has an empty part in its key", "write for example --set train.steps=100", "bad-argument")]
    try:
        document = strict_yaml.parse(text)
    except YamlError as problem:
        return [wrong(problem.what, "quote the value", problem.code)]
    target: Any = root
    for index, part in enumerate(parts):
        here = dotted_key(parts[:index])
        if isinstance(target, list) and not (isinstance(part, int) and part < len(target)):
            return [wrong(f"{here} has {len(target)} entries, counted from 0", "check the index", "unknown-key")]
        if not isinstance(target, dict | list):
            return [wrong(f"{here} is no section of the config", "check the key", "unknown-key")]
        slot: Any = part if isinstance(target, list) else str(part)
        if index == len(parts) - 1:
            target[slot] = document.value
        elif isinstance(target, dict) and target.get(slot) is None:
            target[slot] = [] if isinstance(parts[index + 1], int) else {}
        target = target[slot]
    origins[tuple(parts)] = argument
    return [wrong(twice.what, "correct it", twice.code, dotted_key(twice.path)) for twice in document.problems]


def _where(path: Path, document: YamlDocument, origins: dict[KeyPath, Argument], key_path: KeyPath) -> Location:
    for length in range(len(key_path), 0, -1):
        if key_path[:length] in origins:
            return Location(key=dotted_key(key_path), argument=origins[key_path[:length]])
    if key_path not in document.lines:
        made = [argument for path, argument in origins.items() if path[: len(key_path)] == key_path]
        if made:
            return Location(key=dotted_key(key_path), argument=made[0])
    if not key_path:
        return Location(str(path))
    known = next((n for n in range(len(key_path), -1, -1) if key_path[:n] in document.lines), 0)
    first = document.names.get(key_path[:known], dotted_key(key_path[:known]))
    name = dotted_key((first, *key_path[known:])).lstrip(".")
    return Location(str(path), document.lines.get(key_path[:known], 0), name)


def _explain(error: ValidationError, value: dict[str, Any], where: LocateKey) -> list[Problem]:
    """One problem a place: the alternatives of a union, which pydantic lists singly, are joined."""
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_config_path(item["loc"], value, item["type"]), []).append(item)
    return [_problem(key_path, items, where) for key_path, items in grouped.items()]


def _config_path(loc: tuple[str | int, ...], value: Any, kind: str) -> KeyPath:
    path: list[str | int] = []
    for part in loc:
        if isinstance(value, dict) and (part in value or (kind == "missing" and part == loc[-1])):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            break  # the name of an alternative of a union
        path.append(part)
    return tuple(path)


def _problem(key_path: KeyPath, items: list[Any], where: LocateKey) -> Problem:
    item = items[0]
    kind, found, place = item["type"], item["input"], where(key_path)
    if kind == "extra_forbidden":
        return Problem(place, "unknown key", suggest_key(key_path), "unknown-key")
    if kind == "missing":
        return Problem(place, "is missing", "add it", "missing-key")
    if kind == "value_error" and len(items) == 1:
        raised = item["ctx"]["error"]
        why = raised if isinstance(raised, SettingError) else SettingError(str(raised))
        return Problem(place, why.finding, why.hint or "correct it", why.code)
    if kind == "finite_number":
        return Problem(place, f"is {found}", "give a finite number", "bad-value")
    expected = " or ".join(dict.fromkeys(_expected(one) for one in items))
    if key_path[-1] == "every" and kind == "greater_than_equal":
        expected += ", or null, which is never"
    value = _shorten(repr(found)) if kind == "literal_error" and isinstance(found, str) else format_value(found)
    return Problem(place, f"is {value}", f"expected {expected}{_suggest_value(item)}", "bad-value")


def _expected(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in EXPECTED:
        return EXPECTED[kind]
    if kind in LIMITS:
        return LIMITS[kind].format(**context)
    if kind == "literal_error":
        return context["expected"].replace("'", "")
    return item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("should ")


def format_value(found: object) -> str:
    """A value as users write it, or what kind of thing it is."""
    if found is None:
        return "null"
    if isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, dict | list):
        return _kind(found) if found else "empty"
    return f"{_shorten(repr(found))} (text)" if isinstance(found, str) else _shorten(repr(found))


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _kind(value: object) -> str:
    return next((name for kind, name in KINDS.items() if type(value) is kind), type(value).__name__)


def _suggest_value(item: Any) -> str:
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = [choice.strip(" '") for choice in item["ctx"]["expected"].replace(" or ", ",").split(",")]
    close = [COMMON_VALUES[item["input"]]] if COMMON_VALUES.get(item["input"]) in choices else []
    close += difflib.get_close_matches(item["input"], choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
