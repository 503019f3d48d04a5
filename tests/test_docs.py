"""What the documentation says is there is there."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train.cli import app
from zimage_train.config.reading import read_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("steps", [1, 2, 7, 100_000])
def test_the_quickstart_is_valid_for_any_number_of_steps(steps: int):
    assert read_config(ROOT / "configs" / "quickstart.yaml", [f"train.steps={steps}"]).train.steps == steps


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    named = re.findall(r"`((?:zimage_train|scripts|configs|docs|tests)/[\w./-]+)`", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_a_page_shows_exist(page: Path):
    for line in re.findall(r"zimage-train ([a-z]+[^`\n|#]*)", page.read_text(encoding="utf-8")):
        command, *words = line.split()
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        assert all(word in shown.output for word in words if word.startswith("--")), line


def test_pages_speak_of_no_machine():
    for page in PAGES:
        assert not re.search(r"/(work|root|home)/", page.read_text(encoding="utf-8"))
