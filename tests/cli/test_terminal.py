"""Terminals that are closed, full or cannot show a letter, and paths that no system takes: a line, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_train.config import strict_yaml

from mini_config import mini_values


def run(arguments: list[str], shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`zimage-train` with these arguments and this redirection."""
    line = f'exec "$0" -m zimage_train "$@" {shell}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.fixture
def config(tmp_path: Path, shared_cache: Path) -> str:
    values = mini_values(tmp_path / "runs", shared_cache, name="tiny", data=[{}])
    values["data"] = [{"folder": str(tmp_path / "bücher 🙂"), "resolution": [64]}]
    path = tmp_path / "run.yaml"
    path.write_text(strict_yaml.dump(values))
    return str(path)


@pytest.mark.parametrize("command", [["--version"], ["--help"]])
def test_full_disk_under_the_output(command: list[str]):
    """A full disk under standard output is an error that says so."""
    done = run(command, "> /dev/full")
    assert done.returncode == 7, done.stderr
    assert done.stderr.strip() == "standard output: cannot be written (No space left on device)"


@pytest.mark.slow
@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs_change_no_exit_code(config: str, shell: str):
    done = run(["check", config], shell)
    assert done.returncode == 3 and "Traceback" not in done.stdout + done.stderr
    assert run(["--version"], shell).returncode == 0


def test_letters_the_terminal_lacks(config: str):
    """Letters that the terminal cannot show are escaped."""
    done = run(["check", config], PYTHONIOENCODING="ascii")
    assert done.returncode == 3
    assert "b\\xfccher \\U0001f642: does not exist" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["check"], ["train"], ["sample"], ["lora", "inspect"]])
def test_path_no_system_takes(command: list[str]):
    """A path that no system takes is an error of a single line."""
    extra = ["--prompt", "x"] if command == ["sample"] else []
    done = run([*command, "x" * 5000, *extra])
    assert done.returncode in (2, 4) and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
