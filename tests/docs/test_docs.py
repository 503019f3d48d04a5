"""What the documentation says is there is there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train import __version__, mini
from zimage_train.cli.app import app
from zimage_train.config.load import read_config

from helpers import script
from mini_config import tiny

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("steps", [1, 2, 7, 100_000])
def test_quickstart_for_any_steps(steps: int):
    """The quickstart is valid for any number of steps."""
    assert read_config(ROOT / "configs" / "quickstart.yaml", [f"train.steps={steps}"]).train.steps == steps


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_existing_files(page: Path):
    """Links and files that a page names exist."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    named = re.findall(r"`((?:zimage_train|scripts|configs|docs|tests)/[\w./-]+)`", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_existing_commands(page: Path):
    """Commands and options that a page shows exist."""
    for line in re.findall(r"zimage-train ([a-z]+[^`\n|#]*)", page.read_text(encoding="utf-8")):
        command, *words = line.split()
        group = [command, words[0]] if command == "lora" and words else [command]
        shown = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        assert all(word in shown.output for word in words if word.startswith("--")), line


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


# What the pages tell people to run, run here

BUDGETS_GB = [24, 16, 12, 8]
BUDGET_CONFIGS = {ROOT / "configs" / f"{budget_gb}gb.yaml" for budget_gb in BUDGETS_GB}
CONFIGS_WITHOUT_BUDGET = sorted(set((ROOT / "configs").glob("*.yaml")) - BUDGET_CONFIGS)
NOT_RUN = {
    f'pip install "zimage_train-{__version__}-py3-none-any.whl[ui]"': "downloads; test_wheel.py installs without",
    "python3 scripts/setup_venv.py": "makes a .venv; tests/scripts/test_setup_venv.py runs its parts",
    "source .venv/bin/activate": "changes the shell of whoever types it",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS_WITHOUT_BUDGET, ids=lambda path: path.name)
def test_every_shipped_config_trains(path: Path, tmp_path: Path, shared_cache: Path):
    options, text = tiny(tmp_path, shared_cache), path.read_text(encoding="utf-8")
    if "compare_on: turbo" in text:
        options += ["--set", f"sample.compare_on={mini.TURBO / 'transformer'}"]
    if "variant: turbo" not in text:
        options += ["--set", "sample.steps=2"]  # of 28, in the previews of each
    done = CliRunner().invoke(app, ["train", str(path), *options])
    assert done.exit_code == 0, (done.output[-500:], done.exception)
    assert list(tmp_path.glob("*/lora/*.safetensors"))


@pytest.mark.slow
def test_readme_commands_in_order(tmp_path: Path, shared_cache: Path, monkeypatch):
    """The commands of the README lead from a folder to an image.

    They run in their order, each with the files that the previous command has left; only the model is the miniature.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    shown = [shlex.split(line) for line in lines if line not in NOT_RUN]
    assert [words[:2] for words in shown] == [["zimage-train", name] for name in ("init", "check", "train", "sample")]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mini.IMAGES, tmp_path / "photos")
    added = {"check": tiny(Path("runs"), shared_cache), "train": tiny(Path("runs"), shared_cache)}
    added["sample"] = ["--dtype", "fp32", "--width", "64", "--height", "64"]
    for _, *words in shown:
        words = [str(mini.TURBO) if word == "turbo" else word for word in words]
        done = CliRunner().invoke(app, [*words, *added.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output[-500:], done.exception)
    assert list(tmp_path.glob("samples/*.png"))


def test_pages_speak_of_no_machine():
    for page in PAGES:
        assert not re.search(r"/(work|root|home)/", page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("budget_gb", BUDGETS_GB)
def test_budget_configs_on_the_miniature(budget_gb: int, tmp_path: Path, shared_cache: Path):
    """Each config of a budget trains on the miniature with the plan that it describes.

    That is the same precision, the same share of streamed blocks, and the recomputation of its largest size.
    """
    generate = script("generate")
    plan = generate.plan_for(budget_gb)
    assert plan.fits and plan.placement.quantization is None
    mode = plan.mode_of(plan.workload.max_tokens)
    share = plan.placement.streamed / plan.workload.shape.n_layers
    asked = {"memory.checkpointing": mode, "memory.offload": share}
    words = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
    path = ROOT / "configs" / f"{budget_gb}gb.yaml"
    done = CliRunner().invoke(app, ["train", str(path), *tiny(tmp_path, shared_cache), *words])
    assert done.exit_code == 0, (done.output[-500:], done.exception)
    made = json.loads((tmp_path / f"my_character_{budget_gb}gb" / "run.json").read_text())["plan"]
    assert made["streamed"] == round(share * 6) and list(made["recomputes"]) == [mode]


def test_threats_have_tests():
    """Each line of the table in docs/security.md names a test that is there."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 12
    for line in lines:
        named = re.search(r"\| `(\S+\.py)::(test_\w+)` \|$", line)
        assert named, line
        assert f"def {named[2]}(" in (ROOT / "tests" / named[1]).read_text(encoding="utf-8"), line
