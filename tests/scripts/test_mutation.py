"""The configuration of `scripts/mutation.py`, and the page that it writes."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "scripts" / "mutation.toml").read_text(encoding="utf-8"))
ARGUED = [entry for entry in CONFIG["argued"] if "module" in entry]


def without_spaces(text: str) -> str:
    return "".join(text.split())


def test_modules_and_tests_exist():
    """Every module and every file of tests is there, and the page has a line for each module."""
    page = (ROOT / "docs" / "bench" / "mutation.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE) == list(CONFIG["modules"])
    for module, tests in CONFIG["modules"].items():
        paths = [module, *(test.partition("::")[0] for test in tests)]
        assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("entry", ARGUED, ids=lambda entry: entry["before"][:30])
def test_argued_lines_are_there(entry: dict[str, str]):
    """A line of which a mutant is argued away is still in its module; or else its entry goes."""
    source = (ROOT / entry["module"]).read_text(encoding="utf-8")
    assert without_spaces(entry["before"]) in without_spaces(source)
    assert entry["module"] in CONFIG["modules"] and without_spaces(entry["after"]) != without_spaces(entry["before"])
