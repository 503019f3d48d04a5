"""The wheel: it holds every file of the package, and what is installed from it trains far from the sources."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from zimage_train import mini

ROOT = Path(__file__).parents[2]


def run(*words: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"} if path else {}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=600)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def package_files() -> set[str]:
    """What git has of the package; without git, what lies there."""
    if (ROOT / ".git").exists():
        return set(run("git", "ls-files", "zimage_train", cwd=ROOT).split())
    found = (path for path in (ROOT / "zimage_train").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.slow
def test_wheel_trains_without_the_sources(tmp_path: Path):
    """A wheel holds the whole package, and trains without the sources."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    source = tmp_path / "source"
    for name in (*package_files(), "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path / "wheels", cwd=source)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == package_files()
    home, site = tmp_path / "home", tmp_path / "site"
    home.mkdir()
    run(*pip, "install", "-q", "--no-deps", "--target", site, wheel, cwd=home)
    program = [sys.executable, "-m", "zimage_train"]
    where = run(sys.executable, "-c", "import zimage_train; print(zimage_train.__file__)", cwd=home, path=site)
    assert where.startswith(str(site))
    run(*program, "init", mini.IMAGES, "--miniature", "--yes", "--name", "x", cwd=home, path=site)
    cache = f"cache.folder={tmp_path / 'cache'}"
    run(*program, "train", "x.yaml", "--set", "train.steps=1", "--set", cache, cwd=home, path=site)
    assert (home / "runs" / "x" / "lora" / "x.safetensors").exists() and (home / "runs" / "x" / "report.html").exists()
