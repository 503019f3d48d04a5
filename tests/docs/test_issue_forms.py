"""The forms in which somebody reports: GitHub shows them, and the commands and files that they name exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from zimage_train.cli.app import app

ROOT = Path(__file__).parents[2]
FORMS = sorted(set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"})
ATTRIBUTES = {
    "markdown": {"value"},
    "input": {"label", "description", "placeholder", "value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
    "dropdown": {"label", "description", "multiple", "options", "default"},
}
"""Type of an item -> its attributes, as GitHub's syntax for issue forms has them; other types are not used here."""

each_form = pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_forms_are_there():
    assert [path.name for path in FORMS] == ["bug.yml", "proof.yml"]
    assert set(read(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml")) == {"blank_issues_enabled"}


@each_form
def test_form_has_the_shape_of_github(path: Path):
    """A form with an error is not offered at all, and nobody is told."""
    form = read(path)
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "title", "body"}
    assert all(isinstance(form[key], str) and form[key].strip() for key in set(form) - {"body"})
    for item in form["body"]:
        assert set(item) <= {"type", "id", "attributes", "validations"}, item
        assert set(item["attributes"]) <= ATTRIBUTES[item["type"]], item
        assert item.get("validations", {"required": True}) in ({"required": True}, {"required": False}), item
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert all(item["attributes"]["label"] and re.fullmatch(r"[A-Za-z0-9_-]+", item["id"]) for item in fields)
    for names in ([item["id"] for item in fields], [item["attributes"]["label"] for item in fields]):
        assert names and len(set(names)) == len(names)
    for item in form["body"]:
        if item["type"] == "markdown":
            assert item["attributes"]["value"] and "id" not in item and "validations" not in item
        if item["type"] == "dropdown":
            options = item["attributes"]["options"]
            assert all(isinstance(option, str) for option in options) and len(set(options)) == len(options) > 1


@each_form
def test_commands_of_a_form_exist(path: Path):
    """Every command that a form asks for is one of the program, with its options."""
    commands = re.findall(r"`zimage-train ([^`]+)`", path.read_text(encoding="utf-8"))
    assert any(command.startswith("prove ") for command in commands)
    for command in commands:
        done = CliRunner().invoke(app, [*shlex.split(command), "--help"])
        assert done.exit_code == 0, (command, done.output)


@each_form
def test_pages_of_a_form_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`(docs/[^`]+)`", text)
    assert named and [name for name in named if not (ROOT / name).is_file()] == []
    assert "://" not in text


def test_a_bug_is_asked_for_what_it_needs():
    """It asks for version, command, output, config and proof, and says that the proof is safe to send."""
    asked = {item["id"]: item for item in read(FORMS[0])["body"] if "id" in item}
    assert set(asked) == {"version", "command", "result", "output", "config", "proof"}
    described = " ".join(asked["proof"]["attributes"]["description"].split())
    assert "`zimage-train prove --quick -o proof`" in described
    assert "names no path, prompt or person" in described
