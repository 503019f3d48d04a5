"""Proofs that were sent: which are kept, and the table and digests that they make."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from zimage_train.commands import prove as command
from zimage_train.commands.prove import prove
from zimage_train.measure.proofs import weights
from zimage_train.measure.proofs.claims import Claim

from helpers import ROOT, script

collect = script("collect_proofs")
CLAIMS = {
    "weights": [
        Claim("sha256", None, note="ab: not seen before", facts={"sha256": "ab", "file": "VAE", "is_published": True}),
        Claim("sha256", None, note="cd: not seen before", facts={"sha256": "cd", "file": "x", "is_published": False}),
        Claim("matched", 0, "modules", 0, "equality", "matched 48/48"),
    ],
    "memory": [Claim("peak", 0.98, "times", 1.05, "forecast", facts={"allocated_gb": 9.8, "predicted_gb": 10.0})],
    "time": [
        Claim("a", 1.1, "times", 1.65, "forecast", facts={"side": 512, "seconds": 0.22, "predicted_seconds": 0.2}),
        Claim("b", 2.0, "times", 1.65, "forecast", facts={"side": 1024, "seconds": 2.0, "predicted_seconds": 1.0}),
        Claim("c", 0.5, "times", 1.0, "reference", facts={"side": 512, "to_reference": 0.5}),
    ],
}


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A proof that the command itself wrote, with the card of somebody."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    parts = {part: lambda subject, claims=claims: iter(claims) for part, claims in CLAIMS.items()}
    monkeypatch.setattr(command, "PARTS", parts)
    prove(None, True, tmp_path / "proof", {})
    content = json.loads((tmp_path / "proof" / "prove.json").read_text())
    content["machine"] = {"card": "NVIDIA GeForce RTX 4090", "memory_gb": 25.25, "multiprocessors": 128}
    content["model"]["is_miniature"] = False
    return content


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of what the script writes."""
    (tmp_path / "memory.md").write_text((ROOT / "docs" / "memory.md").read_text())
    monkeypatch.setattr(collect, "PAGE", tmp_path / "memory.md")
    monkeypatch.setattr(collect, "PROOFS", tmp_path / "proofs")
    monkeypatch.setattr(collect, "DIGESTS", tmp_path / "digests.json")
    return tmp_path


def sent(folder: Path, proof: dict[str, Any]) -> str:
    path = folder / "sent.json"
    path.write_text(json.dumps(proof))
    return str(path)


def test_table_and_digests(proof: dict[str, Any], places: Path):
    """A proof is a row of the table, and its digests of published files become known."""
    assert collect.main([sent(places, proof)]) == 0
    (kept,) = (places / "proofs").iterdir()
    assert kept.name == "nvidia-geforce-rtx-4090-0.1.0-turbo-quick.json"
    row = next(line for line in (places / "memory.md").read_text().splitlines() if "4090, 25 GB" in line)
    assert row == (
        "| NVIDIA GeForce RTX 4090, 25 GB (0.1.0) | 0.22 s |  | 2.00 s | 1.10 to 2.00 | 0.50 | 0.98 | 4, 1 |"
    )
    digests = json.loads((places / "digests.json").read_text())
    assert digests == {"ab": f"VAE of turbo, as docs/bench/proofs/{kept.name} has it"}
    before = (places / "memory.md").read_bytes()
    assert collect.main([]) == 0 and (places / "memory.md").read_bytes() == before


def changed(proof: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of the proof with another value at a path of names and numbers."""
    result = copy.deepcopy(proof)
    place, names = result, path.split(".")
    for name in names[:-1]:
        place = place[int(name)] if name.isdigit() else place[name]
    place[names[-1]] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("parts.time.claims.1.verdict", "holds", "where the numbers say 'fails'"),
        ("parts.time.claims.1.value", 1.0, "where the numbers say 'holds'"),
        ("parts.time.claims.0.note", "/home/someone/run", "could be a path"),
        ("parts.time.claims.0.note", "C:\\Users\\someone", "could be a path"),
        ("versions.torch", "built in ~/torch", "could be a path"),
        ("model.variant", "someone@example.org", "could be a path or a name"),
        ("parts.time.claims.1.verdict", "not tried", "was not tried and has numbers"),
        ("versions", {"torch": "2.13"}, "lacks facts or versions"),
        ("parts.time.claims.0.facts", {"seconds": 1.0}, "lacks facts or versions"),
        ("parts.memory.claims.0.facts.predicted_gb", 0, "lacks facts or versions"),
        ("machine", {"processor": "x86_64"}, "without a GPU"),
        ("machine.card", 3, "is no prove.json"),
        ("parts.time.seconds", 1e400, "is no prove.json"),
        ("parts", [], "is no prove.json"),
        ("parts.time.claims.0.more", 1, "is no prove.json"),
    ],
)
def test_refused(
    proof: dict[str, Any], places: Path, capsys: pytest.CaptureFixture[str], path: str, value: Any, why: str
):
    """A proof that contradicts itself, or could be personal, is refused with the reason, and nothing is kept."""
    assert collect.main([sent(places, changed(proof, path, value))]) == 1
    assert why in capsys.readouterr().err and not (places / "proofs").exists()
    assert collect.NONE_YET in (places / "memory.md").read_text()


def test_no_file(places: Path, capsys: pytest.CaptureFixture[str]):
    assert collect.main([str(places / "nowhere.json")]) == 1
    assert "nowhere.json: " in capsys.readouterr().err


def test_written_from_what_is_kept():
    """The table in the docs and the digests in the package are those of the proofs in docs/bench/proofs."""
    kept = {path.name: collect.read_proof(path) for path in sorted(collect.PROOFS.glob("*.json"))}
    page = collect.PAGE.read_text(encoding="utf-8")
    assert collect.written_page(page, collect.table(list(kept.values()))) == page
    assert collect.digests(kept) == weights.KNOWN_DIGESTS
