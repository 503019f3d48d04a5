"""Where a problem is, as parts and as text, and that it has a code."""

import ast
from pathlib import Path

import pytest

from zimage_train.errors import Argument, Location, Problem


@pytest.mark.parametrize(
    ("location", "text"),
    [
        (Location("a.yaml", 3, "lora.rank"), "a.yaml:3: lora.rank"),
        (Location("a.yaml", 0, "lora.rank"), "a.yaml:0: lora.rank"),
        (Location("a.yaml", key="lora.rank"), "a.yaml: lora.rank"),
        (Location("a.csv", 7), "a.csv:7"),
        (Location(key="model.path", source="org/repo"), "model.path: org/repo"),
        (Location(key="lora.rank", argument=Argument("--set", "lora.rank=0")), "--set lora.rank=0: lora.rank"),
        (Location(argument=Argument("--set", "")), "--set "),
        (Location(argument=Argument("MODEL"), source="org/repo"), "MODEL: org/repo"),
    ],
)
def test_a_location_reads_as_it_is_written(location: Location, text: str):
    assert str(location) == text
    assert str(Problem(location, "is wrong", "mend it", "bad-value")) == f"{text}: is wrong; mend it"


@pytest.mark.parametrize("location", [Location("a.yaml", 3, "lora.rank"), "standard output"])
def test_problem_of_one_run_keeps_details(location: Location | str):
    """A problem of a run among several keeps its location and its code."""
    problem = Problem(location, "is wrong", code="bad-value").of_run("lora.rank=4")
    assert str(problem) == f"lora.rank=4: {location}: is wrong" and problem.code == "bad-value"
    assert problem.place.key == (location.key if isinstance(location, Location) else None)


PACKAGE = Path(__file__).parents[1] / "zimage_train"


def test_every_problem_has_a_code():
    """Programs choose problems by their codes, which stay when a message changes."""
    without_code: list[str] = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem":
                has_code = len(node.args) == 4 or any(keyword.arg == "code" for keyword in node.keywords)
                if not has_code:
                    without_code.append(f"{path.name}:{node.lineno}")
    assert without_code == []
