"""What the documentation says is there is there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.config.load import read_config
from zimage_train.lora import lora_file

import vision_models
from helpers import script
from mini_config import tiny

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("steps", [1, 2, 7, 100_000])
def test_the_quickstart_is_valid_for_any_number_of_steps(steps: int):
    assert read_config(ROOT / "configs" / "quickstart.yaml", [f"train.steps={steps}"]).train.steps == steps


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    named = re.findall(r"`((?:zimage_train|scripts|configs|docs|tests)/[\w./-]+)`", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_a_page_shows_exist(page: Path):
    for line in re.findall(r"zimage-train ([a-z]+[^`\n|#]*)", page.read_text(encoding="utf-8")):
        command, *words = line.split()
        group = [command, words[0]] if command == "lora" and words else [command]
        shown = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        assert all(word in shown.output for word in words if word.startswith("--")), line


# What the pages tell people to run, run here

NOT_RUN = {
    "bash scripts/quickstart.sh": "makes a .venv; tests/scripts/test_setup.py runs its parts, and people the whole",
    "bash scripts/test.sh": "is what runs this",
    "source .venv/bin/activate": "changes the shell of whoever types it",
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_trains(path: Path, tmp_path: Path, shared_cache: Path):
    options = tiny(tmp_path, shared_cache)
    if "compare_on: turbo" in path.read_text(encoding="utf-8"):
        options += ["--set", f"sample.compare_on={mini.TURBO / 'transformer'}"]
    done = CliRunner().invoke(app, ["train", str(path), *options])
    assert done.exit_code == 0, (done.output[-500:], done.exception)
    assert list(tmp_path.glob("*/lora/*.safetensors"))


def shown_commands() -> list[str]:
    """Every command of the README: the lines of its shell blocks, and those in its table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [*filter(None, lines), *re.findall(r"^\| `(zimage-train [^`]+)`", text, re.MULTILINE)]


def test_every_command_of_the_readme_runs(tmp_path: Path, shared_cache: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = tiny(tmp_path, shared_cache)
    config = str(ROOT / "configs" / "quickstart.yaml")
    lora = str(tmp_path / "quickstart" / "lora" / "quickstart.safetensors")
    assert CliRunner().invoke(app, ["train", config, *options]).exit_code == 0
    words_for = {"CONFIG": config, "FILE": lora, "FILE=0.8": f"{lora}=0.8", "MODEL": str(mini.TURBO), "...": "a zorb"}
    swept = tmp_path / "quickstart-sweep-rank" / "quickstart+rank_2"
    words_for |= {"KEY=V1,V2": "lora.rank=2,4", "RUN_A": str(tmp_path / "quickstart"), "RUN_B": str(swept)}
    other = tmp_path / "other.safetensors"
    lora_file.export_lora(other, lora_file.read_lora(Path(lora)), "fp32", {})
    words_for |= {"OTHER": str(other), "OTHER=0.6": f"{other}=0.6", "RUN": str(tmp_path / "quickstart")}
    words_for["FOLDER"] = str(shutil.copytree(mini.IMAGES, tmp_path / "pictures"))
    next((tmp_path / "pictures").glob("*.txt")).unlink()
    captioner = vision_models.qwen(tmp_path / "captioner")
    words_for |= {"OUT": str(tmp_path / "baked"), "OUT.safetensors": str(tmp_path / "made.safetensors")}
    words_for["JOB.yaml"] = str(ROOT / "tests" / "aitoolkit_jobs" / "turbo.yaml")
    for command in shown_commands():
        if command in NOT_RUN:
            continue
        program, *words = shlex.split(command)
        assert program == "zimage-train", command
        words = [words_for.get(word, word) for word in words]
        if words[0] in ("train", "check", "cache", "timesteps", "sweep", "download"):
            words += options
        if words[0] == "lora" and words[-1] == words_for["OUT.safetensors"]:
            words.append("--force")
        if words[:2] == ["lora", "verify"]:
            words += ["--model", str(mini.TURBO)]
        if words[0] in ("sample", "drift"):
            words += ["--dtype", "fp32", "--width", "64", "--height", "64", "-o", str(tmp_path / "drawn")]
        if words[0] == "init":
            words += ["-o", str(tmp_path / "init.yaml")]
        if words[0] == "caption":
            words += ["--model", str(captioner)]
        if words[0] == "compare":
            words += ["-o", str(tmp_path / "compared")]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0 or words == ["doctor"], (command, done.output[-500:], done.exception)


def test_pages_speak_of_no_machine():
    for page in PAGES:
        assert not re.search(r"/(work|root|home)/", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("budget_gb", [24, 16, 12, 8])
def test_each_budget_trains_as_its_config_says_in_miniature(budget_gb: int, tmp_path: Path, shared_cache: Path):
    """The same precision, the same share of streamed blocks, and the recomputation of its largest size."""
    generate = script("generate")
    plan = generate.plan_for(budget_gb)
    assert plan.fits and plan.form.kind is None
    mode = plan.mode_of(plan.job.max_tokens)
    share = plan.form.streamed / plan.job.shape.n_layers
    asked = {"memory.checkpointing": mode, "memory.offload": share}
    words = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
    path = ROOT / "configs" / f"{budget_gb}gb.yaml"
    done = CliRunner().invoke(app, ["train", str(path), *tiny(tmp_path, shared_cache), *words])
    assert done.exit_code == 0, (done.output[-500:], done.exception)
    made = json.loads((tmp_path / f"my_character_{budget_gb}gb" / "run.json").read_text())["plan"]
    assert made["streamed"] == round(share * 6) and list(made["recomputes"]) == [mode]
