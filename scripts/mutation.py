"""Change modules in one place at a time, and see whether their tests notice.

python scripts/mutation.py [MODULE ...]             # all modules of scripts/mutation.toml; continues where it stopped
python scripts/mutation.py --survivors [MODULE ...] # only the mutants that no test has noticed so far
python scripts/mutation.py --page                   # docs/bench/mutation.md, from the results

They need `PYTHONPATH=.` and `pip install -e .[dev,mutation]`. Cosmic Ray makes the mutants and keeps the results in
build/mutation/, for each module as it is now. A mutant is tested by the tests that reach its line, in a process that is
forked from this one, which has imported torch already. Only that process sees the changed module: no file is changed.
"""

import argparse
import difflib
import gc
import hashlib
import importlib.machinery
import json
import os
import signal
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage
import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.tools.filters.operators_filter import OperatorsFilter
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from coverage.parser import PythonParser

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "scripts" / "mutation.toml"
RESULTS = ROOT / "build" / "mutation"
PAGE = ROOT / "docs" / "bench" / "mutation.md"
BEGIN = "<!-- what follows is written by scripts/mutation.py -->"
LIMIT = 60.0
"""Seconds for the tests of a mutant; a loop without end counts as noticed."""
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


def session(module: str) -> Path:
    """Return the file with the results of `module` as it is now, with a list of its mutants."""
    digest = hashlib.sha256((ROOT / module).read_bytes()).hexdigest()[:12]
    path = RESULTS / f"{module.removesuffix('.py').replace('/', '.')}-{digest}.sqlite"
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        with use_db(path) as db:
            init([Path(module)], db, {})
            OperatorsFilter().filter(db, argparse.Namespace(config=str(CONFIG)))
    return path


def mutant(spec: MutationSpec, source: str) -> str:
    """Return `source` with the change that `spec` describes."""
    changed = mutate_code(source, get_operator(spec.operator_name)(**spec.operator_args), spec.occurrence)
    assert changed is not None
    return changed


def in_a_fork(work: Callable[[], int]) -> bool:
    """Return whether `work` ends with 0 within the time limit, in a process of its own that prints nothing."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            status = work()
        finally:
            os._exit(status)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def serve(path: str, source: str) -> None:
    """Let imports in this process read `source` in place of the file `path` and of its bytecode."""
    loader = importlib.machinery.SourceFileLoader
    get_data, path_stats = loader.get_data, loader.path_stats

    def mutated_data(self: Any, asked: str) -> bytes:
        return source.encode() if asked == path else get_data(self, asked)

    def mutated_stats(self: Any, asked: str) -> Any:
        if asked == path:
            raise OSError("without a time of the source, no bytecode is read")
        return path_stats(self, asked)

    loader.get_data, loader.path_stats = mutated_data, mutated_stats  # type: ignore[method-assign]


class Recorder:
    """A plugin of pytest that names the tests for `coverage`, and notes their seconds."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.measured.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration


def record(module: str, tests: list[str], to: Path) -> int:
    """Run `tests`, and write to a file for each line of `module` which tests reach it, the quickest first."""
    measured = coverage.Coverage(data_file=None, include=[str(ROOT / module)])
    recorder = Recorder(measured)
    measured.start()
    measured.switch_context("import")
    status = int(pytest.main([*PYTEST, *tests], plugins=[recorder]))
    measured.stop()
    parser = PythonParser(filename=str(ROOT / module))
    parser.parse_source()
    reached: dict[int, set[str]] = defaultdict(set)
    for line, names in measured.get_data().contexts_by_lineno(str(ROOT / module)).items():
        reached[parser.first_line(line)] |= set(names)
    every = sorted(recorder.seconds, key=recorder.seconds.__getitem__)
    lines: dict[int, list[str]] = {}
    for line in range(1, len((ROOT / module).read_text(encoding="utf-8").splitlines()) + 1):
        names = reached[parser.first_line(line)]
        # What runs when the module is imported may matter to every test.
        lines[line] = every if "import" in names else [name for name in every if name in names]
    to.write_text(json.dumps(lines))
    return status


def run_module(module: str, tests: list[str], survivors: bool) -> None:
    """Test the mutants of `module` that have no result yet, or those that survived, and store the results."""
    path = session(module)
    with use_db(path, WorkDB.Mode.open) as db:
        items = [item for item, result in db.completed_work_items if not result.is_killed]
        if not survivors:
            items = list(db.pending_work_items)
        if not items:
            return
        lines = path.with_suffix(".json")
        if not in_a_fork(lambda: record(module, tests, lines)):
            sys.exit(f"{module}: its tests fail without a change: {' '.join(tests)}")
        tests_of = json.loads(lines.read_text())
        source = (ROOT / module).read_text(encoding="utf-8")
        for number, item in enumerate(items, 1):
            result = run_mutant(item, module, source, tests_of)
            db.set_result(item.job_id, result)
            (spec,) = item.mutations
            print(f"{module} {number}/{len(items)} line {spec.start_pos[0]} {spec.operator_name}: ", end="")
            print(result.test_outcome.value if result.is_killed else f"survived\n{result.diff}", flush=True)


def run_mutant(item: WorkItem, module: str, source: str, tests_of: dict[str, list[str]]) -> WorkResult:
    """Return the result of the tests that reach the line of a mutant."""
    (spec,) = item.mutations
    changed, tests = mutant(spec, source), tests_of[str(spec.start_pos[0])]

    def work() -> int:
        serve(str(ROOT / module), changed)
        return int(pytest.main([*PYTEST, *tests]))

    survived = not tests or in_a_fork(work)
    outcome = TestOutcome.SURVIVED if survived else TestOutcome.KILLED
    return WorkResult(WorkerOutcome.NORMAL, None, outcome, difference(source, changed))


def difference(before: str, after: str) -> str:
    """Return the lines that differ, with `-` and `+`."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def changed_lines(diff: str) -> tuple[str, str]:
    """Return what a difference takes away and what it puts there, without spaces."""
    before, after = "", ""
    for line in diff.splitlines():
        text = "".join(line[1:].split())
        if line[0] == "-":
            before += text
        else:
            after += text
    return before, after


def argument_for(module: str, diff: str, argued: list[dict[str, str]]) -> dict[str, str] | None:
    """Return the entry of `argued` that says why a mutant of `module` is no fault, or None."""
    for entry in argued:
        lines = tuple("".join(entry[key].split()) for key in ("before", "after"))
        if entry.get("module", module) == module and lines == changed_lines(diff):
            return entry
    return None


def write_page(config: dict[str, Any]) -> list[str]:
    """Write the page of all results, and return the differences of survivors that nobody has argued away."""
    rows, reasons, open_, used = [], [], [], Counter()
    for module, tests in config["modules"].items():
        counts = Counter()
        found: dict[str, str] = {}
        with use_db(session(module), WorkDB.Mode.open) as db:
            if list(db.pending_work_items):
                sys.exit(f"{module} has mutants that were not tested; run them first")
            for _, result in db.completed_work_items:
                if result.worker_outcome is WorkerOutcome.SKIPPED:
                    continue
                counts["all"] += 1
                counts["noticed"] += result.is_killed
                if not result.is_killed:
                    entry = argument_for(module, result.diff, config["argued"])
                    if entry is None:
                        open_.append(f"{module}\n{result.diff}")
                    else:
                        after = f"`{entry['after']}`" if entry["after"] else "nothing"
                        found[f"`{entry['before']}` → {after}"] = entry["because"]
                        used[str(entry)] += 1
                        counts["argued"] += 1
        names = ", ".join(f"`{test}`" for test in tests)
        rows.append(f"| `{module}` | {names} | {counts['all']} | {counts['noticed']} | {counts['argued']} |")
        if found:
            reasons += [f"\n`{module}`\n", *(f"- {change}: {why}" for change, why in sorted(found.items()))]
    for entry in config["argued"]:
        # It speaks of one mutant, or of as many as it says, so that it hides no other with the same text.
        if "module" in entry and used[str(entry)] != entry.get("times", 1):
            open_.append(f"argued {used[str(entry)]} times: {entry}")
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[0] + BEGIN
    head = "\n\n| Module | Tests | Mutants | Noticed | Argued |\n|---|---|--:|--:|--:|\n"
    reasons_head = "\n\n## Why the others are no faults\n"
    PAGE.write_text(text + head + "\n".join(rows) + reasons_head + "\n".join(reasons) + "\n", encoding="utf-8")
    return open_


def import_libraries() -> None:
    """Import what most tests need and no mutant changes."""
    import beartype  # noqa: F401
    import diffusers
    import hypothesis
    import jaxtyping  # noqa: F401
    import peft  # noqa: F401
    import pydantic  # noqa: F401
    import torch  # noqa: F401
    import transformers
    import typer  # noqa: F401

    assert diffusers.ZImagePipeline and transformers.Qwen3Model  # loaded when they are asked for
    # A failure is enough: it is not made smaller, and not tried again with the next mutant.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutation", phases=phases, database=None)
    hypothesis.settings.load_profile("mutation")
    gc.freeze()  # or each process would go through all these objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    os.chdir(ROOT)
    config = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    if given.page:
        sys.exit("\n".join(write_page(config)) or 0)
    import_libraries()
    for module in given.modules or config["modules"]:
        run_module(module, config["modules"][module], given.survivors)


if __name__ == "__main__":
    main()
