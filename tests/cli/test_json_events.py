"""`zimage-train --json`: every line of every stream is an event, and a person's lines stay as they were."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train.cli import app
from zimage_train.report.console import Console
from zimage_train.report.printing import JSON_OUTPUT

QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def for_people_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # the quickstart's paths are relative to it
    yield
    JSON_OUTPUT.set(False)


def events(capfd: pytest.CaptureFixture[str]) -> tuple[list[dict], list[dict]]:
    """The events on standard output and on standard error; fails on a line that is none."""
    read = capfd.readouterr()
    found = tuple([json.loads(line) for line in text.splitlines()] for text in read)
    assert all("event" in event for stream in found for event in stream)
    return found


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of the whole program, errors and all."""
    monkeypatch.setattr("sys.argv", ["zimage-train", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return int(ended.value.code or 0)


def of_kind(found: list[dict], kind: str) -> list[dict]:
    return [event for event in found if event["event"] == kind]


@pytest.mark.slow
def test_events_of_a_training_run(monkeypatch, capfd, tmp_path: Path) -> None:
    """A run reports its progress and where its LoRA is."""
    sets = {"train.steps": 3, "output_dir": tmp_path, "sample.every": "null", "save.every": 3, "cache.folder": tmp_path}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    assert command(monkeypatch, "--json", "train", QUICKSTART, *words) == 0
    out, _ = events(capfd)
    training = [event for event in of_kind(out, "progress") if event["what"] == "training"]
    assert training[-1]["done"] == training[-1]["total"] == 3 and "loss" in training[-1]["note"]
    assert any(event["text"].startswith("done: ") for event in of_kind(out, "line"))
    log = (tmp_path / "quickstart" / "log.txt").read_text()
    assert "done: " in log and '"event"' not in log


def test_events_of_problems(monkeypatch, capfd) -> None:
    """Every problem is an event of its own."""
    code = command(monkeypatch, "--json", "train", QUICKSTART, "--set", "lora.rank=0", "--set", "train.stepz=3")
    out, err = events(capfd)
    problems = of_kind(err, "error")
    assert code == 2 and out == [] and len(problems) == 2
    assert {problem["exit_code"] for problem in problems} == {2}
    assert all(problem["found"] for problem in problems)
    assert [(one["code"], one["key"]) for one in problems] == [
        ("bad-value", "lora.rank"),
        ("unknown-key", "train.stepz"),
    ]


def test_event_of_a_file_error(monkeypatch, capfd, tmp_path: Path) -> None:
    """An error in a file has the file, its line and its key as separate fields."""
    path = tmp_path / "bad.yaml"
    path.write_text("name: a\ndata: [{folder: x}]\nlora:\n  rnak: 4\n")
    assert command(monkeypatch, "--json", "train", path) == 2
    (problem,) = of_kind(events(capfd)[1], "error")
    parts = {name: problem[name] for name in ("where", "code", "file", "line", "key")}
    place = f"{path}:4: lora.rnak"
    assert parts == {"where": place, "code": "unknown-key", "file": str(path), "line": 4, "key": "lora.rnak"}


@pytest.mark.parametrize("words", [["train", QUICKSTART, "--bogus"], ["trian"], ["train"]])
def test_a_misspelt_command_is_an_event_too(monkeypatch, capfd, words: list[str]) -> None:
    assert command(monkeypatch, "--json", *words) == 2
    out, err = events(capfd)
    assert out == [] and [event["where"] for event in err] == ["command line"]


@pytest.mark.parametrize("verb", ["check", "timesteps"])
def test_events_of_printed_results(monkeypatch, capfd, verb: str) -> None:
    """The lines that a command prints as its result are `result` events."""
    assert command(monkeypatch, verb, QUICKSTART) == 0
    shown = capfd.readouterr().out.splitlines()
    assert command(monkeypatch, "--json", verb, QUICKSTART) == 0
    out, err = events(capfd)

    def stays(text: str) -> str:
        return text if "free" not in text else ""  # the disk and the memory are other processes' too

    assert [stays(event["text"]) for event in of_kind(out, "result")] == [stays(line) for line in shown]
    assert len(out) == len(shown) and (verb == "timesteps" or of_kind(err, "progress"))


def test_one_object_stays_one_object(capfd) -> None:
    result = CliRunner().invoke(app.app, ["--json", "timesteps", QUICKSTART, "--json"])
    assert "sigma_mean" in json.loads(result.stdout)


def test_events_end_with_the_command() -> None:
    """`--json` holds for a single command; the next command prints for people again."""
    CliRunner().invoke(app.app, ["--json", "timesteps", QUICKSTART])
    result = CliRunner().invoke(app.app, ["timesteps", QUICKSTART])
    assert '"event"' not in result.stdout


def test_events_of_progress_are_throttled(monkeypatch, capfd) -> None:
    """Progress is reported at its start, at its end and once a second."""
    JSON_OUTPUT.set(True)
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) / 4)
    console = Console()
    with console.live_progress():
        for done in range(1, 11):
            console.progress("pictures", done, 10)
        console.warning("[trigger] is a word")
    out, _ = events(capfd)
    assert [event["done"] for event in of_kind(out, "progress")] == [1, 5, 9, 10]
    assert of_kind(out, "warning") == [{"event": "warning", "text": "[trigger] is a word"}]
