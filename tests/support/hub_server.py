"""A hub on this machine: the part of its HTTP interface that listing and downloading use, over plain folders."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it serves, what it was asked for, and what it does wrong."""

    repositories: dict[str, dict[str, Path]]
    url: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(Method, path, Range)."""
    cut_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection ends, the first time."""
    spoiled: set[str] = field(default_factory=set)
    """Files that come with a changed byte."""

    def downloads(self) -> list[tuple[str, str | None]]:
        return [(path, range_) for method, path, range_ in self.asked if method == "GET" and "/resolve/" in path]


def _siblings(files: dict[str, Path]) -> list[dict]:
    found = []
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"sha256": sha256, "size": len(content), "pointerSize": 130} if name.endswith(".safetensors") else None
        found.append({"rfilename": name, "size": len(content), "blobId": sha256[:40], **({"lfs": lfs} if lfs else {})})
    return found


def _entry(sibling: dict) -> dict:
    entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
    if "lfs" in sibling:
        entry["lfs"] = {"oid": sibling["lfs"]["sha256"], "size": sibling["size"], "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            found = _siblings(self.hub.repositories.get(match[1], {}))
            entries = [_entry(one) for one in found]
            headers = {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}
            return self.send(200, json.dumps(entries).encode(), headers, with_body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self.hub.repositories.get(match[1])
            if files is None:
                return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, with_body)
            body = json.dumps({"id": match[1], "sha": COMMIT, "siblings": _siblings(files)}).encode()
            return self.send(200, body, {"Content-Type": "application/json"}, with_body)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        file = self.hub.repositories.get(match[1], {}).get(match[2]) if match else None
        if match is None or file is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        return self.file(match[2], file.read_bytes(), with_body)

    def file(self, name: str, content: bytes, with_body: bool) -> None:
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if name in self.hub.spoiled:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if with_body and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.hub.cut_after.pop(name, None) if with_body else None
        self.send(206 if start else 200, content[start:], headers, with_body, cut)

    def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(repositories: dict[str, dict[str, Path]], kind: type[Handler] = Handler) -> Iterator[Hub]:
    """Serve `repositories`, name -> path in it -> file, on a free port of this machine, as a hub of that `kind`."""
    hub = Hub(repositories)
    handler = type("Handler", (kind,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
