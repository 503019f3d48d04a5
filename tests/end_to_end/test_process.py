"""The program as a process: killed, stopped, started twice, cut off from the network."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zimage_train.commands.train import run_training
from zimage_train.config import strict_yaml
from zimage_train.config.load import read_config

from mini_config import mini_values

pytestmark = pytest.mark.slow

HANG_SECONDS = 300
"""Only ends what would wait for ever: a busy machine may take long to import torch."""


@pytest.fixture
def start(tmp_path: Path, shared_cache: Path):
    """`start(name, **changes)`: begin `zimage-train train` in a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def begin(name: str, output: str = "runs", **changes) -> subprocess.Popen[str]:
        path = tmp_path / f"{name}-{output}.yaml"
        path.write_text(strict_yaml.dump(mini_values(tmp_path / output, shared_cache, name=name, **changes)))
        process = subprocess.Popen(
            [sys.executable, "-m", "zimage_train", "train", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], path: Path, lines: int) -> None:
    """Wait until `path` has that many lines."""
    until = time.monotonic() + HANG_SECONDS
    while time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        if process.poll() is not None:
            raise AssertionError(process.stdout.read() if process.stdout else "ended")
        time.sleep(0.005)
    raise AssertionError(f"{path} never had {lines} lines")


TWELVE_STEPS = {"train": {"steps": 12, "batch_size": 1}, "save": {"every": 5}}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_saves(start, tmp_path: Path, number: int, code: int):
    """A signal makes the run save and say how to continue."""
    process = start("tiny", train={"steps": 500, "batch_size": 1})
    wait_for(process, tmp_path / "runs" / "tiny" / "metrics.jsonl", 4)
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, output
    assert "the same command continues" in output and "Traceback" not in output
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*.safetensors"))


COUNTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from zimage_train import __main__
looked_for = 0
def count(event, details):
    global looked_for
    if event == "import":
        looked_for += 1
        if looked_for == {last}:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(count)
{then}
"""


def run_counted(last: int, then: str) -> subprocess.CompletedProcess[str]:
    """Run `then`, with an interrupt as module number `last` is looked for."""
    words = [sys.executable, "-c", COUNTED.format(last=last, then=then)]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANG_SECONDS)


@pytest.fixture(scope="module")
def number_of_imports() -> int:
    whole = run_counted(0, "import zimage_train.cli.app, zimage_train.commands.train; print(looked_for)")
    return int(whole.stdout.split()[-1])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_ctrl_c_during_imports(tmp_path: Path, number_of_imports: int, share: float):
    """Ctrl-C while modules are imported shows no traceback.

    The interrupt comes at the given share of all modules that are looked for.
    """
    config = tmp_path / "c.yaml"
    config.write_text(strict_yaml.dump({"name": "x", "data": [{"folder": str(tmp_path)}]}))
    last = round(share * number_of_imports)
    done = run_counted(last, f"sys.argv = ['zimage-train', 'train', '{config}']; __main__.main()")
    assert done.returncode == 130 and done.stdout.strip() == "stopped", done.stdout


def trained_here(folder: Path, cache: Path, **changes) -> Path:
    """Train in this process, and return the run folder."""
    path = folder / "here.yaml"
    path.write_text(strict_yaml.dump(mini_values(folder / "runs", cache, name="here", **changes)))
    run_training(read_config(path), fresh=True)
    return folder / "runs" / "here"


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A run whose output somebody reads."""
    return trained_here(tmp_path_factory.mktemp("heard"), shared_cache, **TWELVE_STEPS)


@pytest.mark.parametrize("output", ["a closed pipe", "a full disk", "a closed terminal"])
def test_nobody_has_to_listen(tmp_path: Path, shared_cache: Path, heard: Path, output: str):
    """What a run prints can be lost; its steps, checkpoints and exit code cannot."""
    path = tmp_path / "deaf.yaml"
    path.write_text(strict_yaml.dump(mini_values(tmp_path / "runs", shared_cache, name="deaf", **TWELVE_STEPS)))
    command = [sys.executable, "-m", "zimage_train", "train", str(path)]
    if output == "a full disk":
        with open("/dev/full", "w") as full:
            assert subprocess.run(command, stdout=full, stderr=full, timeout=HANG_SECONDS).returncode == 0
    elif output == "a closed pipe":
        deaf = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert deaf.stdout and deaf.stderr
        deaf.stdout.close()
        with deaf.stderr:
            assert deaf.stderr.read() == b""
        assert deaf.wait(HANG_SECONDS) == 0
    else:
        terminal, own = os.openpty()
        deaf = subprocess.Popen(command, stdin=own, stdout=own, stderr=own, start_new_session=True)
        os.close(own)
        wait_for(deaf, tmp_path / "runs" / "deaf" / "metrics.jsonl", 4)
        os.close(terminal)
        assert deaf.wait(HANG_SECONDS) == 0
    lora = tmp_path / "runs" / "deaf" / "lora" / "deaf.safetensors"
    assert tensors(lora) == tensors(heard / "lora" / "here.safetensors")
    assert "done: " in (tmp_path / "runs" / "deaf" / "log.txt").read_text()


def tensors(path: Path) -> bytes:
    """What follows the header of a safetensors file."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_python_m_is_the_same_program(tmp_path: Path):
    """`python -m zimage_train` takes the same commands, with the same exit codes."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\ndata:\n  - folder: nowhere\noptimizer:\n  lrr: 1e-4\n")
    done = subprocess.run(
        [sys.executable, "-O", "-m", "zimage_train", "train", str(bad)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "optimizer.lrr: unknown key; did you mean 'lr'?" in done.stderr and ":5:" in done.stderr
    assert "Traceback" not in done.stderr


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
# Without --multi_gpu accelerate starts a single process where there is no GPU; with it, two, which then find none.
ACCELERATE += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]


SHORT = {"train": {"steps": 3, "batch_size": 2}, "save": {"every": 1}}


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A run of a single process that accumulates two micro-batches."""
    changes = SHORT | {"train": SHORT["train"] | {"grad_accumulation": 2}}
    return trained_here(tmp_path_factory.mktemp("accumulated"), shared_cache, **changes)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_equal_accumulation(
    tmp_path: Path,
    shared_cache: Path,
    accumulated: Path,
    forking_python: str,
    monkeypatch: pytest.MonkeyPatch,
    launcher,
):
    """Two processes train like a single process that accumulates two micro-batches."""
    path = tmp_path / "two.yaml"
    path.write_text(strict_yaml.dump(mini_values(tmp_path / "two", shared_cache, name="tiny", **SHORT)))
    monkeypatch.setattr(sys, "executable", forking_python)  # test_launch.py starts launchers that import anew
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "zimage_train", "train", str(path)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    together = tmp_path / "two" / "tiny"
    assert json.loads((together / "run.json").read_text())["processes"] == 2
    one, two = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (accumulated, together)
    )
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-5)
    assert [record["grad_norm"] for record in two] == pytest.approx([record["grad_norm"] for record in one], rel=1e-5)
    # AdamW's first moment is a sum of gradients with fixed factors, so it compares them tensor by tensor.
    moments = [first_moments(folder / "checkpoints" / "step-000002.safetensors") for folder in (accumulated, together)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == 84
    assert max(far(moments[0][key], moments[1][key]) for key in moments[0]) < 1e-5


def first_moments(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in load_file(path).items() if key.endswith(".exp_avg")}


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The difference of two gradients as a share of the first."""
    return float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-12))
