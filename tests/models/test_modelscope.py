"""ZIMAGE_TRAIN_HUB=modelscope: the same commands, with ModelScope where the Hugging Face hub would be."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import zimage_train.models.hub
from zimage_train import mini
from zimage_train.cli.app import app, main

from hub_server import Hub, serving
from modelscope_server import ModelScope

ROOT = Path(__file__).parents[2]
CONFIG = """
name: tiny
model: {path: org/mini, adapter: org/adapter/adapter.safetensors, dtype: fp32}
data: [{folder: PICTURES, resolution: [64]}]
lora: {rank: 2}
train: {steps: 1}
log: {tensorboard: false}
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("modelscope_hub")
    model = {path.relative_to(mini.TURBO).as_posix(): path for path in mini.TURBO.rglob("*") if path.is_file()}
    repositories = {"org/mini": model, "org/adapter": {"adapter.safetensors": mini.ADAPTER_V1}}
    with serving(repositories, ModelScope) as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "x.yaml").write_text(CONFIG.replace("PICTURES", str(mini.IMAGES)))
    return tmp_path / "x.yaml"


def run(folder: Path, hub: Hub, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    environment |= {
        "ZIMAGE_TRAIN_HUB": "modelscope",
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(folder / "ms"),
        "MODELSCOPE_HOME": str(folder / "ms-home"),
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # whoever asks the other hub learns nothing
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
        **more,
    }
    command = [sys.executable, "-m", "zimage_train", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


def trained(folder: Path, hub: Hub, config: Path, name: str, **more: str) -> subprocess.CompletedProcess[str]:
    settings = ("--set", f"cache.folder={folder / 'cache'}", "--set", f"name={name}")
    return run(folder, hub, "train", config, *settings, **more)


@pytest.mark.slow
def test_download_once_then_train_offline(tmp_path: Path, hub: Hub, config: Path):
    """The files that a config reads are downloaded once; training then needs no hub."""
    before = run(tmp_path, hub, "check", config)
    assert "not on this machine" in before.stdout + before.stderr and not hub.asked
    first = run(tmp_path, hub, "download", config)
    assert first.returncode == 0, first.stderr
    assert "org/mini  transformer: " in first.stdout and "org/adapter  adapter.safetensors: " in first.stdout
    assert "all on this machine, and equal to the hub's" in first.stdout and "INFO" not in first.stderr
    count = len(hub.downloads())
    assert count == len(set(hub.downloads()))
    assert not any("scheduler_config.json" in path for path, _ in hub.downloads()), "what nothing reads is left there"
    second = run(tmp_path, hub, "download", config)
    assert second.returncode == 0 and len(hub.downloads()) == count and "to download: 0.0 MB of" in second.stdout
    asked = len(hub.asked)
    checked = run(tmp_path, hub, "check", config)
    assert checked.returncode == 0 and "not on this machine" not in checked.stdout + checked.stderr
    offline = trained(tmp_path, hub, config, "offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr[-2000:]
    assert (tmp_path / "runs" / "offline" / "lora" / "offline.safetensors").exists() and len(hub.asked) == asked
    gone = trained(tmp_path, hub, config, "gone", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 0, gone.stderr[-2000:]
    assert len(hub.asked) == asked and not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_train_downloads_changed_files(tmp_path: Path, hub: Hub, config: Path):
    """`train` downloads what it reads, and again a file that changed at the same size."""
    first = trained(tmp_path, hub, config, "first")
    assert first.returncode == 0, first.stderr[-2000:]
    count = len(hub.downloads())
    content = mini.ADAPTER_V1.read_bytes()
    (tmp_path / "other").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hub.repositories["org/adapter"]["adapter.safetensors"] = tmp_path / "other"
    second = trained(tmp_path, hub, config, "second")
    assert second.returncode == 0, second.stderr[-2000:]
    assert hub.downloads()[count:] == [("/org/adapter/resolve/master/adapter.safetensors", None)]


@pytest.mark.slow
def test_download_resumes(tmp_path: Path, hub: Hub, config: Path):
    """A download continues where the connection was cut."""
    chunk = 2**20  # what the library reads at once
    (tmp_path / "big").write_bytes(bytes(range(256)) * (3 * chunk // 256))
    hub.repositories["org/mini"]["transformer/big.safetensors"] = tmp_path / "big"
    hub.cut_after["transformer/big.safetensors"] = 2 * chunk + 5
    done = run(tmp_path, hub, "download", config, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert (
        done.returncode == 4
        and "the same command resumes the download" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = run(tmp_path, hub, "download", config, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert done.returncode == 0, done.stderr
    ranges = [range_ for path, range_ in hub.downloads() if path.endswith("big.safetensors")]
    assert len(ranges) == 2 and ranges[0] is None
    assert ranges[1] in {f"bytes={2 * chunk}-", f"bytes={2 * chunk + 5}-"}


@pytest.mark.slow
def test_a_damaged_file_never_stays(tmp_path: Path, hub: Hub, config: Path):
    hub.spoiled.add("adapter.safetensors")
    done = run(tmp_path, hub, "download", config)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "org/adapter/adapter.safetensors: cannot be downloaded ([E2020] Hash mismatch for" in done.stderr
    assert not list((tmp_path / "ms").rglob("adapter.safetensors*"))
    hub.spoiled.clear()
    assert run(tmp_path, hub, "download", config).returncode == 0
    (found,) = (tmp_path / "ms").rglob("adapter.safetensors")
    assert found.read_bytes() == mini.ADAPTER_V1.read_bytes()
    found.write_bytes(found.read_bytes()[:-1] + b"?")  # on the disk, since
    again = run(tmp_path, hub, "download", config)
    assert again.returncode == 4
    assert "org/adapter/adapter.safetensors: differs from the file on the hub in size or digest" in again.stderr
    assert run(tmp_path, hub, "download", config).returncode == 0
    assert found.read_bytes() == mini.ADAPTER_V1.read_bytes()


@pytest.mark.slow
def test_what_is_not_there_is_said_at_once(tmp_path: Path, hub: Hub, config: Path):
    config.write_text(config.read_text().replace("org/mini", "org/gone").replace("org/adapter/", "org/adaptor/"))
    done = run(tmp_path, hub, "download", config)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "org/gone: the hub cannot list its files (" in done.stderr
    assert "org/adaptor: the hub cannot list its files (" in done.stderr and not hub.downloads()
    assert "org/gone does not exist" in done.stderr
    offline = run(tmp_path, hub, "download", config, HF_HUB_OFFLINE="1")
    assert offline.returncode == 4 and "HF_HUB_OFFLINE is set" in offline.stderr
    unreachable = trained(tmp_path, hub, config, "x", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 4 and "org/gone: cannot be downloaded (" in unreachable.stderr
    assert "Traceback" not in unreachable.stderr


@pytest.fixture
def line_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def line_of(*words: object) -> str:
        """The only line of a command that fails."""
        monkeypatch.setattr(sys, "argv", ["zimage-train", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if "ZIMAGE_TRAIN_HUB" in line]
        assert ended.value.code == 4
        return line

    return line_of


@pytest.mark.parametrize("command", ["download", "check", "train"])
def test_missing_library_is_one_line(config: Path, command: str, line_of, monkeypatch: pytest.MonkeyPatch):
    """Without its library, a single line says how to install it."""
    monkeypatch.setenv("ZIMAGE_TRAIN_HUB", "modelscope")
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    monkeypatch.delitem(sys.modules, "zimage_train.models.hub.modelscope", raising=False)
    monkeypatch.delattr(zimage_train.models.hub, "modelscope", raising=False)
    line = line_of(command, config)
    assert "ZIMAGE_TRAIN_HUB: is modelscope, whose library is not installed or too old (" in line
    assert line.endswith("; pip install 'modelscope-hub>=0.5.1', or unset it")


@pytest.mark.parametrize("value", ["ModelScope", "huggingface", "../x"])
def test_another_hub_is_refused_in_one_line(config: Path, value: str, line_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZIMAGE_TRAIN_HUB", value)
    line = line_of("download", config)
    assert f"ZIMAGE_TRAIN_HUB: is {value!r}, which is not a known hub; set it to modelscope, or" in line


def test_caption_asks_the_same_hub(tmp_path: Path, line_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZIMAGE_TRAIN_HUB", "elsewhere")
    Image.new("RGB", (64, 64)).save(tmp_path / "without-a-text.png")
    assert line_of("caption", tmp_path, "--model", "org/x").startswith("ZIMAGE_TRAIN_HUB: is 'elsewhere'")


def test_local_files_need_no_hub(config: Path, monkeypatch: pytest.MonkeyPatch):
    """Files on this machine need neither hub."""
    monkeypatch.setenv("ZIMAGE_TRAIN_HUB", "nowhere")
    text = config.read_text().replace("org/mini", str(mini.TURBO))
    config.write_text(text.replace("org/adapter/adapter.safetensors", str(mini.ADAPTER_V1)))
    found = CliRunner().invoke(app, ["download", str(config)])
    assert found.exit_code == 0 and "nothing is downloaded" in found.stdout
