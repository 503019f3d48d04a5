"""Parsing of `--vary key=v1,v2`: a config for each combination of values, each with its own name."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from zimage_train.config import load, strict_yaml
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import YamlError
from zimage_train.errors import Argument, ConfigError, Location, Problem, ZImageTrainError

NOT_VARIABLE = ("name", "output_dir", "cache.folder")
"""Settings that a sweep sets itself, or that its runs share."""
MAX_NAME_PART = 60
"""Characters of a value in the name of a run."""
EXAMPLE = "write for example --vary model.adapter=v1,v2"

Result = TypeVar("Result")


@dataclass(frozen=True)
class SweepAxis:
    """A setting and the values that it takes."""

    key: str
    texts: list[str]
    """Each value as typed, which is YAML."""
    name_parts: list[str]
    """Each value as a part of the name of a run."""


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep."""

    config: Config
    values: dict[str, str]
    """Varied setting -> its value as typed."""

    @property
    def label(self) -> str:
        return label_of(self.values)


class RunsFailed(ZImageTrainError):
    """The problems of some runs of a sweep."""

    def __init__(self, exit_code: int, problems: Sequence[Problem]) -> None:
        super().__init__(*problems)
        self.exit_code = exit_code


def label_of(values: Mapping[str, str]) -> str:
    """Return a combination of values as a line of text."""
    return ", ".join(f"{key}={text}" for key, text in values.items())


def make_sweep_runs(path: Path, overrides: Sequence[str], varied: Sequence[str]) -> list[SweepRun]:
    """Return the config at `path` with `overrides`, once for each combination of the values in `varied`.

    The run folders are output/NAME-sweep-KEYS/NAME+KEY_VALUE.

    Raises:
        ZImageTrainError: lists every problem of every combination.
    """
    axes = _parse_axes(varied, overrides)
    short_keys = _first_if_distinct([(_last_name(axis.key), axis.key) for axis in axes])
    combinations: dict[str, tuple[dict[str, str], str]] = {}  # label -> (values, suffix of the name)
    for indices in itertools.product(*(range(len(axis.texts)) for axis in axes)):
        values: dict[str, str] = {}
        suffix = ""
        for axis, short_key, index in zip(axes, short_keys, indices, strict=True):
            values[axis.key] = axis.texts[index]
            suffix += f"+{short_key}_{axis.name_parts[index]}"
        combinations[label_of(values)] = values, suffix

    def read_run(label: str) -> SweepRun:
        values, suffix = combinations[label]
        try:
            return _read_run(path, overrides, values, suffix, f"-sweep-{'+'.join(short_keys)}")
        except ConfigError as error:
            raise ConfigError(*(_as_varied(problem, values) for problem in error.problems)) from None

    return list(run_each(list(combinations), read_run).values())


def _read_run(
    path: Path, overrides: Sequence[str], values: dict[str, str], name_suffix: str, folder_suffix: str
) -> SweepRun:
    """Read the config with `values`, with `name_suffix` added to its name, below a folder of the sweep."""
    assignments = [*overrides, *(f"{key}={text}" for key, text in values.items())]
    config = load.read_config(path, assignments)
    name = config.name + name_suffix
    output_dir = f"{Path(config.output_dir) / config.name}{folder_suffix}"
    for key, text in (("name", name), ("output_dir", output_dir)):
        assignments.append(f"{key}={json.dumps(text, ensure_ascii=False)}")
    # Read again instead of changed, so that the new name is validated too.
    config = load.read_config(path, assignments)
    return SweepRun(config, values)


def _as_varied(problem: Problem, values: Mapping[str, str]) -> Problem:
    """Return `problem` with `--vary` as its place if that is `--set`, by which the varied values are read."""
    for key, text in values.items():
        if problem.place.argument == Argument("--set", f"{key}={text}"):
            return replace(problem, location=replace(problem.place, argument=Argument("--vary", f"{key}={text}")))
    return problem


def run_each(labels: Sequence[str], work: Callable[[str], Result]) -> dict[str, Result]:
    """Return the result of `work` for each label.

    Raises:
        RunsFailed: `work` failed for some labels; it is called for the others all the same. A problem of all labels is
            listed once, others with each label that they occur for. The exit code is the lowest.
    """
    results: dict[str, Result] = {}
    failures: dict[str, ZImageTrainError] = {}
    for label in labels:
        try:
            results[label] = work(label)
        except ZImageTrainError as error:
            failures[label] = error
    if failures:
        problems = _merge_problems({label: error.problems for label, error in failures.items()}, len(labels))
        raise RunsFailed(min(error.exit_code for error in failures.values()), problems)
    return results


def _merge_problems(problems_by_label: Mapping[str, Sequence[Problem]], num_labels: int) -> list[Problem]:
    labels_by_problem: dict[Problem, list[str]] = {}
    for label, problems in problems_by_label.items():
        for problem in problems:
            labels_by_problem.setdefault(problem, []).append(label)
    merged: list[Problem] = []
    for problem, labels in labels_by_problem.items():
        argument = problem.place.argument
        names_the_value = argument is not None and argument.flag == "--vary"
        if len(labels) == num_labels or names_the_value:
            merged.append(problem)
        else:
            merged += [problem.of_run(label) for label in labels]
    return merged


def _parse_axes(varied: Sequence[str], overrides: Sequence[str]) -> list[SweepAxis]:
    axes: list[SweepAxis] = []
    problems: list[Problem] = []
    arguments_by_key = {override.partition("=")[0].strip(): Argument("--set", override) for override in overrides}
    for text in varied:
        argument = Argument("--vary", text)
        where = Location(argument=argument)
        key, equals, values = (part.strip() for part in text.partition("="))
        earlier = [other for other_key, other in arguments_by_key.items() if _overlap(key, other_key)]
        if not equals or not key:
            problems.append(Problem(where, "is not key=value,value", EXAMPLE, "bad-argument"))
        elif any(_overlap(key, fixed_key) for fixed_key in NOT_VARIABLE):
            what = "cannot be varied: a sweep names its runs itself, and they share their caches"
            problems.append(Problem(where, what, "leave it out", "not-variable"))
        elif earlier:
            what = f"sets the same as {earlier[0]}"
            problems.append(Problem(where, what, "give all values of a setting in a single --vary", "set-twice"))
        else:
            arguments_by_key[key] = argument
            texts = split_values(values)
            name_parts, value_errors = _name_parts(texts)
            problems += [Problem(where, what, hint, "bad-value") for what, hint in value_errors]
            axes.append(SweepAxis(key, texts, name_parts))
    if problems:
        raise ConfigError(*problems)
    return axes


def _overlap(key: str, other: str) -> bool:
    """Return whether two keys are the same, or either is the section of the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def split_values(text: str) -> list[str]:
    """Split `text` at the commas that are neither in brackets nor in quotes."""
    values: list[str] = []
    start, depth, quote = 0, 0, ""
    for index, character in enumerate(text):
        if quote:
            if character == quote:
                quote = ""
        # As in YAML, a quote opens only at the beginning of a value; elsewhere it is an apostrophe.
        elif character in "\"'" and not text[start:index].strip(" [{,:"):
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:index].strip())
            start = index + 1
    return [*values, text[start:].strip()]


def _name_parts(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return each value as a part of a name, and (message, hint) for values that cannot be used."""
    errors: list[tuple[str, str]] = []
    names: list[tuple[str, str]] = []  # (short, long): of a path its last part, and the whole
    for text in texts:
        try:
            value = strict_yaml.parse(text).value
        except YamlError as error:
            errors.append((f"{text}: {error.message}", "quote the value"))
            continue
        if not text:
            errors.append(("has an empty value", "write null for none"))
        name = _canonical_text(value, text)
        last_part = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
        names.append((last_part, name))
    parts = _first_if_distinct([(_slug(short), _slug(long)) for short, long in names])
    if errors:
        return parts, errors
    for index, part in enumerate(parts):
        first = parts.index(part)
        if first == index:
            continue
        if names[first] == names[index]:
            errors.append((f"{texts[index]} is given twice", "leave out one of them"))
        else:
            what = f"{texts[first]} and {texts[index]} would both be called {part}"
            errors.append((what, "give values that differ in letters and digits"))
    return parts, errors


def _canonical_text(value: Any, text: str) -> str:
    """Return a value in its normal spelling: `text` may be 1e-4 or 0.0001, and the result is 0.0001."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float) and abs(value) < float("inf"):
        return f"{Decimal(repr(value)).normalize():f}".replace("-", "minus", 1)
    return value if isinstance(value, str) else text


def _slug(text: str) -> str:
    """Return the end of `text` in characters that a name can have, without hyphens: a name may not end in -digits."""
    return re.sub(r"[^\w.]+", "_", text)[-MAX_NAME_PART:].strip("._")


def _first_if_distinct(pairs: list[tuple[str, str]]) -> list[str]:
    """Return the first element of each pair if these are all different, else the second elements."""
    firsts = [first for first, _ in pairs]
    return firsts if len(set(firsts)) == len(firsts) else [second for _, second in pairs]


def _last_name(key: str) -> str:
    """Return the last part of a key that is not a number: `lr` for `optimizer.lr`, `data` for `data.0`."""
    return next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
