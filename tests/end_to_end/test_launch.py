"""Launched by accelerate or torchrun: signals reach the run, a lost process ends the others, one process writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zimage_train.commands.train import fill_run_caches, run_training
from zimage_train.config import strict_yaml
from zimage_train.errors import WorkerLostError
from zimage_train.training import distributed
from zimage_train.training.distributed import World
from zimage_train.training.signals import ECHO_SECONDS, StopRequest

from helpers import PREVIEWED, folder
from mini_config import mini_values

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def launch(tmp_path: Path, shared_cache: Path):
    """`launch(launcher, steps)`: begin a run of that many steps under a launcher."""
    running: list[subprocess.Popen[str]] = []

    def begin(launcher: list[str], steps: int, name: str = "tiny") -> subprocess.Popen[str]:
        path = tmp_path / f"{name}.yaml"
        values = mini_values(
            tmp_path / "runs", shared_cache, name=name, train={"steps": steps, "batch_size": 1}, save={"every": 10}
        )
        path.write_text(strict_yaml.dump(values))
        log = (tmp_path / f"{name}.out").open("w")
        process = subprocess.Popen(
            [*launcher, "-m", "zimage_train", "train", str(path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        log.close()
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(what, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def steps_of(root: Path) -> list[int]:
    path = root / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def is_stopped(root: Path) -> bool:
    path = root / "events.jsonl"
    return path.exists() and '"stopped"' in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [(ACCELERATE, 15), (TORCHRUN, 2)])
def test_signal_to_the_launcher_alone(launch, tmp_path: Path, launcher, number: int):
    """A signal to the launcher alone reaches the run, which saves."""
    root = tmp_path / "runs" / "tiny"
    process = launch(launcher, 5000)
    until(lambda: len(steps_of(root)) >= 3)
    process.send_signal(number)
    until(lambda: is_stopped(root), 20)
    assert process.wait(300) != 0
    saved = max(int(path.stem.split("-")[1]) for path in (root / "checkpoints").glob("step-*.safetensors"))
    assert saved == steps_of(root)[-1] >= 3
    said = f"stopped by {'SIGTERM' if number == 15 else 'SIGINT'}"  # `accelerate launch` does not wait for its process
    until(lambda: said in (tmp_path / "tiny.out").read_text(), 20)


@pytest.mark.slow
def test_ctrl_c_to_launcher_and_run(launch, tmp_path: Path):
    """Ctrl-C, which a terminal sends to the launcher and to the run, counts once."""
    for name, launcher in (("one", ACCELERATE), ("two", TORCHRUN)):
        root = tmp_path / "runs" / name
        process = launch(launcher, 5000, name)
        until(lambda root=root: len(steps_of(root)) >= 3)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(300)
        until(lambda root=root: is_stopped(root), 20)


@pytest.mark.slow
def test_killed_worker_ends_the_others(launch, make_config, tmp_path: Path, forking_python: str):
    """A killed worker ends the other soon, with a single line; the same command continues to the same LoRA."""
    root = tmp_path / "runs" / "tiny"
    launcher = [forking_python, *TORCHRUN[1:]]
    process = launch(launcher, 60)
    until(lambda: len(steps_of(root)) >= 12)
    os.kill(worker(tmp_path / "tiny.yaml", rank=1), signal.SIGKILL)
    assert process.wait(300) != 0  # without the line below, the other process would wait for 12 hours
    output = (tmp_path / "tiny.out").read_text()
    assert "launch: another process has ended" in output and "the same command continues" in output
    assert not re.search(r'File ".*zimage_train', output)  # torchrun's own traceback is not ours to prevent
    assert launch(launcher, 60).wait(300) == 0
    # A sum of two gradients is the same whether two processes or two micro-batches make them.
    whole = make_config(name="whole", train={"steps": 60, "batch_size": 1, "grad_accumulation": 2}, save={"every": 10})
    run_training(whole, fresh=False)
    assert tensors(root / "lora" / "tiny.safetensors") == tensors(folder(whole) / "lora" / "whole.safetensors")


def worker(config: Path, rank: int) -> int:
    """The process of this rank that trains with `config`, by its environment and arguments."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config).encode() in words and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError("no such worker")


def tensors(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_secondary_process_writes_nothing(make_config, monkeypatch, capsys):
    """A process other than the main process writes nothing."""
    config = make_config(sample=PREVIEWED, save={"every": 1}, log={"tensorboard": True})
    fill_run_caches(config)
    summed = []
    monkeypatch.setattr(distributed, "init", lambda: World(torch.device("cpu"), 1, 2))
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(
        "zimage_train.training.loop.all_reduce_gradients", lambda *args: summed.append(args[0].rank) or args[2]
    )
    capsys.readouterr()
    run_training(config, fresh=False)
    assert summed == [1, 1, 1, 1]
    assert not folder(config).exists()
    assert capsys.readouterr().out == ""


def test_failed_collective_is_a_lost_worker(monkeypatch):
    """A collective that fails is reported as a lost process."""

    def broken(*args):
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1\nmore")

    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    with pytest.raises(WorkerLostError, match=r"another process has ended \(\[gloo\] Connection closed") as error:
        distributed.all_reduce_gradients(World(torch.device("cpu"), 0, 2), torch.zeros(2), torch.zeros(2))
    assert error.value.exit_code == 8 and "more" not in str(error.value)


def test_echo_of_a_signal_is_ignored(monkeypatch):
    """The echo of a signal is not taken for a second signal."""
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    request = StopRequest()
    assert not request.take(2)
    now[0] += ECHO_SECONDS / 2
    assert not request.take(2)  # torchrun passes on what the terminal has sent already
    now[0] += 5
    assert not request.take(15)  # the launcher has died of it
    assert request.take(2)
    assert request.signal_number == 2
