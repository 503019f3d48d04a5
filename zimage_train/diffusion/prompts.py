"""Prompts from a file: one a line, also with the options of kohya's tools, or a YAML list as in `sample.prompts`.

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
    "l": ("guidance", lambda text: float(text) - 1.0),  # a CFG scale, which is g + 1
    "g": ("guidance", lambda text: float(text) - 1.0),
}
"""As in the prompt files of sd-scripts and musubi-tuner: `a photo --n blurry --w 768 --d 7 --s 8 --l 1`."""


@dataclass(frozen=True)
class PromptSpec:
    """A prompt, and what is wanted of its image alone: fields of a recipe."""

    prompt: str
    given: dict[str, Any] = field(default_factory=dict)


def read_prompt_file(path: Path) -> list[PromptSpec]:
    """The prompts of a file.

    Raises:
        ConfigError: it cannot be read, holds no prompt, or an option of a line is none; lists them all.
    """
    text = load.read_text(path)
    wishes = _from_yaml(path, text) if path.suffix in (".yaml", ".yml") else _from_lines(path, text)
    if not wishes:
        raise ConfigError(Problem(str(path), "holds no prompt", "write one a line"))
    return wishes


def _from_lines(path: Path, text: str) -> list[PromptSpec]:
    errors: list[ZImageTrainError] = []
    found: list[PromptSpec] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            with collect_errors(errors):
                found.append(_from_line(f"{path}:{number}", line.strip()))
    raise_all(errors)
    return found


def _from_line(where: str, line: str) -> PromptSpec:
    prompt, *rest = OPTION.split(" " + line)
    given: dict[str, Any] = {}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        if name not in OPTIONS:
            todo = f"there are --{', --'.join(OPTIONS)}; write a word of the prompt without --"
            raise ConfigError(Problem(where, f"has the option --{name}", todo))
        key, take = OPTIONS[name]
        try:
            given[key] = take(text.strip())
        except ValueError:
            raise ConfigError(Problem(where, f"--{name} is {text.strip()!r}", "give a number")) from None
    if not prompt.strip():
        raise ConfigError(Problem(where, "has options and no prompt", "write the prompt before them"))
    return PromptSpec(prompt.strip(), given)


def _from_yaml(path: Path, text: str) -> list[PromptSpec]:
    value = load.parse(path, text).value
    if not isinstance(value, list):
        raise ConfigError(Problem(str(path), "is no list", "write prompts as in sample.prompts"))
    try:
        prompts = TypeAdapter(list[PreviewPrompt]).validate_python(
            [{"prompt": one} if isinstance(one, str) else one for one in value], strict=True
        )
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])), one["msg"].lower()) for one in error.errors()]
        todo = "see sample.prompts"
        raise ConfigError(*(Problem(f"{path}: {where}", what, todo) for where, what in found)) from None
    return [PromptSpec(one.prompt, one.model_dump(exclude_none=True, exclude={"prompt"})) for one in prompts]
