"""Verdicts on a run come exactly where their bounds say, and each of their settings can be set."""

from typing import Any

import pytest

from zimage_train.config.schema import Config
from zimage_train.planning.suggestions import SettingChange
from zimage_train.planning.verdicts import run_verdicts

STEPS = 100


def config_with(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {"name": "a", "data": [{"folder": "photos", "trigger": "zorb"}], "train": {"steps": STEPS}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


def preview(step: int, shift: float | None, without: float | None = 0.0, drift: float = 0.1) -> dict[str, Any]:
    """The record of the previews of a step."""
    return {
        "step": step,
        "event": "preview",
        "change_with_trigger": shift,
        "change_without_trigger": without,
        "drift": drift,
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (preview(100, 0.0199), "not learning: at step 100 previews with the trigger differ by 0.020"),
        (preview(100, 0.02), None),
        (preview(25, 0.001), "not learning: at step 25"),
        (preview(24, 0.001), None),  # less than a quarter of the run says nothing yet
        (preview(100, 0.5, 0.375), "leaking: at step 100 previews without the trigger changed by 0.375, with it by"),
        (preview(100, 0.5, 0.374), None),
        (preview(100, 0.06, 0.0499), None),  # both small: too early to call it a leak
        (preview(100, 0.06, 0.05), "leaking: "),
        (preview(24, 0.2, 0.19), None),
        (preview(100, None, 0.4), None),
        (preview(100, 0.3, None), None),
        (preview(1, 0.3, drift=0.45), "drifted: at step 1 the LoRA deviates by 0.45"),
        (preview(100, 0.3, drift=0.449), None),
        ({"step": 100, "event": "preview", "pictures": []}, None),
        ({"step": 100, "event": "save"}, None),
        (preview(0, 0.0), None),  # before training
    ],
)
def test_bounds(found: dict[str, Any], expected: str | None):
    verdicts = run_verdicts(config_with(), [found])
    assert len(verdicts) == (expected is not None)
    assert all(str(verdict).startswith(expected or "") for verdict in verdicts)


def test_the_newest_previews_count():
    """A problem that has gone is no verdict any more, and two at once are two."""
    bad, good = preview(50, 0.2, 0.2), preview(75, 0.3, 0.0)
    assert run_verdicts(config_with(), [bad, good]) == []
    both = run_verdicts(config_with(), [good, preview(100, 0.2, 0.2, drift=0.6)])
    assert [verdict.kind for verdict in both] == ["leaking", "drifted"]


def test_the_last_good_step_is_named():
    """The newest step without any verdict at which something was learned; its number of steps is a remedy."""
    events = [preview(10, 0.0), preview(30, 0.1), preview(50, 0.2), preview(75, 0.2, 0.2), preview(100, 0.3, 0.3)]
    (verdict,) = run_verdicts(config_with(lora={"rank": 16}), events)
    assert verdict.good_step == 50
    assert verdict.changes == (SettingChange("train.steps", 50), SettingChange("lora.rank", 8))
    # What was too early to be judged is not called good.
    (verdict,) = run_verdicts(config_with(), [preview(20, 0.3, 0.3), preview(75, 0.2, 0.2)])
    assert verdict.good_step is None and verdict.changes == (SettingChange("lora.rank", 8),)


@pytest.mark.parametrize(
    ("sections", "found", "expected"),
    [
        ({"optimizer": {"lr": 1e-4}}, preview(100, 0.0), [("optimizer.lr", pytest.approx(1.5e-4))]),
        # A higher rate would break Turbo, and Prodigy finds its own.
        ({"optimizer": {"lr": 1.5e-4}}, preview(100, 0.0), [("train.steps", 2 * STEPS)]),
        ({"optimizer": {"name": "prodigy", "lr": 1.0}}, preview(100, 0.0), [("train.steps", 2 * STEPS)]),
        (
            {"optimizer": {"lr": 1.5e-4}, "model": {"variant": "base"}},
            preview(100, 0.0),
            [("optimizer.lr", pytest.approx(2.25e-4))],
        ),
        ({"lora": {"rank": 4}}, preview(100, 0.2, 0.2), []),
        ({"lora": {"rank": 6}}, preview(100, 0.2, 0.2), [("lora.rank", 4)]),
        ({"optimizer": {"lr": 1e-4}}, preview(100, 0.2, drift=0.5), [("optimizer.lr", 5e-5)]),
        ({"model": {"adapter": None}}, preview(100, 0.2, drift=0.5), [("model.adapter", "v2")]),
    ],
)
def test_remedies(sections: dict[str, Any], found: dict[str, Any], expected: list[tuple[str, Any]]):
    """Each remedy is a setting that the config takes."""
    config = config_with(**sections)
    (verdict,) = run_verdicts(config, [found])
    assert [(change.key, change.value) for change in verdict.changes] == expected
    for change in verdict.changes:
        section, name = change.key.split(".")
        values = config.model_dump(exclude_defaults=True)
        values[section] = values.get(section, {}) | {name: change.value}
        Config.model_validate(values)


def test_methods_that_keep_images():
    """A LoRA that should leave images as they are is not blamed for doing so."""
    config = config_with(train={"method": "trajectory_imitation"}, lora={"init_from": "a.safetensors"})
    assert run_verdicts(config, [preview(100, 0.0, drift=0.6)]) == []
