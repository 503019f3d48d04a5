"""The command `ui`: what it refuses, and the link that it prints for a network."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from zimage_train.cli.app import app
from zimage_train.errors import ConfigError


def refusal(*words: str) -> str:
    done = CliRunner().invoke(app, ["ui", "--no-browser", *words])
    assert isinstance(done.exception, ConfigError) and done.exception.exit_code == 2
    return str(done.exception)


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert re.fullmatch(
            rf"--port: 127.0.0.1:{port} cannot be opened \(.+\); give another .*", refusal("--port", port)
        )


def test_a_foreign_host_is_refused():
    assert "--port: 192.0.2.1:7860 cannot be opened" in refusal("--host", "192.0.2.1")


def test_without_nicegui(monkeypatch: pytest.MonkeyPatch):
    """The line says what to install; what is missing of our own is no such line."""
    for name in [name for name in sys.modules if name.startswith("zimage_train.ui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert "ui: needs nicegui, which is not installed; install it with `pip install 'zimage-train[ui]'`" in refusal()


@pytest.mark.slow
def test_a_network_gets_a_link(tmp_path: Path):
    """Opened to a network, the page asks for the token that its link has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "zimage_train", "ui", "--no-browser", "--host", "0.0.0.0", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            link = process.stdout.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
            bare = link.split("?")[0]
            with httpx.Client() as client:
                assert client.get(bare).status_code == 401
                assert client.get(link, follow_redirects=True).status_code == 200
                assert client.get(bare).status_code == 200, "the cookie is kept"
        finally:
            process.terminate()
