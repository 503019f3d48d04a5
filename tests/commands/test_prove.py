"""`prove` as a command: what is written and when, what is measured again, and what ends with 1."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from zimage_train.cli.app import app
from zimage_train.commands import prove as command
from zimage_train.commands.prove import prove
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Problem, ZImageTrainError
from zimage_train.measure.proofs import durations, loaders
from zimage_train.measure.proofs.claims import Claim, not_tried
from zimage_train.measure.proofs.loaders import Project
from zimage_train.measure.proofs.subject import Subject, choose_model
from zimage_train.models.arch import TransformerShape

HOLDS, FAILS = Claim("a", 1, "units", 1, "fp64", "ten of them"), Claim("b", 2, "units", 1, "fp64")
HELD = {
    "promise": "a",
    "verdict": "holds",
    "value": 1,
    "unit": "units",
    "bound": 1,
    "bound_from": "fp64",
    "note": "ten of them",
}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Parts:
    """Parts that yield given claims, or raise, and count how often they were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **parts: list[Claim] | Exception) -> None:
        self.measured: list[str] = []
        self.parts = parts
        monkeypatch.setattr(command, "PARTS", {name: self.claims_fn(name) for name in parts})

    def claims_fn(self, name: str) -> command.ClaimsFn:
        def claims(subject: Subject) -> Iterator[Claim]:
            self.measured.append(name)
            content = self.parts[name]
            if isinstance(content, Exception):
                raise content
            yield from content

        return claims


def claims_in(folder: Path) -> dict[str, list[dict[str, object]]]:
    parts = json.loads((folder / "prove.json").read_text())["parts"]
    return {part: measured["claims"] for part, measured in parts.items()}


def test_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What is measured is kept, also if a later part ends the program, and is not measured again."""
    parts = Parts(monkeypatch, one=[HOLDS], two=[HOLDS], three=[HOLDS])
    parts.parts["two"] = KeyboardInterrupt()  # type: ignore[assignment]

    def claims(subject: Subject) -> Iterator[Claim]:
        raise KeyboardInterrupt
        yield

    patched = dict(command.PARTS)
    monkeypatch.setitem(command.PARTS, "two", claims)
    with pytest.raises(KeyboardInterrupt):
        prove(None, True, tmp_path, {})
    assert list(claims_in(tmp_path)) == ["one"]
    monkeypatch.setattr(command, "PARTS", patched)
    parts.parts["two"] = [HOLDS]
    assert prove(None, True, tmp_path, {})
    assert parts.measured == ["one", "two", "three"]
    assert claims_in(tmp_path)["one"] == [HELD]
    assert "claims: 3 hold, 0 fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("machine", {"card": "another"}),
        ("versions", {"torch": "1.0"}),
        ("model", {"variant": "base"}),
        ("model", {"digest": "of a finetune with the same shape"}),
    ],
)
def test_measured_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, changed: dict[str, str]):
    """Results of another machine, of other versions or of another model are not those of this one."""
    parts = Parts(monkeypatch, one=[HOLDS])
    prove(None, True, tmp_path, {})
    content = json.loads((tmp_path / "prove.json").read_text())
    content[section] |= changed
    (tmp_path / "prove.json").write_text(json.dumps(content))
    lora = tmp_path / "prove-work" / "lora.safetensors"
    lora.parent.mkdir(exist_ok=True)
    lora.touch()
    prove(None, True, tmp_path, {})
    assert parts.measured == ["one", "one"] and not lora.exists()
    assert json.loads((tmp_path / "prove.json.old").read_text()) == content  # an hour of a GPU may be in it
    assert (tmp_path / "prove.html.old").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"\{.*", ""),
        (r"\{.*", "[]"),
        ('"seconds": [0-9.]+', '"seconds": "x"'),
        ('"value": 1', '"value": NaN'),
        ('"claims": .*', '"claims": []}}}'),
        ('"one"', '"one", "two"'),
    ],
)
def test_damaged_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str):
    Parts(monkeypatch, one=[HOLDS])
    prove(None, True, tmp_path, {})
    path = tmp_path / "prove.json"
    damaged = re.sub(old, new, path.read_text(), count=1, flags=re.DOTALL)
    assert damaged != path.read_text()
    path.write_text(damaged)
    own = tmp_path / "prove-work" / "thesis.txt"
    own.parent.mkdir(exist_ok=True)
    own.touch()
    assert prove(None, True, tmp_path, {}) and claims_in(tmp_path) == {"one": [HELD]}
    assert own.exists() and (tmp_path / "prove.json.old").read_text() == damaged


def test_a_claim_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A failure ends nothing, and the command does not succeed until the part succeeds, which is measured again."""
    parts = Parts(monkeypatch, one=[HOLDS, FAILS], two=[not_tried("c", "no card")])
    assert not prove(None, True, tmp_path, {}) and parts.measured == ["one", "two"]
    assert "claims: 1 hold, 1 fail" in capsys.readouterr().out
    page = (tmp_path / "prove.html").read_text()
    assert '<td class="fails">fails</td>' in page and "not tried" in page and "1 claims hold,\n1 fails." in page
    parts.parts["one"] = [HOLDS]
    assert prove(None, True, tmp_path, {}) and parts.measured == ["one", "two", "one"]
    assert "none fails" in (tmp_path / "prove.html").read_text()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ZImageTrainError(Problem("/home/someone/x", "is lost", "look", "missing-file")), "missing-file"),
        (RuntimeError("/home/someone/x"), "RuntimeError"),
        (torch.OutOfMemoryError("/home/someone/x"), "OutOfMemoryError"),
    ],
)
def test_error_in_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, kind: str
):
    """It is a claim that fails, its message is shown and not written, and the other parts are measured."""
    parts = Parts(monkeypatch, one=error, two=[HOLDS])
    assert not prove(None, True, tmp_path, {}) and parts.measured == ["one", "two"]
    (claim,) = claims_in(tmp_path)["one"]
    assert (claim["promise"], claim["verdict"], claim["note"]) == ("one can be measured", "fails", kind)
    assert "/home/someone" not in (tmp_path / "prove.json").read_text() + (tmp_path / "prove.html").read_text()
    assert "/home/someone/x" in capsys.readouterr().out


@pytest.mark.parametrize("holds", [True, False])
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: bool):
    """Each option reaches the measurement, and the exit code says whether all claims hold."""
    config = tmp_path / "c.yaml"
    config.write_text("name: mine\ndata: [{folder: pictures}]\n")
    called: list[tuple[object, ...]] = []

    def prove(config: Config | None, *others: object) -> bool:
        called.append((config and config.name, *others))
        return holds

    monkeypatch.setattr(command, "prove", prove)
    words = ["prove", str(config), "--quick", "-o", "out", "--comfyui", "a", "--aitoolkit", "b"]
    assert [CliRunner().invoke(app, given).exit_code for given in (words, ["prove"])] == [0 if holds else 1] * 2
    projects = {"comfyui": Path("a"), "aitoolkit": Path("b")}
    assert called == [("mine", True, Path("out"), projects), (None, False, Path("prove"), {})]


def test_other_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A project's folder adds a part to results that are there, which gets the folder and the LoRA of a run."""
    parts = Parts(monkeypatch, one=[HOLDS])
    prove(None, True, tmp_path, {})
    given: list[object] = []

    def claims(project: Project, folder: Path, lora: Path, shape: object) -> Iterator[Claim]:
        given.append((project.name, folder, lora))
        yield FAILS

    monkeypatch.setattr(command, "trained_lora", lambda subject: Path("lora"))
    monkeypatch.setattr(loaders, "loader_claims", claims)
    with pytest.raises(ConfigError, match=r"--comfyui: .*nowhere does not exist"):
        prove(None, True, tmp_path, {"comfyui": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match="--comfyui: is not the source of ComfyUI"):
        prove(None, True, tmp_path, {"comfyui": tmp_path})
    source = tmp_path / "there"
    (source / "comfy").mkdir(parents=True)
    (source / "comfy" / "lora.py").touch()
    assert not prove(None, True, tmp_path, {"comfyui": source})
    assert parts.measured == ["one"] and given == [("ComfyUI", source, Path("lora"))]
    assert list(claims_in(tmp_path)) == ["one", "comfyui"]
    capsys.readouterr()
    assert not prove(None, True, tmp_path, {}) and len(given) == 1  # without its folder it is shown, and not measured
    printed = capsys.readouterr().out
    assert "comfyui (measured before)\n  fails     b: 2 units" in printed and "; the same command" not in printed


@pytest.mark.slow
def test_process_of_its_own(tmp_path: Path):
    """A part that is measured in another process, as on a GPU, has the same claims."""
    subject = choose_model(None, True, tmp_path)
    assert command.measure_apart("weights", subject, {}) == command.claims_of("weights", subject, {})


def test_expected_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is that of what is left; on a full model the quick form takes minutes, and the whole about an hour."""
    subject = choose_model(None, True, tmp_path)
    assert list(durations.MINIATURE_SECONDS) == list(command.PARTS)
    assert durations.expected_seconds(subject, ["weights"]) < durations.expected_seconds(subject, ["weights", "drift"])
    full = replace(subject, shape=TransformerShape(), is_miniature=False, device=torch.device("cuda"))
    monkeypatch.setattr(Subject, "device_bytes", property(lambda self: 23.5e9))
    quick = durations.expected_seconds(full, command.PARTS) / 60
    whole = durations.expected_seconds(replace(full, is_quick=False), command.PARTS) / 60
    assert 5 < quick < 15 and 25 < whole < 75


def test_page_holds_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page is a file of its own: nothing is loaded from elsewhere."""
    Parts(monkeypatch, one=[HOLDS])
    prove(None, True, tmp_path, {})
    (tmp_path / "prove.html").unlink()
    prove(None, True, tmp_path, {})  # it is written again from what was measured
    page = (tmp_path / "prove.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "://" not in page
    assert "ten of them" in page and 'href="#one"' in page


def test_pictures_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page has the pixels of the pictures, and not the metadata that ours have of model and LoRA."""

    def drawn(subject: Subject) -> Iterator[Claim]:
        for name in ("with-ours", "with-diffusers"):
            metadata = PngInfo()
            metadata.add_text("parameters", "drawn by the-model-of-a-client")
            subject.work.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (1, 2, 3)).save(subject.work / f"{name}.png", pnginfo=metadata)
        yield HOLDS

    monkeypatch.setattr(command, "PARTS", {"pictures": drawn})
    prove(None, True, tmp_path, {})
    found = re.findall('data:image/png;base64,([^"]+)', (tmp_path / "prove.html").read_text())
    assert len(found) == 2
    for encoded in found:
        content = base64.b64decode(encoded)
        assert b"client" not in content and Image.open(io.BytesIO(content)).getpixel((0, 0)) == (1, 2, 3)
