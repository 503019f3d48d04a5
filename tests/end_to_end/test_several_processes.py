"""Several processes: each holds the frozen model by its own plan, and together they take the steps of one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zimage_train.commands.train import run_training
from zimage_train.config import strict_yaml
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.training.heartbeat import BEAT_SECONDS

from helpers import facts, losses
from mini_config import mini_values

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
STEPS = 3
SMALL_CARD = 6_000_000
"""Bytes that the miniature in int8 exceeds, unless blocks are streamed."""

WATCHED = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
from zimage_train.commands import train
from zimage_train.config.load import read_config
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.planning import devices
from zimage_train.training import checkpoint

rank, log = int(os.environ["RANK"]), Path(sys.argv[2])

def watched(kind, original, name_of):
    def call(*args, **options):
        with log.open("a") as file:
            file.write(json.dumps([rank, kind, name_of(*args)]) + "\\n")
        return original(*args, **options)
    return call

limits = json.loads(sys.argv[3])
if limits:
    of_device = devices.device_limits
    devices.device_limits = lambda device: replace(of_device(device), limit_bytes=limits[rank])
TensorCache.write = watched("cached", TensorCache.write, lambda cache, key, *rest: str(key))
checkpoint.save = watched("saved", checkpoint.save, lambda folder, step, *rest: str(step))
build = train.build_state
train.build_state = watched(
    "planned", build, lambda context, plan, *rest: [plan.placement.quantization, plan.placement.streamed]
)
train.run_training(read_config(Path(sys.argv[1])), fresh=False)
"""


def values_of(root: Path, cache: Path, accumulation: int, **changes: Any) -> dict[str, Any]:
    train = {"steps": STEPS, "batch_size": 1, "grad_accumulation": accumulation}
    return mini_values(root, cache, name="run", train=train, **changes)


def launched(launcher: list[str], root: Path, values: dict[str, Any], limits: list[int]) -> list[list[Any]]:
    """Train with two processes; return what they did, as [rank, kind, what]."""
    root.mkdir(parents=True, exist_ok=True)
    config, driver, log = root / "config.yaml", root / "driver.py", root / "log.jsonl"
    config.write_text(strict_yaml.dump(values))
    driver.write_text(WATCHED)
    command = [sys.executable, *launcher, str(driver), str(config), str(log), json.dumps(limits)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line) for line in log.read_text().splitlines()]


def config_of(values: dict[str, Any]) -> Config:
    config, problems = validate_config(values, str)
    assert config is not None, problems
    return config


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_each_process_by_its_own_plan(tmp_path: Path, launcher: list[str]):
    """A card that is too small streams int8 weights, the other holds them; the steps are those of one process.

    Each latent and each embedding is encoded by one process alone, and only the main process saves.
    """
    model = {"quantize": "int8"}
    alone = config_of(values_of(tmp_path / "alone", tmp_path / "cache-alone", 2, model=model))
    run_training(alone, fresh=False)
    assert facts(alone)["plan"]["streamed"] == 0, "with all memory, nothing is streamed"
    values = values_of(tmp_path / "runs", tmp_path / "cache", 1, model=model)
    did = launched(launcher, tmp_path / "two", values, [10**10, SMALL_CARD])
    plans = {rank: what for rank, kind, what in did if kind == "planned"}
    assert plans[0] == ["int8", 0] and plans[1][0] == "int8" and plans[1][1] > 0
    cached = Counter(what for _, kind, what in did if kind == "cached")
    assert set(cached.values()) == {1} and {rank for rank, kind, _ in did if kind == "cached"} == {0, 1}
    assert [(rank, what) for rank, kind, what in did if kind == "saved"] == [(0, str(STEPS))]
    assert losses(config_of(values)) == pytest.approx(losses(alone), rel=1e-5)


IMPATIENT = """
import sys
from zimage_train import __main__
from zimage_train.training import heartbeat
heartbeat.LOST_SECONDS = 15.0
sys.argv = ["zimage-train", "train", sys.argv[1]]
__main__.main()
"""


def machine(number: int, root: Path, launcher: list[str], **changes: Any) -> subprocess.Popen[str]:
    """Begin to train on one of two machines, each with a folder and a cache of its own."""
    place = root / f"machine-{number}"
    place.mkdir(parents=True, exist_ok=True)
    values = values_of(place / "runs", place / "cache", 1) | changes
    (place / "config.yaml").write_text(strict_yaml.dump(values))
    (place / "impatient.py").write_text(IMPATIENT)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    if launcher[0] == "ip":
        environment["GLOO_SOCKET_IFNAME"] = INTERFACES[number]
    with (place / "out.txt").open("w") as out:
        return subprocess.Popen(
            [*launcher, str(place / "impatient.py"), str(place / "config.yaml")],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )


def outputs_of(machines: list[subprocess.Popen[str]], root: Path) -> list[tuple[int, str]]:
    """Wait for both machines; return exit code and output of each."""
    codes = [process.wait(300) for process in machines]
    return [(code, (root / f"machine-{n}" / "out.txt").read_text()) for n, code in enumerate(codes)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_machines_with_other_files(tmp_path: Path):
    """A second machine that lacks the run's folder is refused, where it would begin anew beside the first one."""

    def train(steps: int) -> list[tuple[int, str]]:
        port, machines = str(free_port()), []
        for n in range(2):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            launcher += ["--node-rank", str(n), "--master-addr", "127.0.0.1", "--master-port", port]
            machines.append(machine(n, tmp_path, launcher, train={"steps": steps, "batch_size": 1}))
        return outputs_of(machines, tmp_path)

    assert [code for code, _ in train(2)] == [0, 0]
    first, second = (tmp_path / f"machine-{n}" / "runs" / "run" for n in range(2))
    assert list((first / "checkpoints").iterdir()) and not second.exists(), "only the first process writes"
    said = train(STEPS)
    for code, output in said:
        assert code != 0 and output.count("the step to continue from: is 0 in process 1 on ") == 1
        assert "and 2 in the first; give every machine the same" in output
    shutil.copytree(first, second)
    assert [code for code, _ in train(STEPS)] == [0, 0]


INTERFACES = ("zimage-train-0", "zimage-train-1")
SPACES = ("zimage-train-a", "zimage-train-b")


@pytest.fixture
def two_networks() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them; yields what to put before a command to run it in each."""
    made = subprocess.run(["ip", "netns", "add", SPACES[0]], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", SPACES[1])
        ip("link", "add", INTERFACES[0], "netns", SPACES[0], "type", "veth", "peer", INTERFACES[1], "netns", SPACES[1])
        for n, (space, interface) in enumerate(zip(SPACES, INTERFACES, strict=True)):
            ip("-n", space, "addr", "add", f"10.77.0.{n + 1}/24", "dev", interface)
            ip("-n", space, "link", "set", interface, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", space] for space in SPACES]
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip, of iproute2")
def test_two_machines_meet(tmp_path: Path, two_networks: list[list[str]]):
    """Two machines that share nothing but a network meet by torchrun's rendezvous and take the steps of one process.

    When the cable between them is cut, both end, since nothing is heard of the other.
    """
    alone = config_of(values_of(tmp_path / "alone", tmp_path / "cache-alone", 2))
    run_training(alone, fresh=False)

    def train(**changes: Any) -> list[subprocess.Popen[str]]:
        machines = []
        for n, within in enumerate(two_networks):
            launcher = [*within, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            launcher += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400"]
            launcher += ["--rdzv-conf", f"is_host={1 - n}", "--rdzv-id", "run", "--local-addr", f"10.77.0.{n + 1}"]
            machines.append(machine(n, tmp_path, launcher, **changes))
        return machines

    said = outputs_of(train(), tmp_path)
    assert [code for code, _ in said] == [0, 0], said
    together = config_of(values_of(tmp_path / "machine-0" / "runs", tmp_path / "cache", 1))
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)

    machines = train(name="cut", train={"steps": 100_000, "batch_size": 1})
    metrics = tmp_path / "machine-0" / "runs" / "cut" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, 120)
    time.sleep(2 * BEAT_SECONDS)  # each has heard of the other
    ip("-n", SPACES[0], "link", "set", INTERFACES[0], "down")
    outputs = [tmp_path / f"machine-{n}" / "out.txt" for n in range(2)]
    for n, output in enumerate(outputs):
        wait_until(lambda n=n, output=output: f"nothing was heard of process {1 - n} for" in output.read_text(), 60)
    for process in machines:  # torchrun itself waits for its store, for longer than a test can
        process.kill()
        process.wait()


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.1)
