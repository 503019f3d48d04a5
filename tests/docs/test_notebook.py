"""The quickstart's notebook: it runs from top to bottom, and is stored without what it showed to somebody."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def run(notebook: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "run_notebook.py"), str(notebook)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, shared_cache: Path):
    """Every cell runs, and the last cells leave a LoRA and an image."""
    folder = tmp_path / "of me"  # commands have to quote it
    folder.mkdir()
    done = run(NOTEBOOK, folder, STEPS="3", XDG_CACHE_HOME=str(shared_cache))
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    runs = folder / "runs" / "notebook"
    assert (runs / "quickstart" / "lora" / "quickstart.safetensors").exists()
    assert len((runs / "quickstart" / "metrics.jsonl").read_text().splitlines()) == 3
    drawn = [Image.open(runs / name / "sample-1.png") for name in ("without", "with")]
    assert [image.size for image in drawn] == [(96, 96)] * 2
    assert drawn[0].tobytes() != drawn[1].tobytes()
    after = dict(re.findall(r"\[(\w+)\]\n(?:(?!\[\w+\]\n)[^\n]*\n)*?\[shows (\w+)\]", done.stdout))
    assert after == {"images": "Image", "grid": "PngImageFile", "sample": "Image"}
    assert re.search(r"diffusers [\d.]+ loads 42/42, ComfyUI loads 42/42", done.stdout)


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("!exit 3", 1, "exit code 3: exit 3"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("word = 'a b'\n!echo \"{word} {1 + 1}\"\nword", 0, "a b 2\n[shows str]"),
        ("!echo no GPU; sh -c 'exit 2' doctor", 0, "no GPU"),
    ],
)
def test_notebook_runner_sees_failures(tmp_path: Path, source: str, code: int, said: str):
    """The script that runs the notebook fails if a cell fails."""
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "id": "x", "source": source.splitlines(True)}]}))
    done = run(path, tmp_path)
    assert done.returncode == code and said in done.stdout + done.stderr


def test_it_is_a_notebook_without_outputs():
    text = NOTEBOOK.read_text(encoding="utf-8")
    book = json.loads(text)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and len(text) < 20_000
    assert text == json.dumps(book, indent=1, ensure_ascii=False) + "\n"  # as Jupyter writes it
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert not re.search(r"/(work|root|home)/", text)


def test_notebook_links():
    """Links of the notebook lead to existing files."""
    links = re.findall(r"\]\(([^)#]+)\)", NOTEBOOK.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
