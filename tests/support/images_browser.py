"""A server for the tests of the page of images."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

from zimage_train import mini

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
LESSON = mini.LESSON / "zorb"
START_SECONDS = 60


@contextmanager
def served(workspace: Path) -> Iterator[str]:
    """Serve the page of a workspace, and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
        "XDG_CACHE_HOME": str(workspace / ".cache"),
    }
    command = [sys.executable, str(SUPPORT / "images_server.py"), str(workspace), str(port)]
    with (workspace / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=workspace)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process, workspace / "server.log")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def copy_lesson(folder: Path, count: int = 12) -> Path:
    """Copy the first miniature images with their captions into a folder, and return it."""
    folder.mkdir(parents=True)
    for path in sorted(LESSON.glob("*.png"))[:count]:
        shutil.copy(path, folder)
        shutil.copy(path.with_suffix(".txt"), folder)
    return folder


def saved(file: Path, text: str, seconds: float = 10) -> bool:
    """Wait until a file has this text, and return whether it has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and file.read_text(encoding="utf-8").strip() == text:
            return True
        time.sleep(0.05)
    return False


def open_page(page: Page, address: str) -> None:
    """Open a page, and wait until it can be acted on."""
    page.goto(address)
    page.wait_for_function("window.did_handshake")


def open_images(page: Page, address: str, folder: Path) -> None:
    """Open the page of a folder, and wait for its images."""
    open_page(page, f"{address}/images?folder={folder}")
    page.wait_for_selector(".zt-image img")
    page.wait_for_function("document.querySelector('[role=status]').textContent.includes('without a caption')")
