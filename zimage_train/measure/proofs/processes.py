"""Commands of this project, and other programs, in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from zimage_train.errors import Problem, ZImageTrainError

LONGEST_SECONDS = 7200
"""A command that takes longer hangs."""


def command_of(name: str) -> list[str]:
    return [sys.executable, "-m", "zimage_train", name]


def run(command: list[str]) -> str:
    """Run a command to its end, and return its output.

    Raises:
        ZImageTrainError: it failed.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=environment(),
        timeout=LONGEST_SECONDS,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ZImageTrainError(Problem(" ".join(command[1:4]), f"failed: {' '.join(last)}", "", "command-failed"))
    return done.stdout


def kill_after_step(command: list[str], metrics: Path, step: int) -> None:
    """Start `command`, and kill it when `metrics` has the record of `step`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    last = time.monotonic() + LONGEST_SECONDS
    while process.poll() is None:
        has_step = metrics.exists() and metrics.read_bytes().count(b"\n") >= step
        if has_step or time.monotonic() > last:
            process.kill()
        time.sleep(0.002)


def environment() -> dict[str, str]:
    """Return the variables of a process that downloads nothing, and prints UTF-8 everywhere."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
