"""The version of a release: written in one place, and named alike where people read it."""

import re
import tomllib
from datetime import date
from pathlib import Path

from zimage_train import __version__

ROOT = Path(__file__).parents[2]
READ_BY_PEOPLE = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.yml")]


def test_changes_are_of_this_version():
    """CHANGELOG.md begins with the version of the package and its date, or "unreleased"; no version comes twice."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [heading.split() for heading in re.findall(r"^## (.*)$", text, re.MULTILINE)]
    assert headings[0][0] == __version__
    assert len({version for version, _ in headings}) == len(headings)
    for _, day in headings:
        assert day == "(unreleased)" or date.fromisoformat(day.strip("()")).isoformat() == day[1:-1]


def test_version_stands_in_one_place():
    """Only zimage_train/__init__.py says the version; pyproject.toml reads it there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "zimage_train.__version__"}
    sources = [*(ROOT / "zimage_train").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "pyproject.toml"]
    holders = [path for path in sources if f'"{__version__}"' in path.read_text(encoding="utf-8")]
    assert holders == [ROOT / "zimage_train" / "__init__.py"]


def test_pages_name_files_of_the_version():
    """Where a page names the wheel or the sdist, or what `--version` prints, it is of this version."""
    named = {}
    for path in READ_BY_PEOPLE:
        for version in re.findall(r"zimage[-_]train[- ](\d+\.\d+\.\w+)", path.read_text(encoding="utf-8")):
            named.setdefault(version, set()).add(path.name)
    assert set(named) == {__version__}, named
    assert {"README.md", "README.zh-CN.md", "install.md", "bug.yml"} <= named[__version__]
