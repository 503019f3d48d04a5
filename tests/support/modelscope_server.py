"""ModelScope on this machine: the part of its HTTP interface that listing and downloading use."""

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from hub_server import Handler


class ModelScope(Handler):
    """Answers as ModelScope does."""

    def answer(self, with_body: bool) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/(repo/files|repo)", url.path)
        repository, what = match.groups() if match else ("", "")
        path = query.get("FilePath", "")
        asked = f"/{repository}/resolve/{query.get('Revision')}/{path}" if what == "repo" else url.path
        self.hub.asked.append((self.command, asked, self.headers.get("Range")))
        files = self.hub.repositories.get(repository)
        if files is None or (what == "repo" and path not in files):
            body = {"Code": 10010205001, "Message": f"{repository or url.path} does not exist", "Success": False}
            return self.send(404, json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)
        if what == "repo":
            return self.file(path, files[path].read_bytes(), with_body)
        body = {"Code": 200, "Success": True, "Data": {"Files": _entries(files, query.get("Root"))}}
        return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)


def _entries(files: dict[str, Path], root: str | None) -> list[dict]:
    """The files under `root`, and the folders that hold them."""
    inside = {name: path for name, path in files.items() if root is None or name.startswith(f"{root}/")}
    folders = sorted({name.rpartition("/")[0] for name in inside} - {""})
    entries = [{"Path": name, "Name": name.rpartition("/")[2], "Type": "tree", "Size": 0} for name in folders]
    for name, path in sorted(inside.items()):
        content = path.read_bytes()
        entry = {"Path": name, "Name": path.name, "Type": "blob", "Size": len(content), "Revision": "0123456789abcdef"}
        entries.append({**entry, "Sha256": hashlib.sha256(content).hexdigest()})
    return entries
