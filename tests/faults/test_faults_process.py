"""Faults of the process and of what surrounds it: signals, other runs, paths, disks, clocks, networks, GPUs."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.load import read_config
from zimage_train.errors import ConfigError, DiskError, FolderInUseError, Problem, Stopped
from zimage_train.io import atomic, locks
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import devices, preflight
from zimage_train.report.metrics import read_records
from zimage_train.training import loop
from zimage_train.training.signals import SIGNALS

from config_texts import refusal
from helpers import PREVIEWED, environment, facts, final, folder, losses, run_python, stop_after

PACKAGE = "zimage_train"
ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "torchao",
    "prodigyopt",
    "pytorch_optimizer",
}


@pytest.fixture(scope="module")
def fork_server() -> BaseContext:
    """Processes that begin with the program loaded, which takes most of a short run's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zimage_train.commands.train"])
    return context


@pytest.mark.slow
def test_killed_at_any_moment(make_config, tmp_path: Path, fork_server):
    """35. Killed (SIGKILL) again and again, at any moment: the same command ends in an uninterrupted run's bytes."""
    options = {"train": {"steps": 30, "batch_size": 1}, "save": {"every": 4}}
    whole, config = make_config(output_dir=str(tmp_path / "whole"), **options), make_config(**options)
    run_training(whole, fresh=False)
    metrics = folder(config) / "metrics.jsonl"
    for lines in (3, 11, 21):
        process = fork_server.Process(target=run_training, args=(config, False))
        process.start()
        while process.is_alive() and (not metrics.exists() or metrics.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run_training(config, fresh=False)
    assert final(config) == final(whole) and losses(config) == losses(whole)
    starts = facts(config)["starts"]
    assert len(starts) == 4 and starts[0] == 0 and starts == sorted(starts) and starts[-1] >= 16, starts
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 31))


INTERRUPTED_TWICE = """
import signal, time
from pathlib import Path
from zimage_train.io import atomic
from zimage_train.training import signals
with signals.stop_on_signals() as request, atomic.replace_atomically(Path("x.bin")) as file:
    file.write(b"new")
    file.flush()
    signal.raise_signal(signal.SIGINT)
    print(request.signal_number, flush=True)
    time.sleep(signals.ECHO_SECONDS + 0.1)
    signal.raise_signal(signal.SIGINT)
    print("still here")
"""


def test_second_interrupt_within_a_save(tmp_path: Path):
    """56. Ctrl-C lets a save finish; a second Ctrl-C, even within it, ends the run at once; the old file is whole."""
    (tmp_path / "x.bin").write_bytes(b"old")
    done = run_python(INTERRUPTED_TWICE, tmp_path)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "2\n")
    assert (tmp_path / "x.bin").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    atomic.remove_stale_temp_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_signals_and_lock_are_released(make_config, monkeypatch, end: str):
    """57. After a run that ended, was stopped or failed, signals do what they did before, and the folder is free."""
    config, threads, original = make_config(train={"steps": 2}), threading.active_count(), loop.prefetch
    before = {number: signal.getsignal(number) for number in SIGNALS}
    within = []

    def prefetch(run):
        for at, loaded in original(run):
            within.append(({number: signal.getsignal(number) for number in SIGNALS}, is_free(folder(config))))
            if end == "failed":
                raise ZeroDivisionError
            if end == "stopped":
                signal.raise_signal(signal.SIGTERM)
            yield at, loaded

    monkeypatch.setattr(loop, "prefetch", prefetch)
    with contextlib.nullcontext() if end == "done" else pytest.raises((ZeroDivisionError, Stopped)):
        run_training(config, fresh=False)
    handlers, was_free = within[0]
    assert all(handlers[number] != before[number] for number in SIGNALS) and not was_free
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    assert is_free(folder(config)) and not (folder(config) / "run.holder").exists()
    assert threading.active_count() == threads


def is_free(run_folder: Path) -> bool:
    try:
        with locks.lock_folder(run_folder):
            return True
    except FolderInUseError:
        return False


HOLD = """
import sys, time
from pathlib import Path
from zimage_train.io import locks
with locks.lock_folder(Path("run")):
    print("held", flush=True)
    sys.stdin.read()
print("torch" in sys.modules)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_lock_names_its_holder(tmp_path: Path, holder: subprocess.Popen[str]):
    """58. A second process in a run's folder is refused with exit code 6, and told who holds it, on which host."""
    for _ in range(2):
        with pytest.raises(FolderInUseError) as caught, locks.lock_folder(tmp_path / "run"):
            raise AssertionError("two processes in one folder")
        assert caught.value.exit_code == 6
        who = f"process {holder.pid} on {socket.gethostname()}"
        assert str(caught.value) == (
            f"{tmp_path / 'run'}: in use by {who}; wait for that run, stop it, or choose another name"
        )


def test_lock_free_once_holder_is_killed(tmp_path: Path, holder: subprocess.Popen[str]):
    """58. A folder is free at once when the process that held it is killed."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locks.lock_folder(tmp_path / "run"):
        assert (tmp_path / "run" / "run.holder").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_lock_free_once_holder_is_done(tmp_path: Path, holder: subprocess.Popen[str]):
    """58. A folder is free when the process that held it is done, or failed; a process cannot hold it twice."""
    out, _ = holder.communicate("")
    assert out == "False\n" and holder.returncode == 0
    assert not (tmp_path / "run" / "run.holder").exists()
    with pytest.raises(ZeroDivisionError), locks.lock_folder(tmp_path / "run"):
        raise ZeroDivisionError
    with locks.lock_folder(tmp_path / "run"), pytest.raises(FolderInUseError), locks.lock_folder(tmp_path / "run"):
        raise AssertionError("locked twice")
    with locks.lock_folder(tmp_path / "other" / "one"), locks.lock_folder(tmp_path / "run"):
        assert (tmp_path / "other" / "one").is_dir()


@pytest.mark.parametrize("fresh", [False, True])
def test_lock_refuses_a_second_run(make_config, tmp_path: Path, holder, fresh: bool):
    """58. A second run is refused before it writes anything, and --fresh does not move a folder away that is in use."""
    with pytest.raises(FolderInUseError, match=f"in use by process {holder.pid} on ") as error:
        run_training(make_config(name="run", output_dir=str(tmp_path)), fresh=fresh)
    assert error.value.exit_code == 6 and holder.poll() is None
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.lock", "run.holder"}
    assert not list(tmp_path.glob("run.old*"))


@pytest.mark.parametrize("place", ["output", "cache"])
def test_output_or_cache_not_a_folder(make_config, tmp_path: Path, place: str):
    """59. An output or cache folder that is a file, or below a file, is refused with exit code 7 before any work."""
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "x")
    config = (
        make_config(output_dir=str(tmp_path / "file")) if place == "output" else make_config(cache={"folder": below})
    )
    with pytest.raises(DiskError, match=f"{tmp_path / 'file'} is not a folder; choose another place") as error:
        run_training(config, fresh=False)
    assert error.value.exit_code == 7 and (tmp_path / "file").read_text() == ""


def test_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """59. A folder that is a file, a dangling link or read-only is refused, and none is made on the way."""
    atomic.require_writable_folder(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    atomic.require_writable_folder(Path("relative/x"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "broken"):
        for place in (tmp_path / name, tmp_path / name / "x"):
            with pytest.raises(DiskError, match=rf"{tmp_path / name} is not a folder; choose another place"):
                atomic.require_writable_folder(place)
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    with pytest.raises(DiskError, match=f"{tmp_path} cannot be written to"):
        atomic.require_writable_folder(tmp_path / "a")


@pytest.mark.parametrize(
    "name",
    ["", " ", "a/b", "../a", "..", ".a", "-a", "a\\b", "a ", " a", "a.", "a-1", "a-000250", "a:b", "a*",
     "a\n", "a\tb", "CON", "nul", "Aux.v2", "com1", "a" * 201, "猫" * 67],
)  # fmt: skip
def test_name_leaves_the_folder(tmp_path: Path, name: str):
    """59. A run name that leaves the output folder (`../x`), or that no file system takes, is refused."""
    (line,) = refusal(tmp_path, "", least=f'name: "{name}"\ndata: [{{folder: x}}]\n')
    assert line.startswith("c.yaml:1: name: ")


def test_name_long_in_any_script(make_config, tmp_path: Path):
    """59. A run name of 200 bytes, with spaces and letters of any script, in a folder like that, trains like any."""
    name = "Rotes Haar \u00fc\u00f6 \u732b "
    name += "x" * (200 - len(name.encode()))
    output = str(tmp_path / "out put \u00e9 [1]")
    config = make_config(name=name, output_dir=output, train={"steps": 2}, save={"every": 1}, log={"tensorboard": True})
    run_training(config, fresh=False)
    names = {path.name for path in (folder(config) / "lora").iterdir()}
    assert names == {f"{name}.safetensors", f"{name}-000001.safetensors"}
    assert {path.name for path in Path(output).iterdir()} == {name}


@pytest.mark.slow
def test_config_means_the_same_elsewhere(make_config, tmp_path: Path, monkeypatch):
    """59. Relative paths mean the folder they were given in: the written config means the same from anywhere."""
    values = {"folder": "pictures", "resolution": [64], "trigger": "zorb"}
    shutil.copytree(mini.IMAGES, tmp_path / "here" / "pictures")
    shutil.copytree(mini.TURBO, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(output_dir="out", data=[values], model={"path": "model"}, train={"steps": 1})
    run_training(config, fresh=False)
    monkeypatch.chdir(tmp_path)
    again = read_config(tmp_path / "here" / "out" / "tiny" / "config.yaml", ["train.steps=2"])
    run_training(again, fresh=False)
    assert facts(again)["starts"] == [0, 1]
    assert not (tmp_path / "out").exists()


def test_disk_too_small_for_checkpoints(make_config, monkeypatch: pytest.MonkeyPatch):
    """60. A disk without room for checkpoints and exports is refused at once, with what is free and what is needed."""
    needed = []
    real = atomic.require_free_space

    def require_space(folder: Path, needed_bytes: int, what: str) -> None:
        needed.append(needed_bytes)
        real(folder, needed_bytes, what)

    monkeypatch.setattr(atomic, "require_free_space", require_space)
    for settings in ({}, {"save": {"keep": 80}}, {"lora": {"rank": 8}}, {"optimizer": {"name": "adamw8bit"}}):
        preflight.check_run(make_config(**settings))
    modules = preflight.check_run(make_config()).model_files
    assert modules is not None
    trained = 4 * sum(sum(modules.shape.linears[name]) for name in modules.modules)
    checkpoints, exports = 3 * trained * (4 + 8), (8 + 2) * trained * 4
    assert needed[0] == checkpoints + exports
    assert 0 < needed[3] < needed[0] < min(needed[1:3])
    assert needed[2] == pytest.approx(2 * needed[0], abs=2)
    for free, is_enough in ((needed[0], True), (needed[0] - 1, False)):
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        if is_enough:
            preflight.check_run(make_config())
        else:
            with pytest.raises(DiskError, match=r"checkpoints and exports need .* lower save\.keep") as error:
                run_training(make_config(), fresh=False)
            assert error.value.exit_code == 7 and not folder(make_config()).exists()


def test_disk_too_small_for_the_cache(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """60. A disk without room for what is not cached yet is refused before anything is encoded for it."""
    asked: list[tuple[Path, int]] = []

    def full(folder: Path, needed_bytes: int, what: str) -> None:
        if what == "cached images":
            asked.append((folder, needed_bytes))
            raise DiskError(Problem(str(folder), "full"))

    monkeypatch.setattr(atomic, "require_free_space", full)
    monkeypatch.setattr("zimage_train.dataset.encoding.image_encoder", pytest.fail)
    config = make_config(cache={"folder": str(tmp_path / "new")})
    with pytest.raises(DiskError):
        run_training(config, fresh=False)
    sizes = {(item.image.path, item.size) for item in preflight.check_run(config).items}
    latents = sum(4 * 16 * (size.width // 8) * (size.height // 8) for _, size in sizes)
    assert asked == [(tmp_path / "new", latents)]


def test_disk_too_small_has_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """60. Too little space is refused with both numbers, asked for where the folder will be; none is made for it."""
    asked = []

    def usage(path: Path):
        asked.append(path)
        return type("Usage", (), {"free": 2_000_000_000})

    monkeypatch.setattr(atomic.shutil, "disk_usage", usage)
    atomic.require_free_space(tmp_path / "a" / "b", 2_000_000_000, "checkpoints")
    with pytest.raises(DiskError) as caught:
        atomic.require_free_space(tmp_path / "a" / "b", 2_500_000_000, "checkpoints")
    assert str(caught.value).startswith(
        f"{tmp_path / 'a' / 'b'}: 2.00 GB free, checkpoints need 2.50 GB; free some space"
    )
    assert asked == [tmp_path, tmp_path], "the nearest folder that exists, and none is made"


def test_clock_jumps_back(make_config, monkeypatch):
    """61. A clock that goes back by days, and files with the times of others, change neither durations nor order."""
    config = make_config(train={"steps": 3}, save={"every": 1}, log={"tensorboard": True})
    asked = []

    def earlier_each_time() -> float:
        asked.append(1_700_000_000.0 - 86_400.0 * len(asked))
        return asked[-1]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", earlier_each_time)
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run_training(config, fresh=False)
    assert len(asked) > 1
    for step, moment in ((1, 2_000_000_000), (2, 1_000_000_000)):
        os.utime(folder(config) / "checkpoints" / f"step-{step:06d}.safetensors", (moment, moment))
    run_training(config, fresh=False)
    assert facts(config)["starts"] == [0, 2]
    seconds = [record["seconds"] for record in read_records(folder(config) / "metrics.jsonl")]
    assert len(seconds) == 3 and all(0 < one < 60 for one in seconds)


@pytest.mark.slow
def test_a_run_asks_no_network(make_config, no_network: list, monkeypatch):
    """62. With local files, a run with previews, exports and TensorBoard asks no network, not even for a name."""
    names: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        names.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config = make_config(train={"steps": 2}, sample=PREVIEWED, log={"tensorboard": True})
    run_training(config, fresh=False)
    assert (folder(config) / "samples" / "000002-00.png").exists()
    assert (no_network, names) == ([], [])
    with pytest.raises(AssertionError, match="connection to"), socket.socket() as unwanted:
        unwanted.connect(("192.0.2.1", 9))
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("example.invalid", 9))
    assert (len(no_network), len(names)) == (1, 1), "and an attempt would have been noticed"


LOADED = """
import json, sys
sys.path[:0] = {path!r}
before = set(sys.modules)
for name in {names!r}:
    __import__(name)
{then}
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""


def loaded_by(names: list[str], then: str = "", path: Iterable[str] = ()) -> set[str]:
    """What a fresh interpreter has loaded after importing `names` and running `then`."""
    code = LOADED.format(path=[str(one) for one in path], names=names, then=then)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_check_loads_no_torch():
    """63. `--help`, config errors and all of `check` load no torch, and so answer at once."""
    modules = ("cli.app", "config.load", "dataset.sample_order", "planning.preflight", "commands.check")
    names = [f"{PACKAGE}.{module}" for module in modules]
    then = """
from pathlib import Path
from zimage_train.planning import preflight
from zimage_train.commands import check
from zimage_train.config.load import read_config
config = read_config(Path("configs/quickstart.yaml"))
def nothing_here(*_): raise AssertionError("asks the hub")
assert check.check_report(preflight.check_run(config, nothing_here))
"""
    loaded = loaded_by(names, then)
    assert loaded >= {PACKAGE, "yaml", "pydantic", "PIL", "typer"}
    assert loaded & HEAVY == set()


def test_check_for_torch_can_fail(tmp_path: Path):
    """63. Check: loading torch would be noticed."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "asks_for_torch.py").write_text("def now():\n    import torch\n")
    assert "torch" not in loaded_by(["asks_for_torch"], path=[str(tmp_path)])
    assert "torch" in loaded_by(["asks_for_torch"], "import asks_for_torch; asks_for_torch.now()", [str(tmp_path)])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_steps_leak_no_memory_or_threads(make_config, monkeypatch):
    """64. After 120 steps a run holds no more memory and no more threads than after 40."""
    held: list[tuple[int, int]] = []
    original = loop.log_step

    def report(*args) -> None:
        original(*args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append((pages * os.sysconf("SC_PAGE_SIZE"), threading.active_count()))

    monkeypatch.setattr(loop, "log_step", report)
    run_training(make_config(train={"steps": 120, "batch_size": 1}), fresh=False)
    assert len(held) == 120
    early, late = (max(one[0] for one in part) for part in (held[40:60], held[100:]))
    assert late - early < 500_000
    assert {one[1] for one in held[40:]} == {held[40][1]}


def test_no_gpu_for_the_full_model(make_config, monkeypatch):
    """65. Without a GPU, or with a torch that does not know it, the full model is refused before it is fetched."""
    monkeypatch.setattr("zimage_train.commands.train.download", pytest.fail)
    with pytest.raises(ConfigError, match=r"device: no GPU was found, and 6.2 billion parameters"):
        run_training(make_config(model={"path": None, "adapter": None}), fresh=False)


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    """65. A GPU without bf16 is refused by its name with exit code 2, unless model.dtype asks for fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old Card")
    gpu, shape = torch.device("cuda"), TransformerShape()
    with pytest.raises(ConfigError, match=r"model\.dtype: Old Card has no bf16; an RTX 30 series") as error:
        devices.require_device(gpu, shape, "bf16")
    assert error.value.exit_code == 2
    devices.require_device(gpu, shape, "fp32")


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    """65. fp8_fast is refused on a GPU that has no fp8 arithmetic, and other kinds are not."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "RTX 3090")
    gpu, shape = torch.device("cuda"), TransformerShape()
    for capability, refused in (((8, 6), True), ((8, 9), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_now=capability: is_now)
        for kind in ("fp8", "int8", "nf4", "auto", None):
            devices.require_device(gpu, shape, "bf16", kind)
        if not refused:
            devices.require_device(gpu, shape, "bf16", "fp8_fast")
            continue
        with pytest.raises(ConfigError, match=r"model\.quantize: is fp8_fast, and RTX 3090 has no fp8") as error:
            devices.require_device(gpu, shape, "bf16", "fp8_fast")
        assert error.value.exit_code == 2
