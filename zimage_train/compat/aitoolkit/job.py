"""From the text of a job to its values by AI Toolkit's names, checked against the table of keys."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zimage_train.compat.aitoolkit.keys import FILE, KEYS, TYPOS
from zimage_train.compat.aitoolkit.rules import HandledHere, Mapped, Refused, Row, WithoutEffect
from zimage_train.config import load
from zimage_train.config.key_names import dotted_key
from zimage_train.config.strict_yaml import KeyPath, YamlDocument
from zimage_train.config.validation_errors import format_value
from zimage_train.errors import Location, Problem

KeyTree = dict[str, Any]
"""Name -> its row, or the tree of a section; `name[]` is a list of such sections."""
PROCESS_PATH: KeyPath = ("config", "process", 0)
"""Where a job has its settings. Users know keys by their path below it."""

_VARIABLE = re.compile(r"\$\{([^}\n]+)\}")


def _tree(keys: Mapping[str, Row]) -> KeyTree:
    """Return the tree of a table with dotted keys."""
    tree: KeyTree = {}
    for key, row in keys.items():
        *sections, name = key.split(".")
        subtree = tree
        for part in sections:
            subtree = subtree.setdefault(part, {})
        subtree[name] = row
    return tree


FILE_TREE = _tree(FILE)
PROCESS_TREE = _tree({key: row for key, row in KEYS.items() if key not in FILE})


@dataclass
class AIToolkitJob:
    """A job with the defaults of AI Toolkit's classes, and the problems and notes of its conversion."""

    document: YamlDocument
    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(Consequence, reason) -> the keys that are left out."""
    sections: set[str] = field(default_factory=set)
    """Sections that the job has."""
    mapped: list[tuple[str, KeyPath]] = field(default_factory=list)
    """Mapped keys that the job has: the name in the table, and the path in the document."""

    def note(self, key: str, message: str) -> None:
        """Add a note on a key, such as `datasets.0.flip_x`, whose effect its owner would not expect."""
        self.notes.append(f"{key} {message}")

    def refuse(self, key: str, message: str, hint: str, code: str = "bad-value") -> None:
        """Add a problem of a key."""
        location = Location(str(self.path), self.line(_path_of(key)), key)
        self.problems.append(Problem(location, message, hint, code))

    def is_given(self, key: str) -> bool:
        """Return whether the job sets a mapped key to a value other than null."""
        return any(self.name(path) == key for _, path in self.mapped)

    def line(self, path: KeyPath) -> int:
        """Return the line of a key, or that of the section that would hold it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.document.lines:
                return self.document.lines[path[:length]]
        return 1

    def name(self, path: KeyPath) -> str:
        """Return the name of a key for users: its path, below the process if it is there."""
        is_below_process = path[: len(PROCESS_PATH)] == PROCESS_PATH
        return dotted_key(path[len(PROCESS_PATH) :] if is_below_process else path)

    def read_section(self, tree: KeyTree, section: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        """Return the value of every key that the section at `path` can have, checked against its row."""
        for name in section:
            if name not in tree and f"{name}[]" not in tree:
                self.refuse(self.name((*path, name)), "unknown key", _suggest_key(name, tree), "unknown-key")
        values: dict[str, Any] = {}
        for name, subtree in tree.items():
            key = name.removesuffix("[]")
            values[key] = self._read(subtree, name, section.get(key), (*path, key))
        return values

    def _read(self, subtree: KeyTree | Row, name: str, value: Any, path: KeyPath) -> Any:
        """Return the checked value of a key, a section or a list of sections."""
        if not isinstance(subtree, dict):
            return self._read_key(subtree, value, path)
        if name.endswith("[]"):
            return self._read_list(subtree, value, path)
        if isinstance(value, dict):
            self.sections.add(self.name(path))
        elif value is not None:
            self.refuse(self.name(path), f"is {format_value(value)}", "expected a section")
        return self.read_section(subtree, value if isinstance(value, dict) else {}, path)

    def _read_list(self, tree: KeyTree, value: Any, path: KeyPath) -> list[dict[str, Any]] | None:
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.refuse(self.name(path), f"is {format_value(value)}", "expected a list of sections")
            return None
        return [self.read_section(tree, section, (*path, index)) for index, section in enumerate(value)]

    def _read_key(self, row: Row, value: Any, path: KeyPath) -> Any:
        """Return the value of a mapped key, or None for any other key, which is recorded if it is not neutral."""
        key = self.name(path)
        if isinstance(row, Mapped):
            if value is None:
                return row.default
            self.mapped.append((re.sub(r"\.\d+(?=\.|$)", "[]", key), path))
            try:
                return row.read(value)
            except ValueError as error:
                self.refuse(key, f"is {format_value(value)}", f"expected {error}")
                return row.default
        if value is None or value in row.neutral:
            return None
        if isinstance(row, Refused):
            self.refuse(key, f"is {format_value(value)} ({row.why})", row.hint, "unsupported-setting")
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
    text, problems = _insert_variables(path, text)
    document = load.parse(path, text)
    root = document.value
    if not isinstance(root, dict) or not {"job", "config"} <= root.keys():
        return None
    job = AIToolkitJob(document, path, problems=problems)
    for error in document.problems:
        problem = load.yaml_problem(path, error)
        location = replace(problem.place, key=job.name(error.path) or None)
        job.problems.append(replace(problem, location=location))
    name = root["config"].get("name") if isinstance(root["config"], dict) else None
    if isinstance(name, str):
        root = _insert_name(root, name)
    file_values = job.read_section(FILE_TREE, root, ())
    process = _only_process(job, file_values["config"]["process"])
    job.values = job.read_section(PROCESS_TREE, process, PROCESS_PATH)
    job.values["name"] = job.values["name"] or file_values["config"]["name"]
    return job


def _insert_variables(path: Path, text: str) -> tuple[str, list[Problem]]:
    """Return `text` with the values of environment variables for `${NAME}`, except in comments, and the problems."""
    problems: list[Problem] = []
    lines: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("#"):
            lines.append(line)
            continue
        for name in _VARIABLE.findall(line):
            if name not in os.environ:
                location = Location(str(path), number, source=f"${{{name}}}")
                hint = f"set {name}, or write the value"
                problems.append(Problem(location, "is no environment variable", hint, "missing-variable"))
        lines.append(_VARIABLE.sub(lambda match: os.environ.get(match[1], match[1]), line))
    return "\n".join(lines), problems


def _insert_name(value: Any, name: str) -> Any:
    """Return `value` with the name of the job for `[name]` in every text."""
    if isinstance(value, dict):
        return {key: _insert_name(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_insert_name(item, name) for item in value]
    return value.replace("[name]", name) if isinstance(value, str) else value


def _only_process(job: AIToolkitJob, processes: Any) -> dict[str, Any]:
    """Return the only process of a job; several, or none, is a problem."""
    if not isinstance(processes, list) or not processes:
        job.refuse("config.process", f"is {format_value(processes)}", "give a list of one process")
        return {}
    if len(processes) > 1:
        job.refuse("config.process", f"has {len(processes)} processes", "give each of them a job of its own")
    if not isinstance(processes[0], dict):
        job.refuse("config.process.0", f"is {format_value(processes[0])}", "expected a section")
        return {}
    return processes[0]


def _path_of(key: str) -> KeyPath:
    """Return the path in the document for the name of a key for users."""
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    return path if path[0] in FILE_TREE else (*PROCESS_PATH, *path)


def _suggest_key(name: str, tree: KeyTree) -> str:
    """Return the hint for an unknown key of a section: the key that is probably meant, if any."""
    siblings = [sibling.removesuffix("[]") for sibling in tree]
    meant = TYPOS.get(name, name)
    suggestions = [meant]
    if meant not in siblings:
        suggestions = [key for key in KEYS if key.split(".")[-1] == meant][:2]  # of other sections
    if not suggestions:
        suggestions = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if not suggestions:
        return "AI Toolkit has no such key; remove it"
    return f"did you mean {' or '.join(key.replace('[]', '.0', 1) for key in suggestions)}?"
