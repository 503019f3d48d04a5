"""Faults around a save: what was trained is still there, and the run goes on as if nothing had been, or says why."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, DiskError, Stopped, WeightsError
from zimage_train.io import atomic, tensorfile
from zimage_train.report.metrics import read_records
from zimage_train.training import checkpoint, exports, outputs

from helpers import PREVIEWED, facts, final, folder, losses, numbers, run_python, stop_after
from injection import WRITING, Crash, fail_at

ROOT = Path(__file__).parents[2]
OLD = b"old" * 5000


TENSORS = {"lora.x.A": torch.arange(6.0).view(2, 3), "optim.0.state1": torch.arange(5, dtype=torch.uint8)}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(
            folder, step, {**TENSORS, "lora.x.B": torch.full((2,), float(step))}, {"optimizer": {"lr": 1e-4}}
        )


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def relabel(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b'"F32"') >= 1
    path.write_bytes(content.replace(b'"F32"', b'"I32"', 1))


def change_step(path: Path) -> None:
    content = path.read_bytes()
    assert b'\\"step\\": 30' in content
    path.write_bytes(content.replace(b'\\"step\\": 30', b'\\"step\\": 31'))


DAMAGES = [flip_bit, zero_tail, truncate, relabel, change_step, lambda path: path.write_bytes(b"")]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "steps", "rank"), [("adamw", 12, 4), ("adamw8bit", 3, 48), ("prodigy", 3, 4)])
def test_resume_after_every_step(make_config, monkeypatch, optimizer, steps, rank):
    """34. Stopped after every step and continued, a run ends in an uninterrupted run's losses, moments and bytes."""
    options = {
        "name": "run",
        "optimizer": {"name": optimizer, "lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "train": {"steps": steps, "batch_size": 3},
        "data": [{"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb", "caption_dropout": 0.3}],
        "lora": {"dropout": 0.1, "rank": rank},  # below rank 48 the tensors are too small for 8-bit state
    }
    whole = make_config(**options)
    run_training(whole, fresh=False)
    config = make_config(output_dir=str(Path(whole.output_dir) / "in_pieces"), **options)
    for step in range(1, steps):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Stopped) as stopped:
                run_training(config, fresh=False)
            assert stopped.value.exit_code == 143
    run_training(config, fresh=False)
    assert facts(config)["starts"] == list(range(steps))
    assert losses(config) == losses(whole)
    assert final(config) == final(whole)
    (one, other) = (checkpoint.load(checkpoint.steps_in(folder(c) / "checkpoints")[0][1]) for c in (config, whole))
    assert one.metadata == other.metadata and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_crash_at_any_call_of_a_save(tmp_path: Path):
    """36. Wherever a save is cut short, the newest checkpoint is the old or the new checkpoint, and whole."""
    outcomes = []
    for n in itertools.count(1):
        save(tmp_path / str(n), 10, 20)
        with contextlib.suppress(Crash), fail_at(WRITING, n, Crash()) as fault:
            save(tmp_path / str(n), 30)
        found = checkpoint.load_newest(tmp_path / str(n), pytest.fail)
        assert found is not None and found.tensors["lora.x.B"].tolist() == [float(found.step)] * 2
        assert all(checkpoint.NAME.fullmatch(path.name) for path in (tmp_path / str(n)).iterdir())
        if not fault.fired:
            break
        assert fault.fired == 1
        outcomes.append((fault.seen[n - 1], found.step))
    assert [call for call, _ in outcomes] == fault.seen, "it ends with a save in which nothing fails"
    assert fault.seen[-5:] == ["close", "replace", "open folder", "fsync", "unlink"]
    assert [step for _, step in outcomes] == [20] * (len(outcomes) - 3) + [30] * 3


def test_killed_writer_keeps_the_old_file(tmp_path: Path):
    """36. A process killed while it writes leaves the old file as it was, and a remnant that the next start clears."""
    (tmp_path / "x.bin").write_bytes(OLD)
    code = """
import os, signal
from pathlib import Path
from zimage_train.io import atomic
with atomic.replace_atomically(Path("x.bin")) as file:
    file.write(b"new")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(code, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "x.bin").read_bytes() == OLD and len(list(tmp_path.iterdir())) == 2
    atomic.remove_stale_temp_files(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["x.bin"]


def test_half_written_files_are_removed(make_config):
    """36. What a killed process left half written is removed by the next start of the run."""
    config = make_config(train={"steps": 1})
    (folder(config) / "checkpoints").mkdir(parents=True)
    leftover = folder(config) / "checkpoints" / f".step-000001.safetensors.{atomic._host()}-999999999.tmp"
    leftover.write_bytes(b"half")
    run_training(config, fresh=False)
    assert not leftover.exists()


@pytest.mark.parametrize("earlier", [[20], []], ids=["one before", "the first"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.ESTALE])
def test_failed_save_keeps_the_last_one(tmp_path: Path, number: int, earlier: list[int]):
    """37. A full, failing, forbidden or vanished disk: the save ends with code 7; the previous checkpoint is whole."""
    for n in itertools.count(1):
        place = tmp_path / str(n)
        save(place, *earlier)
        with fail_at(WRITING[:-1], n, OSError(number, os.strerror(number))) as fault:
            try:
                save(place, 30)
            except DiskError as error:
                said = str(error)
                assert error.exit_code == 7
        if not fault.fired:
            break
        assert fault.fired == 1
        why = "the disk is full" if number in atomic.FULL_DISK else os.strerror(number)
        assert said.startswith(f"{place / 'step-000030.safetensors'}: cannot be written ({why}); ")
        assert said.endswith("; the same command continues")
        is_renamed = "open folder" in fault.seen  # only making the rename itself durable comes after it
        there = [step for step, _ in checkpoint.steps_in(place)]
        assert there == ([30, *earlier] if is_renamed else earlier)
        assert [checkpoint.load(path).step for _, path in checkpoint.steps_in(place)] == there
        assert len(list(place.iterdir())) == len(there), "no half file stays"
    assert n > 10


@pytest.mark.slow
def test_disk_full_within_a_run(make_config, monkeypatch):
    """37. A disk that fills up within a run ends it with exit code 7; with space again, the same command goes on."""
    options = {"train": {"steps": 3}, "save": {"every": 1}}
    config = make_config(**options)
    original, faults = tensorfile.save_with_digest, []

    def save_sealed(path: Path, *args) -> None:
        if path.name != "step-000002.safetensors":
            return original(path, *args)
        with fail_at("write", 3, OSError(errno.ENOSPC, "No space left on device")) as fault:
            faults.append(fault)
            return original(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "save_with_digest", save_sealed)
        with pytest.raises(DiskError, match=r"step-000002.*the disk is full") as error:
            run_training(config, fresh=False)
    assert [fault.fired for fault in faults] == [1] and error.value.exit_code == 7
    run_training(config, fresh=False)
    whole = make_config(output_dir=str(Path(config.output_dir) / "whole"), **options)
    run_training(whole, fresh=False)
    assert facts(config)["starts"] == [0, 1]
    assert final(config) == final(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_disk_full_for_the_log(make_config):
    """37. A log.txt on a full disk costs a run neither steps nor its result."""
    config = make_config(train={"steps": 2})
    folder(config).mkdir(parents=True)
    (folder(config) / "log.txt").symlink_to("/dev/full")
    with (folder(config) / "log.txt").open("w") as log, pytest.raises(OSError, match="No space"):
        os.write(log.fileno(), b"x")
    run_training(config, fresh=False)
    assert len(losses(config)) == 2 and final(config)


def test_a_log_on_a_full_disk_stops_nothing(tmp_path: Path):
    """37. A line that a log cannot take is dropped, and nothing else happens."""
    if Path("/dev/full").exists():
        full = Path("/dev/full").open("w")  # noqa: SIM115  it cannot be closed in good order
        atomic.append_line(full, "line")
        atomic.sync(full)
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_a_real_full_disk(tmp_path: Path):
    """37. At the real limit of a disk, the old file stays, nothing half written is left, and the exit code is 7."""
    (tmp_path / "x.bin").write_bytes(OLD)
    code = """
import resource, signal, sys
from pathlib import Path
from zimage_train.io import atomic as files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    files.write(Path("x.bin"), [b"n" * 1000] * 100)
except files.DiskError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    result = run_python(code, tmp_path)
    assert (result.returncode, result.stderr) == (7, "")
    assert result.stdout.startswith("x.bin: cannot be written (the disk is full); free some space")
    assert (tmp_path / "x.bin").read_bytes() == OLD
    assert [one.name for one in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_set_aside(tmp_path: Path, damage):
    """38. A newest checkpoint with a changed bit, zero tail or cut is set aside and named; the previous is used."""
    save(tmp_path, 20, 30)
    newest = tmp_path / "step-000030.safetensors"
    good = newest.read_bytes()
    damage(newest)
    assert newest.read_bytes() != good
    said: list[str] = []
    found = checkpoint.load_newest(tmp_path, said.append)
    assert found is not None and found.step == 20
    assert len(said) == 1 and "step-000030" in said[0]
    assert (tmp_path / "step-000030.safetensors.corrupt").exists()


@pytest.mark.slow
def test_damaged_newest_costs_steps_only(make_config, monkeypatch, capsys):
    """38. A damaged newest checkpoint costs the steps since the previous checkpoint, and no bit of the result."""
    options = {"train": {"steps": 5}, "save": {"every": 1}}
    whole = make_config(name="tiny", **options)
    run_training(whole, fresh=False)
    config = make_config(output_dir=str(Path(whole.output_dir) / "b"), **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 4)
        run_training(config, fresh=False)
    newest = folder(config) / "checkpoints" / "step-000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    run_training(config, fresh=False)
    assert "set aside" in capsys.readouterr().out
    assert final(config) == final(whole)
    assert facts(config)["starts"] == [0, 3]


def test_all_checkpoints_damaged(tmp_path: Path):
    """39. Where every checkpoint is damaged, the run is refused and never begun anew in silence."""
    save(tmp_path, 20, 30)
    for path in tmp_path.iterdir():
        flip_bit(path)
    with pytest.raises(WeightsError, match="no checkpoint is intact") as error:
        checkpoint.load_newest(tmp_path, lambda text: None)
    assert error.value.exit_code == 4


@pytest.mark.slow
def test_damaged_checkpoints_need_fresh(make_config):
    """39. Damaged or deleted checkpoints keep being refused, start after start, until --fresh is asked for."""
    config = make_config(train={"steps": 2}, save={"every": 1})
    run_training(config, fresh=False)
    later = make_config(train={"steps": 3}, save={"every": 1})
    for path in (folder(config) / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"no checkpoint is intact.*--fresh"):
            run_training(later, fresh=False)
    shutil.rmtree(folder(config) / "checkpoints")
    with pytest.raises(WeightsError, match="checkpoints are gone; the last one was of step 2"):
        run_training(later, fresh=False)
    run_training(later, fresh=True)
    assert facts(later)["starts"] == [0]


def test_other_files_are_no_checkpoints(tmp_path: Path):
    """40. Temporary files, other names and a folder with a checkpoint's name are left alone."""
    save(tmp_path, 20)
    for name in (
        "old-step-000900.safetensors",
        "step-1e3.safetensors",
        "step-000100.safetensors.tmp",
        "step-9.safetensors",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step-000999.safetensors").mkdir()
    found = checkpoint.load_newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 20
    assert len(list(tmp_path.iterdir())) == 6, "and nothing of it was renamed or removed"


def test_a_later_format_is_refused(tmp_path: Path):
    """41. A checkpoint of a later format is refused with both formats."""
    path = tmp_path / "step-000020.safetensors"
    tensorfile.save_with_digest(path, TENSORS, {"state": json.dumps({"format": 99, "step": 20})})
    with pytest.raises(WeightsError, match="format 99"):
        checkpoint.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["FORMAT", "ARITHMETIC"])
def test_checkpoint_of_another_version(make_config, monkeypatch, number: str):
    """41. An intact checkpoint of another format, or of other arithmetic, is refused each time, and stays there."""
    config = make_config(train={"steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, number, getattr(checkpoint, number) + 1)
        patch.setattr(checkpoint, "__version__", "9.8.7")
        run_training(config, fresh=False)
    before = sorted(path.name for path in (folder(config) / "checkpoints").iterdir())
    for _ in range(2):
        with pytest.raises(WeightsError, match=rf"written by zimage-train 9.8.7 with {number.lower()} \d.*--fresh"):
            run_training(config, fresh=False)
    assert sorted(path.name for path in (folder(config) / "checkpoints").iterdir()) == before


def of_another_rank(tensors: dict, state: dict) -> str:
    name = next(name for name in sorted(tensors) if name.startswith("lora."))
    width = tensors[name].shape[1]
    tensors[name] = tensors[name][:3].clone()
    return f"{name} is [3, {width}] in the checkpoint and [4, {width}] in this run"


def of_fewer_modules(tensors: dict, state: dict) -> str:
    name = next(name for name in sorted(tensors) if name.startswith("lora."))
    shape = list(tensors.pop(name).shape)
    return f"{name} is missing in the checkpoint and {shape} in this run"


def of_another_optimizer(tensors: dict, state: dict) -> str:
    state["optimizer"]["kind"] = "Prodigy"
    return "holds the state of Prodigy, but this run uses AdamW"


@pytest.mark.slow
@pytest.mark.parametrize("change", [of_another_rank, of_fewer_modules, of_another_optimizer])
def test_checkpoint_of_another_lora(make_config, change):
    """41. A whole checkpoint of another rank, other modules or another optimizer is refused with both values."""
    run_training(make_config(train={"steps": 1}), fresh=False)
    path = folder(make_config()) / "checkpoints" / "step-000001.safetensors"
    tensors, metadata = tensorfile.load_with_digest(path)
    state = json.loads(metadata["state"])
    what = change(tensors, state)
    tensorfile.save_with_digest(path, tensors, {"state": json.dumps(state)})
    with pytest.raises(WeightsError) as error:
        run_training(make_config(train={"steps": 2}), fresh=False)
    assert error.value.exit_code == 4 and f"{path}: {what}" in str(error.value)
    assert path.exists(), "it is whole, so it is not set aside"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": {"lr": 5e-4}}, r"optimizer\.lr: - 0\.001  \+ 0\.0005"),
        ({"lora": {"rank": 8}}, r"lora\.rank: - 4  \+ 8"),
        ({"seed": 8}, "seed: - 7"),
        ({"model": {"adapter": None}}, "adapter: changed"),
    ],
)
def test_changed_config_is_refused(make_config, change: dict, named: str):
    """42. A run whose settings changed is refused with each difference, as it was and as it is."""
    run_training(make_config(train={"steps": 2}), fresh=False)
    changed = make_config(**{"train": {"steps": 4}, **change})
    with pytest.raises(ConfigError, match=named) as error:
        run_training(changed, fresh=False)
    assert error.value.exit_code == 2


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(make_config):
    """42. More steps are no other run: its rate stays a function of the step; fewer than are done are refused."""
    warmup = {"warmup_steps": 3}
    run_training(make_config(train={"steps": 2}, schedule=warmup), fresh=False)
    longer = make_config(train={"steps": 4}, schedule=warmup)
    run_training(longer, fresh=False)
    assert facts(longer)["starts"] == [0, 2]
    whole = make_config(train={"steps": 4}, schedule=warmup, output_dir=str(Path(longer.output_dir) / "b"))
    run_training(whole, fresh=False)
    assert final(longer) == final(whole)
    rates = [record["lr"] for record in read_records(folder(longer) / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    with pytest.raises(ConfigError, match="at step 4 already"):
        run_training(make_config(train={"steps": 3}, schedule=warmup), fresh=False)


@pytest.mark.slow
def test_changed_data_is_refused(make_config, tmp_path: Path):
    """43. A changed caption and a missing image are refused by name; the same images in another place are not."""

    def with_folder(name: str, steps: int) -> Config:
        data = [{"folder": str(tmp_path / name), "resolution": [64], "trigger": "zorb"}]
        return make_config(data=data, train={"steps": steps})

    shutil.copytree(mini.IMAGES, tmp_path / "a")
    run_training(with_folder("a", 2), fresh=False)
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    run_training(with_folder("same", 3), fresh=False)
    shutil.copytree(tmp_path / "a", tmp_path / "other")
    (tmp_path / "other" / "zorb_01.txt").write_text("another caption")
    (tmp_path / "other" / "zorb_02.png").unlink()
    with pytest.raises(ConfigError, match=r"zorb_01\.png.*: changed(.|\n)*zorb_02\.png.*: is gone"):
        run_training(with_folder("other", 4), fresh=False)


def test_finished_run_is_left_alone(make_config, capsys):
    """44. The command of a finished run says that it is complete, and touches no file of it but the log."""

    def times() -> dict[Path, int]:
        found = (path for path in folder(config).rglob("*") if path.name not in ("run.lock", "log.txt"))
        return {path: path.stat().st_mtime_ns for path in found}

    config = make_config(train={"steps": 1})
    run_training(config, fresh=False)
    before = times()
    assert "complete" not in capsys.readouterr().out
    run_training(config, fresh=False)
    assert "tiny is complete" in capsys.readouterr().out
    assert times() == before and len(before) > 5


@pytest.mark.slow
def test_metrics_after_the_checkpoint(make_config, monkeypatch):
    """45. Records of steps that were lost with a crash are dropped: after it each step is there once, in order."""
    config = make_config(train={"steps": 4}, save={"every": 2})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        run_training(config, fresh=False)
    metrics = folder(config) / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    later = [line.replace(f'"step": {step - 2}', f'"step": {step}') for step, line in zip((3, 4), lines, strict=True)]
    metrics.write_text("\n".join([*lines, *later, later[-1][: len(later[-1]) // 2]]))
    assert [record["step"] for record in read_records(metrics)] == [1, 2, 3, 4], (
        "the last line is torn, the others are whole"
    )
    run_training(config, fresh=False)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]
    assert metrics.read_text().splitlines()[:2] == lines and metrics.read_text().splitlines()[2:] != later


@pytest.mark.slow
def test_metrics_torn_or_a_folder(make_config):
    """45. A metrics.jsonl torn within a letter is mended; a folder of that name is an error with exit code 7."""
    run_training(make_config(train={"steps": 1}), fresh=False)
    metrics = folder(make_config()) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + '{"step": 2, "samples": ["ü'.encode()[:-1])
    run_training(make_config(train={"steps": 2}), fresh=False)
    assert [record["step"] for record in read_records(metrics)] == [1, 2]
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(DiskError, match=r"metrics.jsonl: cannot be read"):
        run_training(make_config(train={"steps": 3}), fresh=False)


@pytest.mark.slow
def test_metrics_with_foreign_lines(make_config):
    """45. A line of metrics.jsonl that this program did not write is left out."""
    config = make_config(train={"steps": 1})
    run_training(config, fresh=False)
    foreign = ['{"step": 1, "loss": "low"}', '{"step": true}', "[" * 100_000, '{"loss": 1}', "7"]
    with (folder(config) / "metrics.jsonl").open("a") as file:
        file.write("\n".join(foreign) + "\n")
    run_training(make_config(train={"steps": 2}), fresh=False)
    lines = (folder(config) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_old_checkpoint_goes_later(tmp_path: Path):
    """46. An old checkpoint that cannot be removed is no reason to stop, and goes with the next save."""
    save(tmp_path, 10, 20)
    with fail_at("unlink", 1, PermissionError(errno.EACCES, "Permission denied")) as fault:
        save(tmp_path, 30)
    assert fault.fired == 1
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [30, 20, 10]
    save(tmp_path, 40)
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [40, 30]


def test_old_checkpoint_is_named(make_config, capsys):
    """46. A checkpoint that cannot be removed is named, and the run goes on."""
    config = make_config(train={"steps": 4}, save={"every": 1})
    with fail_at("unlink", 2, PermissionError(errno.EACCES, "Permission denied")) as fault:
        run_training(config, fresh=False)
    assert fault.fired == 1
    assert "step-000001.safetensors: cannot be removed; going on" in capsys.readouterr().out
    assert len(losses(config)) == 4


@pytest.mark.slow
def test_old_export_cannot_be_removed(make_config, monkeypatch, capsys):
    """46. With save.keep 1 and a file that cannot be removed, the run goes on and says so; two checkpoints stay."""
    config = make_config(train={"steps": 4}, save={"every": 1, "keep": 1})
    original, left = atomic.remove, []

    def remove(path: Path) -> bool:
        is_gone = original(path)
        if path.parent.name == "checkpoints":
            left.append(len([checkpoint.load(path) for _, path in checkpoint.steps_in(path.parent)]))
        return is_gone

    monkeypatch.setattr(atomic, "remove", remove)
    with fail_at("unlink", 2, PermissionError(errno.EACCES, "Permission denied")) as fault:
        run_training(config, fresh=False)
    assert fault.fired == 1
    assert "tiny-000001.safetensors: cannot be removed; going on" in capsys.readouterr().out
    assert left == [2, 2]
    assert [path.name for path in sorted((folder(config) / "lora").iterdir())] == [
        "tiny-000003.safetensors",
        "tiny.safetensors",
    ]


@pytest.mark.slow
def test_crash_after_the_checkpoint(make_config, monkeypatch):
    """47. A crash right after a checkpoint loses neither export nor preview: the next start makes up for them."""
    config = make_config(train={"steps": 4}, save={"every": 2}, sample=PREVIEWED)
    with monkeypatch.context() as patch:
        patch.setattr(exports, "export_step", lambda run, step: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            run_training(config, fresh=False)
    run_training(config, fresh=False)
    assert (folder(config) / "lora" / "tiny-000002.safetensors").exists()
    assert (folder(config) / "samples" / "000002-00.png").exists()
    assert facts(config)["starts"] == [0, 2]


@pytest.mark.slow
def test_a_failing_preview_costs_no_step(make_config, monkeypatch, capsys):
    """47. A preview that fails is said and costs no step."""
    config = make_config(train={"steps": 3}, sample=PREVIEWED | {"every": 1})
    monkeypatch.setattr(
        outputs, "sample_all", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("no memory"))
    )
    run_training(config, fresh=False)
    assert "preview at step 0 failed" in capsys.readouterr().out
    assert len(losses(config)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "steps"), [("fp32", 4), ("bf16", 2)])
def test_previews_change_no_bit_of_training(make_config, tmp_path: Path, dtype: str, steps: int):
    """48. Previews on or off, each step or never: training is the same, bit for bit."""
    without = make_config(
        name="run", output_dir=str(tmp_path / "without"), train={"steps": steps}, model={"dtype": dtype}
    )
    one_prompt = PREVIEWED | {"every": 1, "prompts": ["a red zorb"]}
    with_previews = make_config(name="run", train={"steps": steps}, sample=one_prompt, model={"dtype": dtype})
    run_training(without, fresh=False)
    run_training(with_previews, fresh=False)
    assert (folder(with_previews) / "samples" / "000001-00.png").exists()
    assert losses(without) == losses(with_previews)
    assert final(without) == final(with_previews)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_disk_full_for_the_records(make_config, monkeypatch: pytest.MonkeyPatch, name: str):
    """37. A disk that is full when a run opens its records ends it with exit code 7; then the same command goes on."""
    config, open_path, fired = make_config(train={"steps": 2}), Path.open, []

    def opened(path: Path, mode: str = "r", *args, **options):
        if path.name == name and mode == "a" and not fired:
            fired.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return open_path(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DiskError, match=rf"{name}: cannot be written \(the disk is full\)") as error:
        run_training(config, fresh=False)
    assert error.value.exit_code == 7 and len(fired) == 1
    run_training(config, fresh=False)
    assert len(losses(config)) == 2


@pytest.mark.slow
def test_a_volume_that_stalls(make_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """37. A volume that does not answer for a while holds a save up, which is said; the result is the same."""
    options = {"train": {"steps": 3}, "save": {"every": 1}}
    whole, config = make_config(name="whole", **options), make_config(name="stalls", **options)
    run_training(whole, fresh=False)
    assert "to write; the volume of output_dir" not in capsys.readouterr().out
    fsync, stalls = os.fsync, []

    def stalling(file: int) -> None:
        name = Path(f"/proc/self/fd/{file}").resolve().name
        if "step-000002" in name and not stalls:
            stalls.append(name)
            time.sleep(0.5)
        fsync(file)

    monkeypatch.setattr(outputs, "SLOW_SAVE_SECONDS", 0.4)
    monkeypatch.setattr(os, "fsync", stalling)
    run_training(config, fresh=False)
    said = capsys.readouterr().out
    assert len(stalls) == 1 and said.count("step 2: the checkpoint took") == said.count("the checkpoint took") == 1
    assert numbers(config) == numbers(whole) and losses(config) == losses(whole)


def test_a_volume_that_comes_back(tmp_path: Path):
    """37. Records that a volume does not take for a while are written when it takes them again: none is lost."""
    code = """
import resource, signal
from pathlib import Path
from zimage_train.report.metrics import RecordWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))
writer = RecordWriter(Path("metrics.jsonl"), 0)
for step in range(1, 61):
    if step == 20:
        limit(Path("metrics.jsonl").stat().st_size + 7)
    if step == 40:
        print(Path("metrics.jsonl").read_bytes().count(b"\\n"))
        limit(resource.RLIM_INFINITY)
    writer.append({"step": step, "loss": 0.5, "lr": 1e-4})
writer.close()
"""
    result = run_python(code, tmp_path)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "19\n"), "twenty records could not be written"
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 61))
