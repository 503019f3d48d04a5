"""Every command that a page in docs/ shows is run here, on files of the names that the page uses, or is listed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train import __version__, mini
from zimage_train.cli.app import app
from zimage_train.lora import lora_file

from mini_config import tiny

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LORAS = ("my", "a", "b", "one", "two")
WHEEL = f"zimage_train-{__version__}-py3-none-any.whl"
NOT_RUN = {
    "bash scripts/quickstart.sh": "makes a .venv; tests/scripts runs its parts, and people the whole",
    "python3 -m venv zimage": "makes a virtual environment; tests/end_to_end/test_wheel.py does",
    "source zimage/bin/activate": "changes the shell of whoever types it",
    f'pip install "{WHEEL}[ui]"': "downloads; tests/end_to_end/test_wheel.py installs the wheel alone",
    'pip install "zimage-train[modelscope]"': "downloads",
    "export ZIMAGE_TRAIN_HUB=modelscope": "changes the shell of whoever types it; tests/models sets it",
    "zimage-train prove --quick": "takes a minute and a half; test_wheel.py runs the whole, test_prove.py its options",
    "zimage-train ui": "serves until it is stopped; tests/ui runs it",
    "zimage-train publish runs/my_run --license apache-2.0 --to ORG/REPO": "uploads; test_publish.py does",
    "zimage-train download turbo": "downloads 21 GB; tests/commands/test_download.py downloads from a hub of its own",
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in joined.splitlines()) if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A folder with what the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    words = tiny(folder / "runs", shared_cache)
    config = str(ROOT / "configs" / "quickstart.yaml")
    for name in ("first", "second", "my_run", "one-v1", "one-v2"):
        more = ["--set", f"name={name}", "--set", "lora.rank=16"]
        more += ["--set", "model.adapter=null"] if name == "one-v2" else []
        done = CliRunner().invoke(app, ["train", config, *words, *more])
        assert done.exit_code == 0, done.output[-500:]
    trained = folder / "runs" / "first" / "lora" / "first.safetensors"
    for name in LORAS:
        shutil.copy(trained, folder / f"{name}.safetensors")
    baked = ["lora", "bake", str(mini.TURBO), "--lora", str(trained), "--to", "comfyui"]
    assert CliRunner().invoke(app, [*baked, "-o", str(folder / "tuned.safetensors")]).exit_code == 0
    lora_file.export_lora(folder / "b.safetensors", lora_file.read_lora(trained), "fp32", {})
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "scripts" / "runpod", folder / "scripts" / "runpod")
    shutil.copytree(mini.TURBO, folder / "base")
    text = Path(config).read_text()
    (folder / "my.yaml").write_text(text.replace("zimage_train/mini", mini.HERE.as_posix()))
    return folder


SHOWN = [(page.name, command) for page in PAGES for command in commands(page) if command not in NOT_RUN]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_command_that_a_page_shows_runs(page: str, command: str, place: Path, shared_cache: Path, monkeypatch):
    monkeypatch.chdir(place)
    program, *words = shlex.split(command)
    assert program == "zimage-train", command
    words = [one for word in words for one in (sorted(map(str, place.glob(word))) if "*" in word else [word])]
    models = {"turbo": str(mini.TURBO), "base": str(place / "base")}
    words = [models.get(word, word) for word in words]
    if words[0] in ("check", "sweep"):
        words = [word.replace("model.adapter=v1,v2", f"model.adapter={mini.ADAPTER_V1},null") for word in words]
        varied = {words[n].partition("=")[0] for n in range(len(words)) if words[n - 1] == "--vary"}
        given = tiny(place / "runs", shared_cache)
        pairs = zip(given[::2], given[1::2], strict=True)
        words += [word for pair in pairs if pair[1].partition("=")[0] not in varied for word in pair]
    if words[:2] == ["lora", "verify"]:
        words += ["--model", str(mini.TURBO)]
    if words[0] == "compare" and "--prompt" in words:
        words += ["--width", "64", "--height", "64", "-o", f"compared-{len(words)}"]
        words += [] if "--model" in words else ["--model", str(mini.TURBO)]
    if words[0] == "drift":
        words += ["--width", "64", "--height", "64"]  # at 1024 px it takes ten minutes on a CPU
    if words[0] == "lora" and "-o" in words:
        words += ["--force"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output[-800:], done.exception)


def test_commands_and_exceptions_are_found():
    """Commands are found on the pages, and every exception is still on a page."""
    assert SHOWN and {command for page in PAGES for command in commands(page) if command in NOT_RUN} == set(NOT_RUN)
