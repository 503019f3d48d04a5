"""The list of faults: each number has its test, each test its number, and docs/failures.md says the same.

`PYTHONPATH=tests/support python tests/faults/test_faults_list.py` rewrites docs/failures.md.
"""

import ast
import re
from pathlib import Path

import pytest

from fault_list import FAULTS

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "failures.md"
GROUPS = {
    "Config": "test_faults_config.py",
    "Pictures and captions": "test_faults_data.py",
    "Cache and weights": "test_faults_weights.py",
    "Checkpoint and resume": "test_faults_checkpoint.py",
    "Numbers": "test_faults_numerics.py",
    "Signals": "test_faults_signals.py",
    "Process and environment": "test_faults_process.py",
}
NUMBERED = re.compile(r"(\d+)\. (\S.*[.])", re.DOTALL)
CHECK = "Check: "
"""Begins the promise of a test of the tests, which is none to users."""


def docstrings(name: str) -> dict[str, str]:
    """The tests of a file, and their docstrings."""
    tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {function.name: ast.get_docstring(function) or "" for function in functions}


def promises(name: str) -> list[tuple[int, str]]:
    """(number, promise) of every test in a file, in the order of the numbers."""
    found = [NUMBERED.fullmatch(text) for text in docstrings(name).values()]
    return sorted(((int(match[1]), match[2]) for match in found if match), key=lambda promise: promise[0])


def page() -> str:
    """docs/failures.md."""
    lines = [
        "# What can go wrong, and what happens then",
        "",
        "Each point is the promise of a test in `tests/faults/`, which causes the fault and checks the promise; the",
        "numbers are those of the tests. What exit codes mean stands in [how it works](how-it-works.md#exit-codes).",
    ]
    for title, name in GROUPS.items():
        lines += ["", f"## {title}"]
        found = [promise for promise in promises(name) if not promise[1].startswith(CHECK)]
        for number in dict.fromkeys(number for number, _ in found):
            fault, todo = FAULTS[number]
            lines += ["", f"### {number}. {fault}", ""]
            lines += [f"* {' '.join(text.split())}" for of, text in found if of == number]
            lines += [f"* **What to do:** {todo}"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", GROUPS.values())
def test_faults_have_number_and_promise(name: str):
    """Every test of a fault has its number and its promise in the docstring."""
    unnumbered = [test for test, text in docstrings(name).items() if not NUMBERED.fullmatch(text)]
    assert len(docstrings(name)) >= 5 and unnumbered == []


def test_every_fault_of_the_list_has_a_test():
    found = {number for name in GROUPS.values() for number, _ in promises(name)}
    assert found == FAULTS.keys() == set(range(1, 66))


def test_no_file_of_faults_is_left_out():
    assert {path.name for path in HERE.glob("test_faults_*.py")} == {
        *GROUPS.values(),
        "test_faults_helper.py",
        Path(__file__).name,
    }


def test_the_page_of_failures_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "PYTHONPATH=tests/support python tests/faults/test_faults_list.py writes it anew"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
