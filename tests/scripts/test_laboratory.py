"""The laboratory's arithmetic, and the fits that make the miniature: what its figures rest on."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laboratory import running, telling
from laboratory.statistics import apart, interval, orders, rank_correlation
from miniature.fitting import Fit

values = st.integers(-1000, 1000)


def test_an_interval_is_students() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx([2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-3)
    assert interval([0.4]) == [0.4, 0.4, 0.4]


def test_intervals_cover_95_percent() -> None:
    """Intervals contain the true value nineteen times in twenty."""
    draw = np.random.default_rng(1)
    found = [interval(list(draw.normal(5, 2, 3))) for _ in range(4000)]
    assert 0.94 < np.mean([low <= 5 <= high for _, low, high in found]) < 0.96


def test_orders_only_of_distinct_pairs() -> None:
    """Only pairs whose intervals are distinct have an order."""
    table = {"a": [0.1, 0.0, 0.2], "b": [0.3, 0.25, 0.35], "c": [0.32, 0.2, 0.44]}
    assert orders(table) == [("a", "b")]
    assert apart(table["a"], table["b"]) and not apart(table["b"], table["c"]) and not apart(table["a"], table["c"])


@given(st.lists(st.tuples(values, values), min_size=3, max_size=20))
def test_rank_correlation_sees_order_alone(pairs: list[tuple[int, int]]) -> None:
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    found = rank_correlation(xs, ys)
    assert -1 - 1e-9 <= found <= 1 + 1e-9
    assert rank_correlation([x**3 for x in xs], ys) == pytest.approx(found)
    if len(set(xs)) == len(xs):
        assert rank_correlation(xs, xs) == pytest.approx(1)
        assert rank_correlation(xs, [-x for x in xs]) == pytest.approx(-1)


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)


def scores(use: str, seed: int, shot: int, quality: float) -> dict:
    each = dict.fromkeys([*telling.SCORES, "quality_8"], 0.5)
    return {**each, "use": use, "seed": seed, "shot": shot, "quality_8": quality}


def test_drift_is_relative_to_turbo() -> None:
    """Drift is the difference from Turbo with the same noise."""
    found = telling.with_drift(
        {"a": scores("turbo", 0, 1, 0.8), "b": scores("turbo", 0, 2, 0.4), "c": scores("direct", 5, 2, 0.3)}
    )
    assert [round(one["drift"], 6) for one in found] == [0, 0, 0.25]


# Fits


def line(name: str, state: Path, stop_at: int | None = None) -> torch.Tensor:
    """Fits a matrix to noise that each step draws anew; stopped by its loss at `stop_at`."""
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(6, 5))
    bias = torch.nn.Parameter(torch.zeros(6))
    fit = Fit(name, [weight, bias], 40, 1e-2, muon=0.01)

    def loss(chance: random.Random) -> torch.Tensor:
        if fit.done == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 5) * chance.random()
        return (x @ weight.T + bias - x.sum(1, keepdim=True)).square().mean()

    fit.run(loss, state)
    return torch.cat([weight.detach().flatten(), bias.detach()])


def test_fit_resumes_to_the_same_end(tmp_path: Path, monkeypatch) -> None:
    """A fit that was interrupted ends where an undisturbed fit does."""
    monkeypatch.setattr("miniature.fitting.SAVE_EVERY", 0.0)
    whole = line("whole", tmp_path / "whole.state")
    with pytest.raises(KeyboardInterrupt):
        line("whole", tmp_path / "cut.state", stop_at=23)
    assert (tmp_path / "cut.state").exists()
    assert torch.equal(line("whole", tmp_path / "cut.state"), whole)
    assert not list(tmp_path.iterdir())
    assert not torch.equal(line("other", tmp_path / "other.state"), whole)


def test_imitation_outdated_by_its_start(tmp_path: Path) -> None:
    """An imitation is outdated once the LoRA that it began with is trained again."""
    first = tmp_path / "first.safetensors"
    config = {"name": "x", "output_dir": str(tmp_path), "lora": {"init_from": str(first)}}
    running.lora_of(config).parent.mkdir(parents=True)
    for path, seconds in ((first, 100), (running.lora_of(config), 200)):
        path.touch()
        os.utime(path, (seconds, seconds))
    assert not running.is_outdated(config) and not running.is_outdated(config | {"lora": {}})
    os.utime(first, (300, 300))
    assert running.is_outdated(config)
