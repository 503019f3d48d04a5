"""Runs of the miniature, the page on a port of its own, and Chromium, for tests of sampling and LoRA files.

These are functions, not fixtures: a test file makes the fixtures that it needs of them.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from zimage_train.commands.train import run_training
from zimage_train.config.load import validate_config
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.sampling import Sample, Sampler
from zimage_train.ui.workspace import Workspace

from mini_config import mini_values

ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
PROMPTS = ["a red zorb on a blue background", {"prompt": "a yellow [trigger]", "seed": 7, "width": 96}]
PATIENCE_SECONDS = 90.0


@cache
def trained_runs(cache_folder: Path, kind: str = "plain") -> Path:
    """A folder of runs with one, `tiny`, trained on the miniature; once for the session, so only to be read."""
    runs = cache_folder.parent / f"runs-{kind}"
    values = mini_values(
        runs,
        cache_folder,
        model={"quantize": "int8" if kind == "int8" else None},
        ema={"decay": 0.5 if kind == "ema" else None},
        lora={"rank": 16},
        optimizer={"lr": 2e-2},
        sample={"every": 2, "first": True, "width": 64, "height": 64, "prompts": PROMPTS}
        | {"weights": "ema" if kind == "ema" else "raw"},
        save={"every": 2, "dtype": "bf16"},
    )
    config, problems = validate_config(values, str)
    assert config is not None, problems
    run_training(config, fresh=False)
    return runs


def copy_of_runs(runs: Path, target: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(runs, target)
    return target


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@contextlib.contextmanager
def sampler_for(runs: Path, *folders: Path, gpus: tuple[str, ...] = ()) -> Iterator[Sampler]:
    workspace = Workspace(runs, folders)
    sampler = Sampler(workspace, JobQueue(workspace, list(gpus)))
    try:
        yield sampler
    finally:
        sampler.close()


def wait_for(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what or "took too long"
        time.sleep(0.05)


def drawn(sampler: Sampler, *samples: Sample) -> None:
    """Wait until samples are drawn."""
    wait_for(lambda: all(sample.status not in ("waiting", "drawing") for sample in samples))
    assert [sample.status for sample in samples] == ["done"] * len(samples), [sample.problems for sample in samples]


@contextlib.contextmanager
def serving(runs: Path, *folders: Path) -> Iterator[str]:
    """Serve the page; yield its address without the last slash."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for folder in (folders or (runs,)) for word in ("--folder", str(folder))]
    command = [sys.executable, "-m", "zimage_train", "ui", "--no-browser", "--port", str(port), "--runs", str(runs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, *words], cwd=runs.parent, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(address), "the page did not start")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/api/machine").status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def chromium_page(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A page of headless Chromium; what it reports as an error fails the test."""
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": width, "height": height}, locale="en")
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            yield page
        finally:
            browser.close()
    assert errors == [], errors
