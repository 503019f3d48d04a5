"""The web page in a process of its own, and a browser that looks at it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STARTING_SECONDS = 60


def chromium() -> str:
    """Path of the system's Chromium. Without one a browser test is skipped, but in CI it fails."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        message = "needs Chromium: install your system's package"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class PageServer:
    """A running page."""

    folder: Path
    """Its working directory, which holds `runs`."""
    port: int
    process: subprocess.Popen[bytes]
    options: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def restart(self) -> None:
        """Kill the page as a crash would, and start it again at the same address."""
        self.process.kill()
        self.process.wait()
        self.process = _start(self.folder, self.port, self.options)


@contextmanager
def page_server(folder: Path, *options: str) -> Iterator[PageServer]:
    """The page of `folder`, which may open images there and in the folders that `options` name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--folder", str(folder), *options]
    server = PageServer(folder, port, _start(folder, port, given), given)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=20)
        _end_runs(server.runs)


def _start(folder: Path, port: int, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zimage_train", "ui", "--no-browser", "--port", str(port), *options]
    said = folder / "page.log"
    # NiceGUI behaves differently where it finds pytest.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    with said.open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    until = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < until:
        try:
            httpx.get(f"http://127.0.0.1:{port}/openapi.json", timeout=5)
            return process
        except httpx.TransportError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the page did not start: {said.read_text()}")


def _end_runs(runs: Path) -> None:
    """Kill the trainings that go on without the page."""
    for holder in runs.glob("*/run.holder"):
        words = holder.read_text().split()
        try:
            os.kill(int(words[1]), signal.SIGKILL)
        except (ProcessLookupError, IndexError, ValueError):
            continue


def console_errors(page: Page) -> list[str]:
    """A list that fills with the errors that the page's console shows, and with requests that failed."""
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))

    def failed(request: Request) -> None:
        # What is loaded when a page is left is broken off, and so is a request that becomes a download.
        if request.failure != "net::ERR_ABORTED":
            errors.append(f"failed: {request.url} ({request.failure})")

    page.on("requestfailed", failed)
    return errors
