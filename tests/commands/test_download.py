"""`download`: from a hub on this machine, resumed, compared by digest, and then trained on without any hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zimage_train import mini

from hub_server import Hub, serving

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
    model = {path.relative_to(mini.TURBO).as_posix(): path for path in mini.TURBO.rglob("*") if path.is_file()}
    with serving({"org/mini": model, "org/adapter": {"adapter.safetensors": mini.ADAPTER_V1}}) as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "x.yaml").write_text(CONFIG.replace("PICTURES", str(mini.IMAGES)))
    return tmp_path / "x.yaml"


def run(folder: Path, hub: Hub, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **more}
    command = [sys.executable, "-m", "zimage_train", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


@pytest.mark.slow
def test_download_once_then_train_offline(tmp_path: Path, hub: Hub, config: Path):
    """The files that a config reads are downloaded once; training then needs no hub."""
    first = run(tmp_path, hub, "download", config)
    assert first.returncode == 0, first.stderr
    assert "org/mini  transformer: " in first.stdout and "org/adapter  adapter.safetensors: " in first.stdout
    assert "all on this machine, and equal to the hub's" in first.stdout
    count = len(hub.downloads())
    wanted = {path for path, _ in hub.downloads()}
    assert not any(path.endswith("scheduler_config.json") for path in wanted), "what nothing reads is left there"
    second = run(tmp_path, hub, "download", config)
    assert second.returncode == 0 and len(hub.downloads()) == count and "to download: 0.0 MB of" in second.stdout
    asked = len(hub.asked)
    trained = run(tmp_path, hub, "train", config, "--set", f"cache.folder={tmp_path / 'cache'}", HF_HUB_OFFLINE="1")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (tmp_path / "runs" / "tiny" / "lora" / "tiny.safetensors").exists() and len(hub.asked) == asked


@pytest.mark.slow
def test_download_resumes(tmp_path: Path, hub: Hub, config: Path):
    """A download continues where the connection was cut."""
    chunk = 10 * 2**20  # what the library reads at once
    (tmp_path / "big").write_bytes(bytes(range(256)) * (3 * chunk // 256))
    hub.repositories["org/mini"]["transformer/big.safetensors"] = tmp_path / "big"
    hub.cut_after["transformer/big.safetensors"] = 2 * chunk + 5
    done = run(tmp_path, hub, "download", config)
    if done.returncode:  # the library has given up; the same command goes on
        assert done.returncode == 4 and "the same command resumes the download" in done.stderr
        done = run(tmp_path, hub, "download", config)
    assert done.returncode == 0, done.stderr
    ranges = [range_ for path, range_ in hub.downloads() if path.endswith("big.safetensors")]
    assert ranges == [None, f"bytes={2 * chunk}-"]


@pytest.mark.slow
def test_download_replaces_damaged_file(tmp_path: Path, hub: Hub, config: Path):
    """A damaged file is removed and downloaded again."""
    hub.spoiled.add("adapter.safetensors")
    done = run(tmp_path, hub, "download", config)
    assert done.returncode == 4
    assert "org/adapter/adapter.safetensors: differs from the file on the hub in size or digest" in done.stderr
    hub.spoiled.clear()
    again = run(tmp_path, hub, "download", config)
    assert again.returncode == 0, again.stderr
    assert [path for path, _ in hub.downloads()].count(
        f"/org/adapter/resolve/{'0123456789abcdef' * 2}01234567/adapter.safetensors"
    ) == 2


@pytest.mark.slow
def test_what_is_not_there_is_said_at_once(tmp_path: Path, hub: Hub, config: Path):
    config.write_text(config.read_text().replace("org/mini", "org/gone").replace("org/adapter/", "org/adaptor/"))
    done = run(tmp_path, hub, "download", config)
    assert done.returncode == 4 and "org/gone: the hub cannot list its files" in done.stderr
    assert "org/adaptor: the hub cannot list its files" in done.stderr and not hub.downloads()
    offline = run(tmp_path, hub, "download", config, HF_HUB_OFFLINE="1")
    assert offline.returncode == 4 and "HF_HUB_OFFLINE" in offline.stderr


def test_download_without_hub_files(tmp_path: Path, hub: Hub, config: Path):
    """A config that reads nothing from the hub needs no hub."""
    text = (
        config.read_text()
        .replace("org/mini", str(mini.TURBO))
        .replace("org/adapter/adapter.safetensors", str(mini.ADAPTER_V1))
    )
    config.write_text(text)
    done = run(tmp_path, hub, "download", config)
    assert done.returncode == 0 and "nothing is downloaded" in done.stdout and not hub.asked
