"""Any config that the schema allows: stopped and continued it ends as in one go, and all that is said names its keys.

`ANY_CONFIGS=300 pytest tests/end_to_end/test_any_config.py` draws as many at random.
"""

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from zimage_train.commands.check import check_report
from zimage_train.commands.train import run_training
from zimage_train.config.key_names import is_setting
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.errors import Problem, Stopped, ZImageTrainError
from zimage_train.models.locate import cached_only
from zimage_train.planning import preflight
from zimage_train.planning.config_warnings import config_warnings
from zimage_train.planning.preflight import RunSpec
from zimage_train.report.metrics import read_records
from zimage_train.training import loop

from config_texts import OPTIONS
from drawn_configs import drawn_values
from helpers import folder
from injection import Crash

EXAMPLES = int(os.environ.get("ANY_CONFIGS", "0"))
SECTIONS = "|".join(name for name in Config.model_fields if Config.model_fields[name].annotation is not str)
_KEY = re.compile(rf"(?<![\w/.\-\[])((?:{SECTIONS})(?:\.(?:\d+|\*|N|[a-z_]+))+)(?![\w/*]|\.[a-z])")
_FILES = (".png", ".safetensors", ".txt", ".json", ".jsonl", ".yaml", ".html")
TIMED = ("seconds", "gb")


def require_keys(text: str) -> None:
    """Every key of the config that stands in `text` is that of a setting or a section."""
    for key in _KEY.findall(text):
        if key.endswith(_FILES):
            continue
        name = re.sub(r"\.(\*|N)(?=\.|$)", ".0", key)
        is_section = any(re.sub(r"\[\]", ".0", known).startswith(f"{name}.") for known in OPTIONS)
        assert is_setting(name) or is_section, f"{key}, of {text!r}, is no setting"


def require_keys_of(problem: Problem) -> None:
    assert problem.code and problem.message
    if problem.place.key:
        require_keys(problem.place.key)
    require_keys(f"{problem.message}; {problem.hint}")


def require_sound_warnings(config: Config, spec: RunSpec) -> None:
    """Warnings and notes name keys that exist, and a warning is gone after the changes that it proposes."""
    for line in check_report(spec):
        require_keys(line)
    for is_small in (True, False):
        for warning in config_warnings(config, sum(map(len, spec.images)), is_small):
            require_keys(warning.text)
            values = config.model_dump()
            for change in warning.changes:
                assert is_setting(change.key.replace(".*.", ".0.")), change
                target: Any = values
                *sections, last = change.key.split(".")
                for section in sections:
                    target = target[section]
                target[last] = change.value
            if warning.changes:
                changed, problems = validate_config(values, str)
                assert changed is not None, (warning, problems)
                left = [other.text for other in config_warnings(changed, sum(map(len, spec.images)), is_small)]
                assert warning.text not in left, warning


def outcome(config: Config, monkeypatch: pytest.MonkeyPatch, end_at: int | None, is_crash: bool) -> Any:
    """Train, in two starts if `end_at` is a step; return files and records, or the texts of the refusal."""
    try:
        if end_at is not None:
            with monkeypatch.context() as patch:
                end_in(patch, end_at, is_crash)
                with pytest.raises((Stopped, Crash)):
                    run_training(config, fresh=False)
        run_training(config, fresh=False)
    except ZImageTrainError as error:
        for problem in error.problems:
            require_keys_of(problem)
        return [(problem.code, problem.place.key, problem.message) for problem in error.problems]
    root = folder(config)
    files = {path.relative_to(root): path.read_bytes() for path in sorted(root.glob("lora/**/*.safetensors"))}
    records: list[dict[str, Any]] = []
    for record in read_records(root / "metrics.jsonl"):
        records.append({key: value for key, value in record.items() if key not in TIMED})
    return files, records


def end_in(monkeypatch: pytest.MonkeyPatch, step: int, is_crash: bool) -> None:
    """Let the run end after `step`: asked to, which saves it, or at once."""
    original = loop.prefetch

    def prefetch(run: Any) -> Any:
        for at, loaded in original(run):
            if is_crash and at > step:
                raise Crash
            if at == step and not is_crash:
                run.stop.signal_number = 15
            yield at, loaded

    monkeypatch.setattr(loop, "prefetch", prefetch)


@pytest.mark.slow
def test_any_config(tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]):
    """Any config that is accepted trains to the same bytes in one start and in two; at least two of five are."""
    counts: Counter[str] = Counter()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    size = {"max_examples": EXAMPLES} if EXAMPLES else {"max_examples": 40, "derandomize": True}

    @settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=checks, **size)
    @given(values=drawn_values(tmp_path / "runs", shared_cache), step=st.integers(1, 3), is_crash=st.booleans())
    def run(values: dict[str, Any], step: int, is_crash: bool) -> None:
        config, problems = validate_config(values, lambda path: ".".join(map(str, path)))
        if config is None:
            counts["refused"] += 1
            for problem in problems:
                require_keys(f"{problem.location} {problem.message}; {problem.hint}")
            return
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        with pytest.MonkeyPatch.context() as monkeypatch:
            whole = outcome(config, monkeypatch, None, is_crash)
            if isinstance(whole, list):
                counts["refused"] += 1
                assert outcome(config, monkeypatch, None, is_crash) == whole
                return
            counts["trained"] += 1
            require_sound_warnings(config, preflight.check_run(config, cached_only))
            shutil.rmtree(tmp_path / "runs")
            parts = outcome(config, monkeypatch, step, is_crash)
        assert parts == whole
        require_keys(capsys.readouterr().out)

    run()
    assert 5 * counts["trained"] >= 2 * counts.total(), counts


@pytest.mark.slow
def test_stopped_within_the_first_step(make_config, monkeypatch: pytest.MonkeyPatch):
    """A run that was asked to stop between the batches of its first step has nothing to save, and begins anew."""
    config = make_config(train={"steps": 2, "batch_size": 1, "grad_accumulation": 2})
    files, records = outcome(config, monkeypatch, 1, is_crash=False)
    assert len(files) == 1 and [record["step"] for record in records] == [1, 2]
