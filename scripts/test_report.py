"""A plugin of pytest that prints the seconds of each folder of tests beside its budget in tests/budgets.json.

`setup_venv.py test` loads it. It only prints: a slow machine fails no test.
"""

import json
from collections import defaultdict
from pathlib import Path

BUDGETS = Path(__file__).resolve().parent.parent / "tests" / "budgets.json"

seconds: dict[str, float] = defaultdict(float)
"""Folder -> seconds of all workers together, with setup and teardown."""


def folder_of(nodeid: str) -> str:
    """Return `tests/ROOM`, or `tests` for a file that is in no room."""
    folders = nodeid.partition("::")[0].split("/")[:-1]
    return "/".join(folders[:2])


def table(spent: dict[str, float], budgets: dict[str, float]) -> list[str]:
    """Return a line for each folder of which something ran."""
    width = max(map(len, spent), default=0)
    lines = []
    for folder in sorted(spent):
        line = f"{folder:{width}} {spent[folder]:7.1f} s"
        budget = budgets.get(folder)
        line += "  no budget" if budget is None else f"  of {budget:g}"
        over = budget is not None and spent[folder] > budget
        lines.append(line + ("  OVER BUDGET" if over else ""))
    return lines


def pytest_runtest_logreport(report) -> None:
    seconds[folder_of(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter) -> None:
    if not seconds:
        return
    terminalreporter.section("seconds by folder, of all workers together")
    for line in table(seconds, json.loads(BUDGETS.read_text(encoding="utf-8"))):
        terminalreporter.line(line)
