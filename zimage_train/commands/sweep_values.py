"""From `--vary key=v1,v2` to one config for each combination of values, each run with a name of its own."""

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
"""Settings that runs of one sweep have of the sweep itself, or share."""
LONGEST_WORD = 60
"""Characters of a value in a name."""
EXAMPLE = "write for example --vary model.adapter=v1,v2"

Result = TypeVar("Result")


@dataclass(frozen=True)
class SweepAxis:
    """One setting and the values that it takes."""

    key: str
    texts: list[str]
    """Each value as it was typed: YAML."""
    words: list[str]
    """The same as parts of names."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    config: Config
    values: dict[str, str]
    """What distinguishes it: setting -> value as typed."""

    @property
    def label(self) -> str:
        return label_of(self.values)


class RunsFailed(ZImageTrainError):
    """What went wrong in some runs of a sweep."""

    def __init__(self, exit_code: int, problems: Sequence[Problem]) -> None:
        super().__init__(*problems)
        self.exit_code = exit_code


def label_of(values: Mapping[str, str]) -> str:
    """A combination of values in words."""
    return ", ".join(f"{key}={text}" for key, text in values.items())


def make_sweep_runs(path: Path, overrides: Sequence[str], varied: Sequence[str]) -> list[SweepRun]:
    """The config at `path` with `overrides`, once for each combination of the values in `varied`.

    The runs lie side by side in output/NAME-sweep-KEYS and are called NAME+KEY_VALUE.

    Raises:
        ZImageTrainError: lists every problem of every combination.
    """
    axes = _axes(varied, overrides)
    shorts = _distinct([(_last_name(axis.key), axis.key) for axis in axes])
    chosen: dict[str, tuple[dict[str, str], str]] = {}
    for places in itertools.product(*(range(len(axis.texts)) for axis in axes)):
        picked = list(zip(axes, shorts, places, strict=True))
        values = {axis.key: axis.texts[place] for axis, _, place in picked}
        suffix = "".join(f"+{short}_{axis.words[place]}" for axis, short, place in picked)
        chosen[label_of(values)] = (values, suffix)

    def read(label: str) -> SweepRun:
        values, suffix = chosen[label]
        assigned = [*overrides, *(f"{key}={text}" for key, text in values.items())]
        try:
            plain = load.read_config(path, assigned)
            own = {
                "name": plain.name + suffix,
                "output_dir": f"{Path(plain.output_dir) / plain.name}-sweep-{'+'.join(shorts)}",
            }
            named = [f"{key}={json.dumps(text, ensure_ascii=False)}" for key, text in own.items()]
            return SweepRun(load.read_config(path, [*assigned, *named]), values)
        except ConfigError as error:
            raise ConfigError(*(_as_varied(problem, values) for problem in error.problems)) from None

    return list(run_each(list(chosen), read).values())


def _as_varied(problem: Problem, values: Mapping[str, str]) -> Problem:
    """The reader takes what is varied for what is set; the user typed --vary."""
    for key, text in values.items():
        if problem.place.argument == Argument("--set", f"{key}={text}"):
            return replace(problem, location=replace(problem.place, argument=Argument("--vary", f"{key}={text}")))
    return problem


def run_each(labels: Sequence[str], work: Callable[[str], Result]) -> dict[str, Result]:
    """What `work` makes of each of `labels`, unless it fails for one.

    Raises:
        RunsFailed: a problem that all have is listed once, others with the label of each; the lowest exit code.
    """
    done: dict[str, Result] = {}
    failures: dict[str, ZImageTrainError] = {}
    for label in labels:
        try:
            done[label] = work(label)
        except ZImageTrainError as error:
            failures[label] = error
    if failures:
        problems = _merged({label: error.problems for label, error in failures.items()}, len(labels))
        raise RunsFailed(min(error.exit_code for error in failures.values()), problems)
    return done


def _merged(found: Mapping[str, Sequence[Problem]], total: int) -> list[Problem]:
    owners: dict[Problem, list[str]] = {}
    for label, problems in found.items():
        for problem in problems:
            owners.setdefault(problem, []).append(label)
    merged = []
    for problem, labels in owners.items():
        argument = problem.place.argument
        says_which = len(labels) == total or (argument is not None and argument.flag == "--vary")
        merged += [problem] if says_which else [problem.of_run(one) for one in labels]
    return merged


def _axes(varied: Sequence[str], overrides: Sequence[str]) -> list[SweepAxis]:
    axes, problems = [], []
    taken = {override.partition("=")[0].strip(): Argument("--set", override) for override in overrides}
    for text in varied:
        argument = Argument("--vary", text)
        where = Location(argument=argument)
        key, equals, values = (part.strip() for part in text.partition("="))
        clash = next((there for other, there in taken.items() if _overlap(key, other)), None)
        if not equals or not key:
            problems.append(Problem(where, "is not key=value,value", EXAMPLE, "bad-argument"))
        elif any(_overlap(key, one) for one in NOT_VARIABLE):
            what = "cannot be varied: a sweep names its runs itself, and they share their caches"
            problems.append(Problem(where, what, "leave it out", "not-variable"))
        elif clash is not None:
            todo = "give all values of a setting in one --vary"
            problems.append(Problem(where, f"is set by {clash} too", todo, "set-twice"))
        else:
            taken[key] = argument
            texts = split(values)
            words, wrong = _words(texts)
            problems += [Problem(where, what, todo, "bad-value") for what, todo in wrong]
            axes.append(SweepAxis(key, texts, words))
    if problems:
        raise ConfigError(*problems)
    return axes


def _overlap(one: str, other: str) -> bool:
    """Whether two keys set the same, or one of them a part of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def split(text: str) -> list[str]:
    """The values in `text`: cut at commas that stand neither in brackets nor in quotes."""
    values, depth, quote, begin = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not text[begin:place].strip(" [{,:"):
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(text[begin:place].strip())
            begin = place + 1
    return [*values, text[begin:].strip()]


def _words(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Each value as a part of a name, and what is wrong with the values."""
    wrong: list[tuple[str, str]] = []
    pairs: list[tuple[str, str]] = []
    for text in texts:
        try:
            value = strict_yaml.parse(text).value
        except YamlError as problem:
            wrong.append((f"{text}: {problem.message}", "quote the value"))
            continue
        if not text:
            wrong.append(("has an empty value", "write null for none"))
        whole = _plain(value, text)
        pairs.append((whole.replace("\\", "/").rstrip("/").rpartition("/")[2], whole))
    words = _distinct([(_quoted(short), _quoted(whole)) for short, whole in pairs])
    for place, word in enumerate(words if not wrong else []):
        first = words.index(word)
        if first != place and pairs[first] == pairs[place]:
            wrong.append((f"{texts[place]} is given twice", "leave one out"))
        elif first != place:
            what = f"{texts[first]} and {texts[place]} would both be called {word}"
            wrong.append((what, "give values that differ in letters and digits"))
    return words, wrong


def _plain(value: Any, text: str) -> str:
    """A value without the freedoms of YAML: 1e-4 and 0.0001 are one."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float) and abs(value) < float("inf"):
        return f"{Decimal(repr(value)).normalize():f}".replace("-", "minus", 1)
    return value if isinstance(value, str) else text


def _quoted(text: str) -> str:
    """What a name can hold of `text`; without a hyphen, since names may not end in -digits."""
    return re.sub(r"[^\w.]+", "_", text)[-LONGEST_WORD:].strip("._")


def _distinct(pairs: list[tuple[str, str]]) -> list[str]:
    """The first of each pair if these differ, else the second."""
    firsts = [first for first, _ in pairs]
    return firsts if len(set(firsts)) == len(firsts) else [second for _, second in pairs]


def _last_name(key: str) -> str:
    """`optimizer.lr` -> lr, `data.0` -> data."""
    return next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
