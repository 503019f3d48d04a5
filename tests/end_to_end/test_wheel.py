"""A release: the sdist is the checkout, the wheel the package, and what is installed from it works far from both."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from zimage_train.commands.prove import PARTS

ROOT = Path(__file__).parents[2]
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path, **changes: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=600)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def project_files() -> set[str]:
    """What git has of the project."""
    if not (ROOT / ".git").exists():
        pytest.skip("without git, nothing says which files belong to the project")
    return set(run("git", "ls-files", "-z", cwd=ROOT).strip("\0").split("\0"))


def build(kind: str, source: Path, target: Path) -> Path:
    """Call the hook that pip and `python -m build` call, with the setuptools that is here."""
    target.mkdir(parents=True)
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})", cwd=source)
    (built,) = target.iterdir()
    return built


def files_of_wheel(wheel: Path) -> dict[str, bytes]:
    """Name -> content, without what describes the wheel itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@dataclass(frozen=True)
class Release:
    """Files of a release, and what they were made from."""

    tree: Path
    """What git has, as a clone would."""
    sdist: Path
    wheel: Path
    """Built from the sdist."""


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it, and a folder to work in, both outside of the checkout."""

    venv: Path
    home: Path

    def path(self, kind: str) -> Path:
        return Path(sysconfig.get_path(kind, "venv", {"base": str(self.venv)}))

    def zimage_train(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Run the program as somebody who has just installed it does, with empty caches; return what it prints."""
        program = self.path("scripts") / "zimage-train"
        return run(program, *words, cwd=cwd or self.home, XDG_CACHE_HOME=str(self.home / "cache"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    place = tmp_path_factory.mktemp("release")
    tree = place / "tree"
    for name in project_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    sdist = build("sdist", tree, place / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    return Release(tree, sdist, build("wheel", unpacked, place / "wheel"))


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed beside the dependencies of this interpreter.

    A .pth file names their folders only. It does not read the .pth files within them, which would bring the checkout.
    """
    place = tmp_path_factory.mktemp("installed")
    made = Installed(place / "venv", place / "home")
    made.home.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", made.venv, cwd=place)
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (made.path("purelib") / "dependencies.pth").write_text("\n".join(packages))
    python = made.path("scripts") / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python", python]
    run(*pip, "install", "-q", "--no-deps", "--no-compile", release.wheel, cwd=made.home)
    return made


def test_sdist_is_the_checkout(release: Release):
    """The sdist holds every file that git has, as it is, and none besides."""
    held = {}
    with tarfile.open(release.sdist) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            name = member.name.partition("/")[2]
            held[name] = (archive.extractfile(member).read(), member.mode & 0o100)
    made = {name for name in held if name in MADE_BY_SETUPTOOLS or name.startswith("zimage_train.egg-info/")}
    assert set(held) - made == project_files()
    for name in project_files():
        assert held[name] == ((ROOT / name).read_bytes(), (ROOT / name).stat().st_mode & 0o100), name


def test_wheel_is_the_package(release: Release, tmp_path: Path):
    """A wheel holds every file of the package, as it is, whether it is built from the sdist or from a clone."""
    held = files_of_wheel(release.wheel)
    assert set(held) == {name for name in project_files() if name.startswith("zimage_train/")}
    assert [name for name, content in held.items() if (ROOT / name).read_bytes() != content] == []
    assert files_of_wheel(build("wheel", release.tree, tmp_path / "wheel")) == held


def test_metadata_of_the_wheel(release: Release, installed: Installed):
    """The metadata are valid, and have the version that the program prints and the files are named after."""
    with zipfile.ZipFile(release.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = Metadata.from_email(archive.read(name))
    version = str(found.version)
    assert installed.zimage_train("--version") == f"zimage-train {version}\n"
    assert release.wheel.name == f"zimage_train-{version}-py3-none-any.whl"
    assert release.sdist.name == f"zimage_train-{version}.tar.gz"
    assert found.license_expression == "Apache-2.0" and found.license_files == ["LICENSE"]
    assert found.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert found.description_content_type == "text/markdown"
    assert found.summary and found.keywords and found.classifiers


def test_only_the_wheel_is_imported(installed: Installed):
    """The program comes from the wheel alone, although this interpreter has the checkout installed."""
    code = "import zimage_train; print(*zimage_train.__path__)"
    imported = run(installed.path("scripts") / "python", "-c", code, cwd=installed.home).strip()
    assert imported == str(installed.path("purelib") / "zimage_train")


def test_wheel_trains_and_samples(installed: Installed):
    """From a folder of images to an image drawn with the LoRA, by the commands of the README."""
    images = installed.path("purelib") / "zimage_train" / "mini" / "pictures"
    model = images.parent / "turbo"
    installed.zimage_train("init", images, "--miniature", "--yes", "--name", "x")
    assert "x: no problems found" in installed.zimage_train("check", "x.yaml")
    installed.zimage_train("train", "x.yaml", "--set", "train.steps=1", "--set", "sample.first=false")
    made = installed.home / "runs" / "x"
    lora = made / "lora" / "x.safetensors"
    assert lora.exists() and (made / "report.html").exists()
    size = ["--width", "64", "--height", "64"]
    printed = installed.zimage_train("sample", model, "--lora", lora, "--prompt", "a photo of zchar", *size)
    assert "matched 42/42 modules" in printed
    assert list(installed.home.glob("samples/*.png"))


def test_quickstart(installed: Installed, release: Release):
    """The quickstart's config, which names images by their place in a checkout, trains with what is installed."""
    options = [f"--set={change}" for change in ("train.steps=2", "sample.first=false", "output_dir=made")]
    installed.zimage_train("train", "configs/quickstart.yaml", *options, cwd=release.tree)
    made = release.tree / "made" / "quickstart"
    assert len(list(made.glob("samples/000002-*.png"))) == 4 and (made / "lora" / "quickstart.safetensors").exists()


def test_every_claim_holds(installed: Installed):
    """`prove` from the wheel, on the miniature: each part is measured, everything holds, and nothing is left out."""
    printed = installed.zimage_train("prove", "-o", "proof")
    folder = installed.home / "proof"
    proof = json.loads((folder / "prove.json").read_text(encoding="utf-8"))
    assert list(proof["parts"]) == list(PARTS) and proof["model"]["is_miniature"]
    verdicts = Counter(claim["verdict"] for part in proof["parts"].values() for claim in part["claims"])
    assert set(verdicts) == {"holds", "reported"} and f"claims: {verdicts['holds']} hold, 0 fail" in printed
    for part, measured in proof["parts"].items():
        assert any(claim["verdict"] == "holds" for claim in measured["claims"]), part
    written = (folder / "prove.json").read_text() + (folder / "prove.html").read_text()
    assert str(installed.home) not in written and str(ROOT) not in written and "/site-packages" not in written
    assert written.count("data:image/png;base64,") == 4
    with_lora = next(claim for claim in proof["parts"]["pictures"]["claims"] if "with the LoRA" in claim["promise"])
    change = re.search(r"changes it by ([0-9.]+) of 255", with_lora["note"])
    assert change is not None and float(change[1]) > 2  # or a LoRA that is not attached would draw the same
    left = {path.name for path in (folder / "prove-work").iterdir()}
    assert left == {"lora.safetensors"} | {f"{a}-{b}.png" for a in ("with", "without") for b in ("ours", "diffusers")}
    before = (folder / "prove.html").stat().st_mtime_ns
    installed.zimage_train("prove", "-o", "proof")  # nothing is left to measure
    assert (folder / "prove.html").stat().st_mtime_ns == before
