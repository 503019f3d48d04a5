"""`doctor`: each verdict, on machines that are described and on this machine."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from zimage_train.cli.app import app
from zimage_train.commands import doctor
from zimage_train.commands.doctor import GpuFacts, SystemFacts

RTX_4090 = GpuFacts("NVIDIA GeForce RTX 4090", 25_757_220_864, 24_800_000_000, (8, 9), True, True)
GOOD = SystemFacts(
    system="Linux",
    machine="x86_64",
    python=(3, 12),
    packages={"torch": ("2.13.0+cu130", ">=2.7"), "peft": ("0.21.2", ">=0.18")},
    torch_cuda="13.0",
    driver="580.65",
    driver_gpu="NVIDIA GeForce RTX 4090",
    gpus=[RTX_4090],
    ram_bytes=64_000_000_000,
    free_bytes={"/home/me": 200_000_000_000, "/home/me/.cache/huggingface/hub": 100_000_000_000},
    has_locks=True,
    downloaded={"Tongyi-MAI/Z-Image-Turbo": True},
    hub_cache="/home/me/.cache/huggingface/hub",
    hub_cache_variable="HF_HOME",
)


def said(facts: SystemFacts, level: str) -> list[str]:
    return [str(one).removeprefix(level).strip() for one in doctor.diagnose(facts) if one.level == level]


def test_a_good_machine_has_nothing_to_mend():
    lines, can_train = doctor.doctor_report(GOOD)
    assert can_train and not said(GOOD, "bad") and not said(GOOD, "note")
    assert lines[-1] == "this machine can train Z-Image (25.76 GB: docs/memory.md says how it fits)"


@pytest.mark.parametrize(
    ("change", "level", "expected"),
    [
        ({"python": (3, 10)}, "bad", "Linux on x86_64, Python 3.10; Python 3.11 or newer is needed"),
        (
            {"system": "Windows"},
            "note",
            "Windows on x86_64, Python 3.12: this system is untested; WSL 2 is safer",
        ),
        (
            {"system": "WSL"},
            "note",
            "when the GPU's memory is full, the driver may use main memory, which is ten times slower; set CUDA",
        ),
        (
            {"packages": {"peft": ("0.9", ">=0.18")}},
            "bad",
            "peft 0.9, and >=0.18 is required; pip install 'peft>=0.18'",
        ),
        ({"packages": {"peft": (None, ">=0.18")}}, "bad", "peft is not installed; pip install 'peft>=0.18'"),
        (
            {"gpus": [], "driver": None},
            "note",
            "no NVIDIA GPU, or no driver for it: the 6 B model cannot be trained here",
        ),
        (
            {"gpus": [], "torch_cuda": None},
            "bad",
            "the driver lists NVIDIA GeForce RTX 4090, but this torch is built without",
        ),
        ({"gpus": []}, "bad", "torch for CUDA 13.0 cannot use the GPU with driver 580.65; update the driver"),
        ({"ram_bytes": 8_000_000_000}, "note", "8.00 GB of main memory; 16 GB are enough for all plans"),
        ({"has_locks": False}, "note", "this disk has no file locks, like some network volumes"),
        ({"downloaded": {"a/b": False}}, "note", "a/b is not on this machine; zimage-train download turbo fetches"),
        ({"environment": {"HF_HUB_OFFLINE": "1"}}, "note", "HF_HUB_OFFLINE is set to 1"),
        ({"free_bytes": {"/x": 10**9}}, "note", "1.00 GB free in /x; checkpoints and caches need some GB"),
    ],
)
def test_troubles_have_verdict_and_fix(change: dict, level: str, expected: str):
    """Each trouble has its verdict and its fix."""
    found = said(replace(GOOD, **change), level)
    assert any(line.startswith(expected) for line in found), found


@pytest.mark.parametrize(
    ("change", "level", "expected"),
    [
        ({"capability": (7, 5), "name": "RTX 2080 Ti"}, "bad", "RTX 2080 Ti (25.76 GB) has no bf16; an RTX 30 series"),
        ({"has_bf16": False}, "bad", "NVIDIA GeForce RTX 4090 (25.76 GB) has no bf16"),
        (
            {"is_compiled_for": False, "capability": (12, 0)},
            "bad",
            "this torch is not compiled for NVIDIA GeForce RTX 4090 (sm_120)",
        ),
        (
            {"free_bytes": 20_000_000_000},
            "note",
            "5.76 GB of NVIDIA GeForce RTX 4090 are in use by other programs; close them",
        ),
        ({"memory_bytes": 6_000_000_000, "free_bytes": 6_000_000_000}, "bad", "6.00 GB of GPU memory are too little"),
        ({"capability": (8, 6)}, "ok", "NVIDIA GeForce RTX 4090, 25.76 GB, bf16; without fp8 arithmetic"),
        ({"name": "NVIDIA Oddity"}, "ok", "NVIDIA Oddity, 25.76 GB, bf16; its speed is not known"),
    ],
)
def test_each_card_has_its_verdict(change: dict, level: str, expected: str):
    found = said(replace(GOOD, gpus=[replace(RTX_4090, **change)]), level)
    assert any(line.startswith(expected) for line in found), found


def test_disk_too_small_for_weights():
    """Weights that do not fit the disk are bad only if they are still to be downloaded."""
    small = {"/home/me/.cache/huggingface/hub": 10_000_000_000}
    missing = replace(GOOD, free_bytes=small, downloaded={"a/b": False})
    (line,) = said(missing, "bad")
    assert line.startswith("10.00 GB free in /home/me/.cache/huggingface/hub, and the weights take 21.10 GB; free some")
    assert said(replace(GOOD, free_bytes=small), "bad") == []


def test_versions_are_compared_as_numbers():
    assert doctor._meets("2.13.0+cpu", ">=2.7") and doctor._meets("0.18", ">=0.18") and doctor._meets("1", "")
    assert not doctor._meets("0.9.5", ">=0.18") and not doctor._meets(None, "")


def test_this_machine_is_judged(tmp_path, monkeypatch):
    """The facts of this machine are found and judged, and no file is left behind."""
    monkeypatch.chdir(tmp_path)
    facts = doctor.gather_facts()
    assert (
        facts.packages["torch"][0] and facts.ram_bytes > 10**8 and facts.has_locks and str(tmp_path) in facts.free_bytes
    )
    assert not any(tmp_path.iterdir()), "it leaves nothing"
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == (0 if facts.gpus else 2)
    lines = done.output.splitlines()
    assert all(line[:4].strip() in ("ok", "note", "bad") for line in lines[: lines.index("")])
