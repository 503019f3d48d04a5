"""The table of seconds by folder that `scripts/test.sh` prints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import test_report

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_file_counts_for_its_room():
    assert test_report.folder_of("tests/test_flow.py::test_it[a/b]") == "tests"
    assert test_report.folder_of("tests/faults/test_data.py::test_it") == "tests/faults"
    assert test_report.folder_of("tests/faults/deep/test_data.py::TestIt::test_it") == "tests/faults"


def test_table_marks_exceeded_budgets():
    """The table marks folders that exceed their budget."""
    spent = {"tests/lora": 12.04, "tests/io": 3.0, "tests": 1.0}
    assert test_report.table(spent, {"tests/lora": 12, "tests/io": 3, "tests/cli": 9}) == [
        "tests          1.0 s  no budget",
        "tests/io       3.0 s  of 3",
        "tests/lora    12.0 s  of 12  OVER BUDGET",
    ]


def test_budget_folders_exist():
    """The budgets are of folders that exist."""
    budgets = json.loads(test_report.BUDGETS.read_text(encoding="utf-8"))
    assert all((ROOT / folder).is_dir() and seconds > 0 for folder, seconds in budgets.items())


@pytest.mark.slow
def test_table_precedes_the_summary(tmp_path):
    """pytest prints the table before its summary, and a slow test does not fail."""
    for name in ("scripts/test_report.py", "tests/io/test_slow.py", "tests/test_quick.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "scripts/test_report.py", tmp_path / "scripts")
    (tmp_path / "tests/budgets.json").write_text('{"tests": 60, "tests/io": 0.1}')
    (tmp_path / "tests/io/test_slow.py").write_text(
        "import time, pytest\n"
        "@pytest.fixture\n"
        "def slow(): time.sleep(0.3)\n"  # setting up counts as well
        "def test_slow(slow): pass\n"
    )
    (tmp_path / "tests/test_quick.py").write_text("def test_quick(): pass\n")
    options = ["-q", "-n", "2", "-p", "scripts.test_report", "tests"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "xdist", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    *_, quick, slow, summary = done.stdout.splitlines()
    assert quick.split() == ["tests", "0.0", "s", "of", "60"]
    assert slow.startswith("tests/io ") and slow.endswith(" of 0.1  OVER BUDGET")
    assert summary.startswith("2 passed in")
