"""What a GPU is asked can be asked on a CPU first, and whatever befalls a part leaves the others' answers whole."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import gpu_checks
from gpu_parts import runner
from gpu_parts.parts import ALLOCATORS, BUDGETS, PARTS, WAYS, Budget, Part, pixels, split
from gpu_parts.records import Records, Stamp
from gpu_parts.runner import child_environment
from helpers import ROOT

STAMP = Stamp("2.99", None, "a card", dry=True)
PARTS_FOR_TESTS = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path

    import gpu_checks
    from gpu_parts.parts import Part

    HERE = Path(__file__).parent

    def measure(case, dry):
        with (HERE / "asked.txt").open("a") as asked:
            asked.write(case + "\\n")
        if case == "raises" and not (HERE / "mended").exists():
            raise ValueError("no such kernel")
        if case == "dies":
            print("a last word", file=sys.stderr, flush=True)
            os._exit(9)
        if case == "hangs":
            time.sleep(60)
        return {"dry_told": dry, "variable": os.environ.get("FOR_A_TEST")}

    def part(*cases, limit=30, **others):
        return Part("for tests", "parts_for_tests:measure", ("real",), cases, limit, **others)

    PARTS = {
        "raising": part("raises", "after it raised"),
        "dying": part("dies", "after it died"),
        "hanging": part("hangs", "no time for it", limit=1.5),
        "missing": Part("for tests", "no_such_module:measure", (), ("cannot", "be imported"), 30),
        "apart": part(
            "one", "hangs", "other", case_limit_s=1.5, environment={"one": {"FOR_A_TEST": "1"}}
        ),
    }
    if __name__ == "__main__":
        sys.exit(gpu_checks.main(sys.argv[1:], PARTS, Path(__file__)))
""")


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "scripts", script.parent)))}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def read(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "dry" / f"{part}.json").read_text())["cases"]


@pytest.mark.slow
def test_parts_run_dry_and_once(tmp_path: Path, forking_python: str, monkeypatch: pytest.MonkeyPatch):
    """Every part runs dry, and a second call skips it."""
    monkeypatch.setattr(sys, "executable", forking_python)  # each of its cases has a process of its own
    script = ROOT / "scripts" / "gpu_checks.py"
    first = run(script, "--dry", "--out", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dry"]  # nothing where real results would be
    for name, part in PARTS.items():
        if not part.dry_cases:
            continue
        cases = read(tmp_path, name)
        assert tuple(cases) == part.dry_cases
        for record in cases.values():
            assert record["dry"] is True and record["card"] == "cpu" and record["torch"] and "triton" in record
            assert "error" not in record
    for record in read(tmp_path, "fused").values():
        assert record["fused"]["same_bits"] and record["modules"]["same_bits"] and not record["has_kernels"]
        assert record["loss_off"] < 1e-2 and 0 < record["gradients_off"] < 5e-2  # in bf16
    captured = read(tmp_path, "captured")
    assert captured.pop("ten shapes")["grows"] is False
    for record in captured.values():
        assert record["captured"]["same_bits"] and record["captured"]["failure"] is None
        assert record["eager"]["ms"] > 0
    timed = list(read(tmp_path, "speed").values())
    assert all(record["rows"][0]["unit"] == "times" and record["rows"][0]["bound"] == 0.5 for record in timed)
    assert [record["rows"][0]["claim"].endswith("LoKr") for record in timed] == [False, True]
    attention = {split(case)[1]: record for case, record in read(tmp_path, "attention").items()}
    computed = [record for record in attention.values() if "not_installed" not in record]
    assert len(computed) >= 8 and all(record["off_fp32"] < 0.01 and record["same_bits"] for record in computed)
    assert all(record["ran"] and record["loss"] > 0 for record in read(tmp_path, "budgets").values())
    product = read(tmp_path, "product")
    assert product["1024_again"]["lora_sha256"] == product["1024_continued"]["lora_sha256"]
    assert product["1024_again"]["stages"]["found"]["steps"] > 0 and product["sample"]["exit_code"] == 0

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dry").iterdir()}
    second = run(script, "--dry", "--out", str(tmp_path))
    assert second.returncode == 0 and second.stdout.count("skipped") == len(PARTS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dry").iterdir()} == before


@pytest.mark.slow
def test_part_that_fails(tmp_path: Path):
    """A part that fails is recorded, and the others run."""
    script = tmp_path / "parts_for_tests.py"
    script.write_text(PARTS_FOR_TESTS)
    done = run(script, "--dry", "--out", str(tmp_path))
    assert done.returncode == gpu_checks.FAILED, done.stderr
    raising, dying, hanging = (read(tmp_path, part) for part in ("raising", "dying", "hanging"))
    assert raising["raises"]["error"] == "ValueError: no such kernel"
    assert raising["after it raised"]["dry_told"] is True
    assert dying["dies"]["error"] == "exit code 9: a last word"
    assert "error" not in dying["after it died"]
    assert hanging["hangs"]["error"].startswith("time limit of ") and hanging["hangs"]["torch"]
    assert "no time for it" not in hanging and "no time was left for 1 cases" in done.stdout
    missing = [record["error"] for record in read(tmp_path, "missing").values()]
    assert missing == ["ModuleNotFoundError: No module named 'no_such_module'"] * 2
    apart = read(tmp_path, "apart")
    assert apart["one"]["variable"] == "1" and apart["other"]["variable"] is None
    assert "time limit" in apart["hangs"]["error"]

    (tmp_path / "mended").touch()
    (tmp_path / "asked.txt").unlink()
    assert run(script, "raising", "--dry", "--out", str(tmp_path)).returncode == 0
    assert (tmp_path / "asked.txt").read_text() == "raises\n"  # what had a result is not asked again
    assert "error" not in read(tmp_path, "raising")["raises"]


@pytest.mark.slow
def test_no_gpu_is_one_line(tmp_path: Path, monkeypatch, capsys):
    """Without a GPU there is a single line and exit code 2."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_checks.main(["--out", str(tmp_path / "out")]) == gpu_checks.NO_GPU == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "--dry" in said.err
    assert not (tmp_path / "out").exists()


def test_list_of_parts_and_limits(capsys):
    """The list names every part with its time limit."""
    assert gpu_checks.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, part) in zip(lines, PARTS.items(), strict=True):
        assert line.split()[0] == name and f"{part.limit_s:g} s" in line and part.shows in line


def test_lost_gpu_needs_another_process(tmp_path: Path, monkeypatch):
    """After an error that loses the GPU, another process runs the remaining parts."""
    script = tmp_path / "parts_that_lose.py"
    script.write_text("def measure(case, dry):\n    raise RuntimeError('CUDA error: an illegal access')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runner, "_device_answers", lambda: False)
    part = Part("for a test", "parts_that_lose:measure", (), ("a", "b"), 30)
    begun: list[list[str]] = []

    def start(self: runner.Watch, name: str, cases: list[str], *others: object) -> subprocess.CompletedProcess[str]:
        begun.append(cases)
        code = runner.measure(name, part, cases, Records(self.folder / f"{name}.json"), self.stamp)
        return subprocess.CompletedProcess([], code, stderr="")

    monkeypatch.setattr(runner.Watch, "_start", start)
    assert not runner.Watch(script, tmp_path, STAMP).run("losing", part)
    assert begun == [["a", "b"], ["b"]]
    errors = {case: record["error"] for case, record in Records(tmp_path / "losing.json").read().items()}
    assert errors == dict.fromkeys("ab", "RuntimeError: CUDA error: an illegal access")


def test_part_that_does_not_exist(capsys):
    """A part that does not exist is refused."""
    with pytest.raises(SystemExit, match="2"):
        gpu_checks.main(["graphs"])
    assert "no part is called graphs; there are facts, fused, captured," in capsys.readouterr().err


def test_the_table_can_be_run_as_it_stands():
    assert all(part.limit_s < 480 for part in PARTS.values())
    assert all(sum(way.heads) == 30 for way in WAYS.values() if way.heads is not None)
    assert len(PARTS["budgets"].cases) == len(set(PARTS["budgets"].cases)) == 36 + 9
    assert all(Budget.named(split(case)[0]) in BUDGETS for case in PARTS["budgets"].cases)
    assert all(split(case)[1] in ALLOCATORS for case in PARTS["budgets"].cases)
    sizes = [split(case)[0] for case in PARTS["speed"].cases]
    assert sizes.pop(3) == "mixed" and list(map(pixels, sizes)) == [512, 768, 1024, 512, 512, 1024]
    for part in PARTS.values():
        assert part.case_limit_s is not None or not part.environment


def test_budgets_are_those_measured():
    """The budgets that are tried again are those of docs/bench/memory.json."""
    measured = json.loads((ROOT / "docs" / "bench" / "memory.json").read_text())["runs"]
    assert {(budget.gb, budget.side_px) for budget in BUDGETS} == {
        (one["budget_gb"], one["side_px"]) for one in measured
    }
    assert len(BUDGETS) == len(measured) == 36


def test_allocator_setting_is_cleared(monkeypatch):
    """An allocator setting of the shell does not reach the case `as is`."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in child_environment(ALLOCATORS["as is"], dry=False)
    expandable = child_environment(ALLOCATORS["expandable"], dry=True)
    assert expandable["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert expandable["CUDA_VISIBLE_DEVICES"] == "" and expandable["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_records_forget_failures_only(tmp_path: Path):
    """Records keep earlier results, and forget only failures."""
    records = Records(tmp_path / "part.json")
    assert records.missing(["a", "b"]) == ["a", "b"]
    records.note("a", {"ms": 1.0}, STAMP)
    records.note("b", {"error": "late"}, STAMP)
    assert records.read()["a"] == {"torch": "2.99", "triton": None, "card": "a card", "dry": True, "ms": 1.0}
    records.forget_failures()
    assert records.missing(["a", "b"]) == ["b"]


def test_killed_writer_keeps_the_records(tmp_path: Path, monkeypatch):
    """A run that is killed while it writes leaves the file as it was."""
    records = Records(tmp_path / "part.json")
    records.note("a", {"ms": 1.0}, STAMP)

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            records.note("b", {"ms": 2.0}, STAMP)
    assert list(records.read()) == ["a"]
