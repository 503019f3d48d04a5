"""The proof table: each setting changes the number that its row names, as predicted, and its neutral value no bit.

The rows are in scripts/proofs. Beside them: memory settings change no bit whatever else is set, and a run with
everything continues bit for bit.
"""

import json
from typing import Any

import pytest

from helpers import ROOT, losses, run_in_two_starts
from proofs.page import FILE
from proofs.proving import prove
from proofs.rows import ANOTHER, Number, Row, becomes
from proofs.table import ROWS, choices_of, plain_key, settings
from proofs.trials import COMMON, Trial, Trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """The runs of the table, each made once."""
    return Trials(tmp_path_factory.mktemp("trials"))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_setting_does_what_it_says(quick_fp8: None, trials: Trials, row: Row):
    """The number is as expected, the LoRA another or the same, and the neutral value changes no bit."""
    assert prove(row, trials).failures == []


def test_every_setting_has_a_row():
    """A setting of the schema without a row fails, and so does a row of a setting that is gone."""
    known = {key for key, _ in settings()}
    assert known - {plain_key(row.key) for row in ROWS} == set()
    assert {plain_key(row.key) for row in ROWS} - known == set()


def test_every_choice_has_a_row():
    """Each value of an enumeration is tried, or is what the runs without the setting have."""
    missing: dict[str, set[Any]] = {}
    for key, field in settings():
        tried = {COMMON.get(key)} | ({field.default} if isinstance(field.default, str | bool | None) else set())
        for row in ROWS:
            values = [*row.with_it.items(), *row.given.items()]
            tried |= {value for name, value in values if plain_key(name) == key and isinstance(value, str | bool)}
        if choices_of(field.annotation) - tried:
            missing[key] = choices_of(field.annotation) - tried
    assert missing == {}


def test_all_rows_have_been_measured():
    """The numbers in the docs are of the rows as they are; scripts/proof_table.py measures them."""
    found = json.loads(FILE.read_text())
    assert {label: entry["expected"] for label, entry in found.items()} == {
        row.label: row.expected.text for row in ROWS
    }
    assert len({row.label for row in ROWS}) == len(ROWS)


def test_rows_for_a_gpu_are_listed():
    """What a row leaves to a GPU stands in the list of what has not been tested."""
    untested = " ".join((ROOT / "docs" / "untested.md").read_text().split())
    assert [row.label for row in ROWS if row.gpu and row.gpu not in untested] == []


@pytest.mark.slow
def test_rows_can_fail(trials: Trials):
    """A wrong prediction, a setting without effect, and a neutral value that is none are found."""
    rate = Number("learning rates", lambda trial: [record["lr"] for record in trial.records])
    ignored = Row("optimizer.lr", 1e-3, rate, ANOTHER)
    assert len(prove(ignored, trials).failures) == 2
    wrong = Row("optimizer.lr", 2e-3, rate, becomes([3e-3, 3e-3]), neutral=4e-3)
    assert len(prove(wrong, trials).failures) == 2
    meddling = Row("optimizer.lr", 2e-3, rate, becomes([2e-3, 2e-3]), lora="same")
    assert prove(meddling, trials).failures == ["the LoRA is another"]


EVERYTHING: dict[str, Any] = {
    "data.0.mask": "{half}",
    "data.0.mask_prior": 0.5,
    "data.1.folder": "{class}",
    "data.1.resolution": [64],
    "data.1.regularization": "prior",
    "preserve.kind": "trigger",
    "preserve.class_word": "circle",
    "guidance.contrastive": 1.5,
    "guidance.differential": 2.0,
    "guidance.contrastive_schedule": "sigma",
    "guidance.cfg_zero": True,
    "loss.type": "huber",
    "loss.delta": 0.5,
    "loss.detail": 2.0,
    "loss.min_snr": 5.0,
    "timesteps.type": "linear",
    "ema.decay": 0.9,
    "train.grad_accumulation": 2,
}


@pytest.mark.slow
def test_memory_settings_change_no_bit(trials: Trials):
    """Streaming and recomputation change no bit, with all parts of the loss.

    Passes without the LoRA and without a gradient come between those that recompute and stream.
    """
    plain = trials.run(EVERYTHING).numbers
    for offload, mode in ((0.5, "auto"), (1.0, "full"), (0.0, "w1w3")):
        memory = {"memory.offload": offload, "memory.checkpointing": mode}
        assert trials.run(EVERYTHING | memory).numbers == plain, memory


@pytest.mark.slow
def test_run_with_everything_resumes(trials: Trials, monkeypatch):
    """A run with every setting continues bit for bit."""
    own = {"data.0.shuffle_tags": True, "data.0.flip": True, "train.steps": 4}
    values = EVERYTHING | own | {"optimizer.name": "prodigy8bit", "optimizer.lr": 1.0}
    whole = trials.run(values)
    stopped = trials.config(values | {"name": "stopped"})
    run_in_two_starts(stopped, monkeypatch)
    assert Trial(stopped).numbers == whole.numbers
    assert losses(stopped) == losses(whole.config)
    preserved = [record["preservation"] for record in whole.records]
    assert len(preserved) == 4 and all(value >= 0 for value in preserved) and preserved[-1] > 0


@pytest.mark.slow
def test_passes_follow_the_settings(trials: Trials):
    """The passes of a run follow its settings."""
    own = {"data.0.flip": True, "data.0.batch_size": 4, "train.steps": 10}
    world = {"data.1.folder": "{class}", "data.1.resolution": [64], "data.1.regularization": True}
    shares = {"data.1.batch_size": 1, "train.regularization_share": 0.3, "preserve.kind": "blank"}
    run = trials.run(own | world | shares)
    assert [len(record["samples"]) for record in run.records].count(1) >= 3
    assert max(len(record["samples"]) for record in run.records) > 2, "the folder's own batch size"
    assert all(record["preservation"] is not None for record in run.records)
    assert run.facts["dataset"]["samples"] == 16 and run.facts["dataset"]["regularisation"] == 8
    report = (run.folder / "report.html").read_text()
    assert "16 samples per epoch" in report and "and 8 regularization images" in report
