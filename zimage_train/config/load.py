"""Reading of a config file and `--set key=value` into a `Config`; all problems are reported at once, with lines."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from zimage_train.config import strict_yaml, validation_errors
from zimage_train.config.dataset import ALPHA
from zimage_train.config.foreign import FOREIGN_FORMATS, ConfigWithNotes
from zimage_train.config.key_names import dotted_key
from zimage_train.config.sample import ExtraLora
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import KeyPath, YamlDocument, YamlError
from zimage_train.config.validation_errors import LocateKey
from zimage_train.config.variants import ADAPTERS, NAMED_LORAS, VARIANTS
from zimage_train.errors import Argument, ConfigError, Location, Problem
from zimage_train.io.operating_system import user_cache_folder

JSON_SUFFIXES = (".json", ".jsonc")
OVERRIDE_EXAMPLE = "write for example --set train.steps=100"


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the file at `path`, apply `key=YAML` overrides, and check all settings.

    Raises:
        ConfigError: lists every problem as `file:line: key: what was found; what to do`.
    """
    return read_config_with_notes(path, overrides).config


def read_config_with_notes(path: Path, overrides: Sequence[str] = ()) -> ConfigWithNotes:
    """Do as `read_config`, and return also the notes of the conversion if the file is in another trainer's format.

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
    path: Path, document: YamlDocument, overrides: Sequence[str], earlier_problems: Sequence[Problem] = ()
) -> Config:
    """Apply `key=YAML` overrides to a document, and check all settings.

    Args:
        path: the file of the document, for locations.
        earlier_problems: those of a conversion, which are reported with those found here.

    Raises:
        ConfigError: lists every problem.
    """
    problems = [yaml_problem(path, error) for error in document.problems]
    if document.value is None:
        raise ConfigError(Problem(str(path), "is empty", "zimage-train init FOLDER writes a config", "not-a-config"))
    if not isinstance(document.value, dict):
        message = f"holds {validation_errors.type_name(document.value)}, not settings"
        raise ConfigError(Problem(str(path), message, "write `key: value` lines", "not-a-config"))
    origins: dict[KeyPath, Argument] = {}
    for override in overrides:
        problems += _apply_override(document.value, override, origins)

    def locate(key_path: KeyPath) -> Location:
        return locate_key(path, document, key_path, origins)

    config, schema_problems = validate_config(document.value, locate)
    problems += sorted([*earlier_problems, *schema_problems], key=lambda problem: problem.place.line or 0)
    if problems or config is None:
        raise ConfigError(*problems)
    return config


def validate_config(values: dict[str, Any], locate: LocateKey) -> tuple[Config | None, list[Problem]]:
    """Check plain values against the schema; return the config, or None and the problems."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        return None, validation_errors.problems_of(error, values, locate)


def dump_config(config: Config) -> str:
    """Return all settings with their values as YAML, which reads back as an equal config."""
    return strict_yaml.dump(config.model_dump())


def resolve_paths(config: Config) -> Config:
    """Return `config` with absolute paths, so that it is valid in any working directory; hub ids are kept.

    A value that may be a path or a hub id is a path if there is a file or folder of that name. A short name, such as
    `v2` for an adapter, stays even then, since it is looked up first.
    """

    def absolute(value: str | None, short_names: Container[str] = ()) -> str | None:
        if value is None or value in short_names or not Path(value).exists():
            return value
        return str(Path(value).absolute())

    model, cache, sample = config.model, config.cache, config.sample
    paths = {
        "path": absolute(model.path),
        "extras": absolute(model.extras),
        "text_encoder": absolute(model.text_encoder),
        "tokenizer": absolute(model.tokenizer),
        "vae": absolute(model.vae),
        "adapter": absolute(model.adapter, ADAPTERS),
    }
    data = []
    for entry in config.data:
        sources = {name: absolute(getattr(entry, name)) for name in ("folder", "metadata", "prompts", "negative")}
        data.append(entry.model_copy(update=sources | {"mask": absolute(entry.mask, (ALPHA,))}))

    def all_absolute(loras: Sequence[ExtraLora]) -> list[ExtraLora]:
        return [lora.model_copy(update={"file": absolute(lora.file, NAMED_LORAS)}) for lora in loras]

    validation = config.validation.model_copy(update={"folder": absolute(config.validation.folder)})
    # These two are made absolute even if they do not exist yet, since they are never hub ids.
    cache_folder = None if cache.folder is None else str(Path(cache.folder).absolute())
    output_dir = str(Path(config.output_dir).absolute())
    return config.model_copy(
        update={
            "output_dir": output_dir,
            "model": model.model_copy(update=paths),
            "data": data,
            "lora": config.lora.model_copy(update={"init_from": absolute(config.lora.init_from, NAMED_LORAS)}),
            "train": config.train.model_copy(update={"beside": all_absolute(config.train.beside)}),
            "cache": cache.model_copy(update={"folder": cache_folder}),
            "validation": validation,
            "sample": sample.model_copy(
                update={
                    "compare_on": absolute(sample.compare_on, VARIANTS),
                    "extra_loras": all_absolute(sample.extra_loras),
                }
            ),
        }
    )


def cache_dir(config: Config) -> Path:
    """Return `cache.folder`, or the folder of this program among the user's caches."""
    if config.cache.folder is not None:
        return Path(config.cache.folder)
    return user_cache_folder() / "zimage-train"


def flatten_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value for each leaf, such as `{"optimizer.lr": 1e-4, "data.0.folder": ...}`.

    A list is a leaf unless it holds sections.
    """
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
    """Return the text of a config or a prompt file.

    Raises:
        ConfigError: the file is missing, unreadable, too large, or not text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(strict_yaml.MAX_BYTES + 1)
        if len(content) > strict_yaml.MAX_BYTES:
            message = "is larger than 1 MB, so it is not a config"
            raise ConfigError(Problem(str(path), message, "check the path", "not-a-config"))
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        problem = Problem(str(path), "does not exist", "check the path", "missing-file")
        raise ConfigError(problem) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start})"
        raise ConfigError(Problem(str(path), message, "save it as UTF-8", "not-text")) from None
    except OSError as error:
        if path.is_dir():
            hint = "give a file; `zimage-train init FOLDER` writes a config for images"
            raise ConfigError(Problem(str(path), "is a folder", hint, "not-a-file")) from None
        message = f"cannot be read ({error.strerror})"
        raise ConfigError(Problem(str(path), message, "check the path", "unreadable-file")) from None


def read_yaml_text(path: Path) -> str:
    """Return the text of a config as YAML; JSON, which may hold comments and tabs, keeps its lines.

    Raises:
        ConfigError: as `read_text`.
    """
    text = read_text(path)
    return strict_yaml.json_to_yaml(text) if path.suffix.lower() in JSON_SUFFIXES else text


def parse(path: Path, text: str) -> YamlDocument:
    """Return the document in `text`, the content of the file at `path`.

    Raises:
        ConfigError: it is not valid YAML, or uses parts of YAML that are not read.
    """
    try:
        return strict_yaml.parse(text)
    except YamlError as error:
        raise ConfigError(yaml_problem(path, error)) from None


def yaml_problem(path: Path, error: YamlError) -> Problem:
    """Return the problem of an error of the YAML reader in the file at `path`."""
    location = Location(str(path), error.line or None, dotted_key(error.path) or None)
    return Problem(location, error.message, error.hint, error.code)


def _apply_override(root: dict[str, Any], override: str, origins: dict[KeyPath, Argument]) -> list[Problem]:
    """Set the value of `key=YAML` in `root`, and note its origin; return the problems of the override."""
    argument = Argument("--set", override)

    def problem(message: str, hint: str, code: str, key: str | None = None) -> Problem:
        return Problem(Location(key=key, argument=argument), message, hint, code)

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return [problem("is not key=value", OVERRIDE_EXAMPLE, "bad-argument")]
    parts = [int(part) if part.isascii() and part.isdigit() else part for part in key.strip().split(".")]
    if "" in parts:
        return [problem("has an empty part in its key", OVERRIDE_EXAMPLE, "bad-argument")]
    try:
        document = strict_yaml.parse(text)
    except YamlError as error:
        return [problem(error.message, "quote the value" if type(error) is YamlError else error.hint, error.code)]
    target: Any = root
    for index, part in enumerate(parts):
        parent = dotted_key(parts[:index])
        if isinstance(target, list) and not (isinstance(part, int) and part < len(target)):
            return [problem(f"{parent} has {len(target)} entries, counted from 0", "check the index", "unknown-key")]
        if not isinstance(target, dict | list):
            return [problem(f"{parent} is no section of the config", "check the key", "unknown-key")]
        slot: Any = part if isinstance(target, list) else str(part)
        if index == len(parts) - 1:
            target[slot] = document.value
        elif isinstance(target, dict) and target.get(slot) is None:
            # A section or list that the file leaves out, so that `--set ema.decay=0.99` needs no `ema:` there.
            target[slot] = [] if isinstance(parts[index + 1], int) else {}
        target = target[slot]
    origins[tuple(parts)] = argument
    return [problem(error.message, error.hint, error.code, dotted_key(error.path)) for error in document.problems]


def locate_key(
    path: Path, document: YamlDocument, key_path: KeyPath, origins: Mapping[KeyPath, Argument] = MappingProxyType({})
) -> Location:
    """Return the location of a value of a document: the argument in `origins` that set it, or file, line and name."""
    for length in range(len(key_path), 0, -1):
        if key_path[:length] in origins:
            return Location(key=dotted_key(key_path), argument=origins[key_path[:length]])
    if key_path not in document.lines:
        # A section that the file does not have, but a `--set` within it has created.
        for origin, argument in origins.items():
            if origin[: len(key_path)] == key_path:
                return Location(key=dotted_key(key_path), argument=argument)
    if not key_path:
        return Location(str(path))
    # The longest part of the path that the file has; what is below it, such as a missing key, has the same line.
    length = len(key_path)
    while length and key_path[:length] not in document.lines:
        length -= 1
    parent = key_path[:length]
    name_in_file = document.names.get(parent, dotted_key(parent))
    name = dotted_key((name_in_file, *key_path[length:])).lstrip(".")
    return Location(str(path), document.lines.get(parent, 0), name)
