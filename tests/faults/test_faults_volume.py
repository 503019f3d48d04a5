"""A network volume that stalls, and one that comes back; for one that fails, see test_faults_checkpoint.py."""

import os
import time
from pathlib import Path

import pytest

from zimage_train.commands.train import run_training
from zimage_train.report.metrics import read_records
from zimage_train.training import outputs

from helpers import losses, numbers, run_python


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


def test_records_of_a_volume_that_comes_back(tmp_path: Path):
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
