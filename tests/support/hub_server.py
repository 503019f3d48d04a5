"""A hub on this machine: what listing, downloading and uploading use of its HTTP interface, over plain folders."""

import base64
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
    tokens: set[str] = field(default_factory=set)
    """Tokens that may create repositories and commit."""
    namespaces: set[str] = field(default_factory=set)
    """Organisations and users in which they may."""
    committed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> path in it -> content, of all uploads."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content of large files that were uploaded, whether or not they are committed."""

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

    def do_POST(self) -> None:
        """Take a step of an upload; what it needs is in the order in which clients ask for it."""
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, None))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.tokens:
            return self.send_json(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path == "/api/validate-yaml":
            is_licensed = "license: " in json.loads(content)["content"]
            errors = [] if is_licensed else [{"message": '"license" is missing'}]
            return self.send_json(200 if is_licensed else 400, {"errors": errors, "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = []
            for file in json.loads(content)["files"]:
                is_large = file["path"].endswith((".safetensors", ".png"))
                mode = "lfs" if is_large else "regular"
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            return self.send_json(200, {"files": modes})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(content)["objects"]:
                action = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}
                objects.append({**one, "actions": action})
            return self.send_json(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(match[1], [json.loads(line) for line in content.splitlines()])
        return self.send_json(404, {"error": "not found"})

    def do_PUT(self) -> None:
        self.hub.asked.append((self.command, self.path, None))
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        is_whole = hashlib.sha256(content).hexdigest() == oid
        if is_whole:
            self.hub.stored[oid] = content
        self.send_json(200 if is_whole else 400, {})

    def create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name.partition("/")[0] not in self.hub.namespaces:
            return self.send_json(403, {"error": f"You don't have the rights to create a model under {name}"})
        is_there = name in self.hub.committed
        self.hub.committed.setdefault(name, {})
        self.send_json(409 if is_there else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def commit(self, repository: str, lines: list[dict]) -> None:
        files = self.hub.committed[repository]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        self.send_json(200, {"commitUrl": f"{self.hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

    def send_json(self, status: int, value: dict) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body=True)

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
