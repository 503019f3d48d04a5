"""A Python whose imports are done: what a test starts with it is forked from a process that holds torch already.

`warm_python(folder)` starts that process and yields the path of a program that takes the arguments of `python`
(`-m MODULE ...`, `-c CODE ...`, `SCRIPT ...`), its environment, folder, streams and network, passes signals on and ends
as its fork ends; whoever kills it kills the fork. So a process costs a test no seconds of imports.
"""

import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MESSAGE_BYTES = 2**20
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
asked = dict(program=sys.argv[0], words=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd())
network = os.open("/proc/self/ns/net", os.O_RDONLY)
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2, network])
code = int(server.recv(16) or b"1")
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """Yield a program to start instead of `sys.executable`, which is what a system without process descriptors gets."""
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    address, client = str(folder / "socket"), folder / "python"
    # NiceGUI behaves differently where it finds pytest.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command, pipe = [sys.executable, __file__, address], subprocess.PIPE
    environment["PYTHONPATH"] = str(ROOT)
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env=environment)
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        yield str(client)
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait(60)


def serve(address: str) -> dict[str, Any] | None:
    """Fork a process for each connection; return in a fork what it is to run, and None when the tests are done."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(100)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    ready.register(0, selectors.EVENT_READ)
    forks: dict[int, int] = {}
    """Connection or process descriptor -> process."""
    connections: dict[int, socket.socket] = {}
    """Process -> its connection."""
    os.write(1, b"ready\n")
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                message, streams, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 4)
                process = os.fork()
                if process == 0:
                    for own in (listener, connection, ready, *connections.values()):
                        own.close()
                    return json.loads(message) | {"streams": streams}
                for stream in streams:
                    os.close(stream)
                descriptor = os.pidfd_open(process)
                forks |= {connection.fileno(): process, descriptor: process}
                connections[process] = connection
                ready.register(connection, selectors.EVENT_READ)
                ready.register(descriptor, selectors.EVENT_READ)
            elif key.fd == 0:
                for process in connections:
                    os.kill(process, signal.SIGKILL)
                return None
            elif isinstance(key.fileobj, socket.socket):
                if key.fileobj.fileno() < 0:
                    continue  # its fork has ended in this same round
                number = key.fileobj.recv(1)
                os.kill(forks[key.fd], number[0] if number else signal.SIGKILL)
                if not number:
                    ready.unregister(key.fileobj)
            else:
                end(key.fd, forks.pop(key.fd), ready, connections)


def end(descriptor: int, process: int, ready: selectors.BaseSelector, connections: dict[int, socket.socket]) -> None:
    """Tell the exit code of a fork that has ended."""
    ready.unregister(descriptor)
    os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection = connections.pop(process)
    if connection in ready.get_map():
        ready.unregister(connection)
        connection.send(str(code).encode())
    connection.close()


def run(asked: dict[str, Any], paths: list[str]) -> None:
    """Be the program that was asked for."""
    os.setsid()
    *streams, network = asked["streams"]
    if os.fstat(network).st_ino != Path("/proc/self/ns/net").stat().st_ino:
        assert ctypes.CDLL(None).setns(network, 0) == 0  # os.setns is new in Python 3.12
    os.close(network)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.executable = asked["program"]
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", 1 if os.isatty(1) or "PYTHONUNBUFFERED" in os.environ else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    first, *words = [word for word in asked["words"] if word != "-u"]
    own = {"-m": asked["folder"], "-c": ""}.get(first, str(Path(first).parent))
    sys.path[:] = [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *paths]
    sys.argv = words if first == "-m" else [first, *words[first == "-c" :]]
    if first == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(words[0], sys.modules["__main__"].__dict__)
    else:
        runpy.run_path(first, run_name="__main__")


def preload() -> None:
    """Import what most processes of the tests import."""
    import nicegui

    import zimage_train.commands.image_renderer
    import zimage_train.commands.lora_merge
    import zimage_train.commands.train
    import zimage_train.report.heatmap

    assert nicegui and zimage_train
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    standard_paths = [path for path in sys.path if path not in (str(ROOT), str(Path(__file__).parent))]
    preload()
    request = serve(sys.argv[1])
    if request is not None:
        run(request, standard_paths)
