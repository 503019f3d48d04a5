"""What a rented pod runs, how it waits for another pod and how its LoRA comes home."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zimage_train import mini
from zimage_train.commands import train

from hub_server import serving

ROOT = Path(__file__).parents[2]
START = ROOT / "scripts" / "runpod" / "start.sh"
CONFIG = """
name: tiny
model: {path: MODEL, adapter: ADAPTER, dtype: fp32}
data: [{folder: PICTURES, resolution: [64]}]
lora: {rank: 2}
train: {steps: STEPS, batch_size: 2}
save: {every: 1}
log: {tensorboard: false}
"""
PYTHON = sys.executable
"""It reads anew where the hub is."""
pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume with a config, and the program on the path."""
    values = {"MODEL": mini.TURBO, "ADAPTER": mini.ADAPTER_V1, "PICTURES": mini.IMAGES, "STEPS": 2}
    text = CONFIG
    for name, value in values.items():
        text = text.replace(name, str(value))
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "my config.yaml").write_text(text)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "zimage-train"
    program.write_text(f'#!/bin/sh\nexec "${{TEST_PYTHON:-{sys.executable}}}" -m zimage_train "$@"\n')
    program.chmod(0o755)
    return tmp_path / "volume"


def environment(volume: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "RUNPOD"))}
    path = f"{volume.parent / 'bin'}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "VOLUME": str(volume), "HF_HUB_OFFLINE": "1", **more}


def start(volume: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [START], env=environment(volume, **more), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_pod_trains(volume: Path):
    """A pod trains, prints how to copy the LoRA home, and then does what was asked for."""
    address = {"RUNPOD_POD_ID": "abc", "RUNPOD_PUBLIC_IP": "1.2.3.4", "RUNPOD_TCP_PORT_22": "10022"}
    done = start(volume, CONFIG="my config.yaml", WHEN_DONE='echo "$RUNPOD_POD_ID" > gone', **address)
    assert done.returncode == 0, done.stderr
    lora = volume / "runs" / "tiny" / "lora" / "tiny.safetensors"
    assert lora.exists() and f"scp -P 10022 root@1.2.3.4:{lora} ." in done.stdout
    assert (volume / "gone").read_text() == "abc\n"
    assert (volume / "cache").is_dir(), "the caches are on the volume too"
    again = start(volume, CONFIG="my config.yaml", WHEN_DONE="true")
    assert again.returncode == 0 and "tiny is complete" in again.stdout


def test_a_failure_ends_the_pod_too(volume: Path):
    done = start(volume, CONFIG="no.yaml", WHEN_DONE="echo gone > gone; false")
    assert done.returncode == 2 and "no.yaml" in done.stderr and (volume / "gone").exists()
    assert "that ended with 1" in done.stdout
    wrong = start(volume, CONFIG="my config.yaml", ROLE="cook", WHEN_DONE="true")
    assert wrong.returncode == 2 and "ROLE is cook; it is download or train" in wrong.stdout


@pytest.mark.slow
def test_pod_taken_away_is_continued(volume: Path):
    """A pod that is taken away saves, and another pod continues its run."""
    config = volume / "my config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 200"))
    words = {"CONFIG": config.name, "WHEN_DONE": "echo gone > gone"}
    with subprocess.Popen([START], env=environment(volume, **words), stdout=subprocess.PIPE, text=True) as pod:
        metrics = volume / "runs" / "tiny" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(300) == 128 + signal.SIGTERM
    assert not (volume / "gone").exists(), "it goes anyway, and the next one is to go on"
    steps = len(metrics.read_text().splitlines())
    assert 2 <= steps < 200
    allowed = [sys.executable, "-m", "zimage_train", "train", config.name, "--set", f"train.steps={steps + 1}"]
    cache = str(volume / "cache")
    more = subprocess.run(allowed, env=environment(volume, XDG_CACHE_HOME=cache), cwd=volume, capture_output=True)
    assert more.returncode == 0, more.stderr
    assert json.loads((volume / "runs" / "tiny" / "run.json").read_text())["starts"] == [0, steps]


def test_pod_without_config_waits(volume: Path):
    """A pod without a config waits until it is told to stop."""
    with subprocess.Popen([START], env=environment(volume), stdout=subprocess.PIPE, text=True) as pod:
        assert pod.stdout is not None
        lines = [pod.stdout.readline() for _ in range(4)]
        assert "no CONFIG is set" in lines[0] and lines[-1].endswith("sleep infinity\n")
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(300) == 128 + signal.SIGTERM


def wait_for(is_so, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


# A pod downloads, another waits


@pytest.mark.slow
def test_pod_waits_for_downloads(volume: Path):
    """A pod waits for the files that another pod downloads."""
    model = {path.relative_to(mini.TURBO).as_posix(): path for path in mini.TURBO.rglob("*") if path.is_file()}
    config = volume / "my config.yaml"
    hubbed = config.read_text().replace(str(mini.TURBO), "org/mini")
    config.write_text(hubbed.replace(str(mini.ADAPTER_V1), "org/adapter/adapter.safetensors"))
    with serving({"org/mini": model, "org/adapter": {"adapter.safetensors": mini.ADAPTER_V1}}) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "CONFIG": config.name}
        online["TEST_PYTHON"] = PYTHON
        online |= {f"{name}_proxy": "" for name in ("http", "https", "all")}
        late = start(volume, WAIT="0.01", WHEN_DONE="true", **online)
        assert late.returncode == 4 and re.search(r"--wait: .*: after 0.01 min \d+ of \d+ files", late.stderr)
        assert not hub.downloads(), "who waits brings nothing"
        waiting = environment(volume, WAIT="4", WHEN_DONE="true", **online)
        with subprocess.Popen([START], env=waiting, stdout=subprocess.PIPE, text=True) as gpu:
            assert gpu.stdout is not None
            said = ""
            while "waiting for files" not in said:
                said = gpu.stdout.readline()
                assert said, "it ended"
            filled = start(volume, ROLE="download", WHEN_DONE="echo $? > filled", **online)
            assert filled.returncode == 0 and (volume / "filled").exists(), filled.stderr
            rest = gpu.stdout.read()
            assert gpu.wait(300) == 0, rest
        once = [path for path, _ in hub.downloads()]
        assert len(once) == len(set(once)), "each file came once"
    assert (volume / "runs" / "tiny" / "lora" / "tiny.safetensors").exists()


# Home


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({}, None),
        ({"RUNPOD_POD_ID": "x"}, "runpodctl send '/runs/my lora.safetensors'"),
        ({"RUNPOD_POD_ID": "x", "RUNPOD_PUBLIC_IP": "1.2.3.4"}, "runpodctl send"),
        (
            {"RUNPOD_POD_ID": "x", "RUNPOD_PUBLIC_IP": "1.2.3.4", "RUNPOD_TCP_PORT_22": "5"},
            "scp -P 5 'root@1.2.3.4:/runs/my lora.safetensors' .",
        ),
    ],
)
def test_copy_command_from_environment(given: dict[str, str], command: str | None):
    """The copy command follows from the pod's environment variables."""
    found = train.copy_command(Path("/runs/my lora.safetensors"), given)
    assert found is None if command is None else found is not None and found.startswith(command)


# The image


def test_dockerfile_copies_and_torch():
    """The Dockerfile copies existing files only, and installs no second torch."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and set(copied) == allowed and all((ROOT / name).exists() for name in copied)
    assert len(re.findall(r"pip install", text)) == 1 and "-base-" in text
    assert "CMD" in text and re.search(r"scripts/runpod/start\.sh\"\]$", text, re.MULTILINE)
