"""From the text of a job to checked values by AI Toolkit's names, with every problem and its line."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_train.compat.aitoolkit.keys import FILE, KEYS, TYPOS
from zimage_train.compat.aitoolkit.rules import HandledHere, Mapped, Refused, Row, WithoutEffect
from zimage_train.config import load, validation_errors
from zimage_train.config.key_names import dotted_key
from zimage_train.config.strict_yaml import KeyPath, YamlDocument
from zimage_train.errors import Location, Problem

KeyTree = dict[str, Any]
"""Rows by name, and below the name of a section another tree; `name[]` is a list of such sections."""
PROCESS_PATH: KeyPath = ("config", "process", 0)

_VARIABLE = re.compile(r"\$\{([^}\n]+)\}")


def _tree(keys: Mapping[str, Row]) -> KeyTree:
    tree: KeyTree = {}
    for key, row in keys.items():
        *sections, name = key.split(".")
        place = tree
        for part in sections:
            place = place.setdefault(part, {})
        place[name] = row
    return tree


FILE_TREE = _tree(FILE)
PROCESS_TREE = _tree({key: row for key, row in KEYS.items() if key not in FILE})


@dataclass
class AIToolkitJob:
    """A job: its values with the defaults of AI Toolkit's classes, and what there is to say of it."""

    document: YamlDocument
    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(What that means, why) -> the keys that are left out for that reason."""
    sections: set[str] = field(default_factory=set)
    """Every section that is given."""
    mapped: list[tuple[str, KeyPath]] = field(default_factory=list)
    """Every key that is given and mapped: its name in the table, and where it stands."""

    def note(self, key: str, what: str) -> None:
        """Say of `key` (`datasets.0.flip_x`) what its owner would not expect."""
        self.notes.append(f"{key} {what}")

    def refuse(self, key: str, what: str, todo: str, code: str = "bad-value") -> None:
        """`key` is a problem."""
        place = Location(str(self.path), self.line(_path_of(key)), key)
        self.problems.append(Problem(place, what, todo, code))

    def given(self, key: str) -> bool:
        """Whether the job sets `key`, and not to null."""
        return any(self.name(path) == key for _, path in self.mapped)

    def line(self, path: KeyPath) -> int:
        """The line of a key, or of the section that would hold it."""
        lines = self.document.lines
        return next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 1)

    def name(self, path: KeyPath) -> str:
        """What a key is called for its owner: below the process, its path from there."""
        return dotted_key(path[len(PROCESS_PATH) :] if path[: len(PROCESS_PATH)] == PROCESS_PATH else path)

    def read_section(self, tree: KeyTree, given: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        """The values of one section, all of its keys, checked against their rows."""
        for name in given:
            if name not in tree and f"{name}[]" not in tree:
                self.refuse(self.name((*path, name)), "unknown key", _suggestion(name, tree), "unknown-key")
        return {
            name.removesuffix("[]"): self._read(below, name, given.get(name.removesuffix("[]")), path)
            for name, below in tree.items()
        }

    def _read(self, below: KeyTree | Row, name: str, value: Any, path: KeyPath) -> Any:
        here = (*path, name.removesuffix("[]"))
        if not isinstance(below, dict):
            return self._read_row(below, value, here)
        if name.endswith("[]"):
            return self._read_list(below, value, here)
        if isinstance(value, dict):
            self.sections.add(self.name(here))
        elif value is not None:
            self.refuse(self.name(here), f"is {validation_errors.format_value(value)}", "expected a section")
        return self.read_section(below, value if isinstance(value, dict) else {}, here)

    def _read_list(self, tree: KeyTree, value: Any, path: KeyPath) -> list[dict[str, Any]] | None:
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self.refuse(self.name(path), f"is {validation_errors.format_value(value)}", "expected a list of sections")
            return None
        return [self.read_section(tree, one, (*path, index)) for index, one in enumerate(value)]

    def _read_row(self, row: Row, value: Any, path: KeyPath) -> Any:
        key = self.name(path)
        if isinstance(row, Mapped):
            if value is None:
                return row.default
            self.mapped.append((re.sub(r"\.\d+(?=\.|$)", "[]", key), path))
            try:
                return row.read(value)
            except ValueError as error:
                self.refuse(key, f"is {validation_errors.format_value(value)}", f"expected {error}")
                return row.default
        if value is None or value in row.neutral:
            return None
        if isinstance(row, Refused):
            self.refuse(key, f"is {validation_errors.format_value(value)} ({row.why})", row.todo)
        elif isinstance(row, WithoutEffect):
            self.left_out.setdefault(("no effect in AI Toolkit either", row.why), []).append(key)
        elif isinstance(row, HandledHere):
            self.left_out.setdefault(("left out", row.why), []).append(key)
        return None


def read_job(path: Path, text: str) -> AIToolkitJob | None:
    """Return the job in `text`, the content of the file at `path`, or None if it has no `job` and `config`.

    Raises:
        ConfigError: it cannot be parsed.
    """
    text, problems = _with_variables(path, text)
    document = load.parse(path, text)
    root = document.value
    if not isinstance(root, dict) or not {"job", "config"} <= root.keys():
        return None
    problems += [load.yaml_problem(path, problem) for problem in document.problems]
    job = AIToolkitJob(document, path, problems=problems)
    name = root["config"].get("name") if isinstance(root["config"], dict) else None
    if isinstance(name, str):
        root = _with_name(root, name)
    in_file = job.read_section(FILE_TREE, root, ())
    job.values = job.read_section(PROCESS_TREE, _only_process(job, in_file["config"]["process"]), PROCESS_PATH)
    job.values["name"] = job.values["name"] or in_file["config"]["name"]
    return job


def _with_variables(path: Path, text: str) -> tuple[str, list[Problem]]:
    """`text` with `${NAME}` replaced by environment variables, but in comments."""
    problems: list[Problem] = []

    def value(name: str, line: int) -> str:
        if name not in os.environ:
            place, todo = Location(str(path), line, source=f"${{{name}}}"), f"set {name}, or write the value"
            problems.append(Problem(place, "is no environment variable", todo, "missing-variable"))
        return os.environ.get(name, name)

    lines = [
        line if line.lstrip().startswith("#") else _VARIABLE.sub(lambda match, at=at: value(match[1], at), line)
        for at, line in enumerate(text.split("\n"), 1)
    ]
    return "\n".join(lines), problems


def _with_name(value: Any, name: str) -> Any:
    """`value` with the job's name for `[name]` in every text."""
    if isinstance(value, dict):
        return {key: _with_name(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_name(one, name) for one in value]
    return value.replace("[name]", name) if isinstance(value, str) else value


def _only_process(job: AIToolkitJob, processes: Any) -> dict[str, Any]:
    if not isinstance(processes, list) or not processes:
        job.refuse("config.process", f"is {validation_errors.format_value(processes)}", "give a list of one process")
        return {}
    if len(processes) > 1:
        job.refuse("config.process", f"has {len(processes)} processes", "give each of them a job of its own")
    if not isinstance(processes[0], dict):
        job.refuse("config.process.0", f"is {validation_errors.format_value(processes[0])}", "expected a section")
        return {}
    return processes[0]


def _path_of(key: str) -> KeyPath:
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    return path if path[0] in FILE_TREE else (*PROCESS_PATH, *path)


def _suggestion(name: str, tree: KeyTree) -> str:
    siblings = [one.removesuffix("[]") for one in tree]
    meant = TYPOS.get(name, name)
    hints = [meant] if meant in siblings else [key for key in KEYS if key.split(".")[-1] == meant][:2]
    hints = hints or difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if not hints:
        return "AI Toolkit has no such key; remove it"
    return f"did you mean {' or '.join(hint.replace('[]', '.0', 1) for hint in hints)}?"
