"""Prompt files: a prompt per line with options as in kohya's tools, or a YAML list as in `sample.prompts`.

Torch-free.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zimage_train.config import load, validation_errors
from zimage_train.config.prompt_flags import flag_in, other_form_of
from zimage_train.config.sample import SampleSettings
from zimage_train.config.strict_yaml import KeyPath
from zimage_train.errors import ConfigError, Location, Problem

OPTION = re.compile(r"\s--([A-Za-z_]+)(?=\s|$)")


def guidance_of_cfg(text: str) -> float:
    """Return the guidance g of a CFG scale, which is g + 1; both 0 and 1 mean no guidance.

    Raises:
        ValueError: it is no number, or one that no g belongs to.
    """
    cfg_scale = float(text)
    if cfg_scale != 0 and cfg_scale < 1:
        raise ValueError(text)
    return 0.0 if cfg_scale == 0 else cfg_scale - 1.0


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance", guidance_of_cfg),
    "g": ("guidance", guidance_of_cfg),
}
"""Option -> (field of a request, parser).

As in the prompt files of sd-scripts and musubi-tuner: `a photo --n blurry --w 768 --d 7 --s 8 --l 1`.
"""


@dataclass(frozen=True)
class PromptSpec:
    """A prompt, and the fields of its sampling request that the file sets."""

    prompt: str
    overrides: dict[str, Any] = field(default_factory=dict)
    location: Location | None = None
    """File and line, or the option that gave the prompt."""


def read_prompt_file(path: Path) -> list[PromptSpec]:
    """Return the prompts of a file.

    Raises:
        ConfigError: it cannot be read, contains no prompt, or has invalid options; lists all of them.
    """
    form = other_form_of(path)
    if form is not None:
        hint = "write a prompt per line into a .txt, or a list as in sample.prompts into a .yaml"
        raise ConfigError(Problem(str(path), f"is a .{form}, whose lines are no prompts", hint, "no-prompts"))
    text = load.read_text(path)
    specs = _from_yaml(path, text) if path.suffix in (".yaml", ".yml") else _from_lines(path, text)
    if not specs:
        raise ConfigError(Problem(str(path), "contains no prompt", "write a prompt per line", "no-prompts"))
    return specs


def _from_lines(path: Path, text: str) -> list[PromptSpec]:
    if "\0" in text:
        message = "contains NUL bytes, so it is not a text file"
        raise ConfigError(Problem(str(path), message, "save it as UTF-8", "not-text"))
    problems: list[Problem] = []
    specs: list[PromptSpec] = []
    # Not splitlines, which also cuts at characters such as U+2028 inside a prompt.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            specs.append(_from_line(Location(str(path), number), line.strip(), problems))
    if problems:
        raise ConfigError(*problems)
    return specs


def _from_line(where: Location, line: str, problems: list[Problem]) -> PromptSpec:
    """Return the prompt of a line, and add what is wrong with the line to `problems`."""
    prompt, *rest = OPTION.split(" " + line)
    overrides: dict[str, Any] = {}
    for part in (prompt, *rest[1::2]):
        flag = flag_in(part)
        if flag is not None:
            hint = f"write {flag.well_formed}, or words without hyphens before them"
            problems.append(Problem(where, f"has {flag.text}, which is no option", hint, "bad-value"))
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        if name not in OPTIONS:
            hint = f"there are --{', --'.join(OPTIONS)}; write words of the prompt without --"
            problems.append(Problem(where, f"has the unknown option --{name}", hint, "unknown-key"))
            continue
        key, parse = OPTIONS[name]
        if key in overrides:
            problems.append(Problem(where, f"sets {key} twice", f"write a single --{name}", "set-twice"))
        try:
            overrides[key] = parse(text.strip())
        except ValueError:
            hint = "give a number" if key != "guidance" else "give 0, or a CFG scale of at least 1"
            problems.append(Problem(where, f"--{name} is {text.strip()!r}", hint, "bad-value"))
    if not prompt.strip():
        problems.append(Problem(where, "has options but no prompt", "write the prompt before them", "no-prompts"))
    return PromptSpec(prompt.strip(), overrides, where)


def _from_yaml(path: Path, text: str) -> list[PromptSpec]:
    document = load.parse(path, text)
    value = document.value
    if not isinstance(value, list):
        raise ConfigError(Problem(str(path), "is not a list", "write prompts as in sample.prompts", "bad-value"))
    # Validated as the section of a config, so that problems are named and explained alike.
    sections = {"sample": {"prompts": value}}

    def locate(key: KeyPath) -> Location:
        return load.locate_key(path, document, key[len(("sample", "prompts")) :])

    problems = [load.yaml_problem(path, error) for error in document.problems]
    try:
        prompts = TypeAdapter(dict[str, SampleSettings]).validate_python(sections)["sample"].prompts
    except ValidationError as error:
        problems += validation_errors.problems_of(error, sections, locate)
        prompts = []
    if problems:
        raise ConfigError(*problems)
    specs: list[PromptSpec] = []
    for index, prompt in enumerate(prompts):
        overrides = prompt.model_dump(exclude_none=True, exclude={"prompt"})
        specs.append(PromptSpec(prompt.prompt, overrides, locate(("sample", "prompts", index))))
    return specs
