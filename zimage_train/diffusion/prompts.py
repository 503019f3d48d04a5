"""Prompt files: a prompt per line with options as in kohya's tools, or a YAML list as in `sample.prompts`.

Torch-free.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zimage_train.config import load
from zimage_train.config.sample import PreviewPrompt
from zimage_train.errors import ConfigError, Problem, ZImageTrainError, collect_errors, raise_all

OPTION = re.compile(r"\s--([A-Za-z_]+)(?=\s|$)")
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance", lambda text: float(text) - 1.0),  # these files give a CFG scale, which is g + 1
    "g": ("guidance", lambda text: float(text) - 1.0),
}
"""Option -> (field of a request, parser).

As in the prompt files of sd-scripts and musubi-tuner: `a photo --n blurry --w 768 --d 7 --s 8 --l 1`.
"""


@dataclass(frozen=True)
class PromptSpec:
    """A prompt, and the fields of its sampling request that the file sets."""

    prompt: str
    overrides: dict[str, Any] = field(default_factory=dict)


def read_prompt_file(path: Path) -> list[PromptSpec]:
    """Return the prompts of a file.

    Raises:
        ConfigError: it cannot be read, contains no prompt, or has invalid options; lists all of them.
    """
    text = load.read_text(path)
    specs = _from_yaml(path, text) if path.suffix in (".yaml", ".yml") else _from_lines(path, text)
    if not specs:
        raise ConfigError(Problem(str(path), "contains no prompt", "write a prompt per line", "no-prompts"))
    return specs


def _from_lines(path: Path, text: str) -> list[PromptSpec]:
    errors: list[ZImageTrainError] = []
    specs: list[PromptSpec] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            with collect_errors(errors):
                specs.append(_from_line(f"{path}:{number}", line.strip()))
    raise_all(errors)
    return specs


def _from_line(where: str, line: str) -> PromptSpec:
    prompt, *rest = OPTION.split(" " + line)
    overrides: dict[str, Any] = {}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        if name not in OPTIONS:
            hint = f"there are --{', --'.join(OPTIONS)}; write words of the prompt without --"
            raise ConfigError(Problem(where, f"has the unknown option --{name}", hint, "unknown-key"))
        key, parse = OPTIONS[name]
        try:
            overrides[key] = parse(text.strip())
        except ValueError:
            raise ConfigError(Problem(where, f"--{name} is {text.strip()!r}", "give a number", "bad-value")) from None
    if not prompt.strip():
        raise ConfigError(Problem(where, "has options but no prompt", "write the prompt before them", "no-prompts"))
    return PromptSpec(prompt.strip(), overrides)


def _from_yaml(path: Path, text: str) -> list[PromptSpec]:
    value = load.parse(path, text).value
    if not isinstance(value, list):
        raise ConfigError(Problem(str(path), "is not a list", "write prompts as in sample.prompts", "bad-value"))
    entries = [{"prompt": entry} if isinstance(entry, str) else entry for entry in value]
    try:
        prompts = TypeAdapter(list[PreviewPrompt]).validate_python(entries, strict=True)
    except ValidationError as error:
        problems = []
        for details in error.errors():
            where = ".".join(map(str, details["loc"]))
            problems.append(Problem(f"{path}: {where}", details["msg"].lower(), "see sample.prompts", "bad-value"))
        raise ConfigError(*problems) from None
    return [PromptSpec(prompt.prompt, prompt.model_dump(exclude_none=True, exclude={"prompt"})) for prompt in prompts]
