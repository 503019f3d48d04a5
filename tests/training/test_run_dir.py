"""What a run may be continued with, by the keys that differ."""

from pathlib import Path

import pytest

from zimage_train.errors import ConfigError
from zimage_train.training import run_dir
from zimage_train.training.run_dir import RunDir

FOLDER = RunDir(Path("runs/a"), "a")


def refused(old: dict, new: dict, *allow: str) -> list[str | None]:
    """The keys that are refused, when settings differ so."""
    with pytest.raises(ConfigError) as caught:
        run_dir.require_same(FOLDER, {"settings": old, "inputs": {}}, {"settings": new, "inputs": {}}, allow)
    *changed, last = caught.value.problems
    assert last.code == "another-run" and {one.code for one in changed} == {"changed-on-resume"}
    return [one.place.key for one in changed]


@pytest.mark.parametrize(
    "allow", ["optimizer.lr", "schedule", "data", "timesteps", "data.0.flip", "schedule.params.power"]
)
def test_allow_takes_settings_and_sections(allow: str):
    """A setting or a section that training steps read can be allowed."""
    run_dir.require_allowable([allow])


@pytest.mark.parametrize("allow", ["", "optimizer", "optimizer.l", "optimizer.lr.x", "sched", "data.0", "database"])
def test_allow_needs_a_whole_key(allow: str):
    """Only a whole key can be allowed."""
    with pytest.raises(ConfigError) as caught:
        run_dir.require_allowable([allow])
    (problem,) = caught.value.problems
    assert problem.code == "not-allowable" and all(one in problem.hint for one in run_dir.ALLOWABLE)


def test_allow_covers_a_section():
    """A section allows its keys, and a key allows itself alone."""
    old, new = {"schedule.name": "linear", "data.0.flip": False}, {"schedule.name": "rex", "data.0.flip": True}
    assert refused(old, new) == ["data.0.flip", "schedule.name"]
    assert refused(old, new, "schedule") == ["data.0.flip"]
    assert refused(old, new, "data.0.flip") == ["schedule.name"]
    assert refused(old, new, "data.0", "sched") == ["data.0.flip", "schedule.name"]
    before, now = ({"settings": one, "inputs": {}} for one in (old, new))
    assert len(run_dir.require_same(FOLDER, before, now, ("schedule", "data"))) == 2


def test_allow_is_offered_where_possible():
    """`--allow` is suggested only for settings that can be allowed."""
    with pytest.raises(ConfigError, match="--allow schedule"):
        run_dir.require_same(
            FOLDER, {"settings": {"schedule.name": 1}, "inputs": {}}, {"settings": {"schedule.name": 2}, "inputs": {}}
        )
    with pytest.raises(ConfigError) as caught:
        run_dir.require_same(
            FOLDER, {"settings": {"lora.rank": 1}, "inputs": {}}, {"settings": {"lora.rank": 2}, "inputs": {}}
        )
    assert "--allow" not in str(caught.value)


def test_paths_are_compared_by_content():
    """A path may be written in another way, even if an earlier checkpoint holds it as a setting."""
    old = {"settings": {"data.0.prompts": "a.txt", "lora.rank": 4}, "inputs": {}}
    now = {"settings": {"lora.rank": 4}, "inputs": {}}
    assert run_dir.require_same(FOLDER, old, now) == []


def test_settings_of_a_later_version():
    """A checkpoint from before a setting goes on while that is at its default, and not if it has another value."""
    old = {"lora.rank": 4, "data.0.flip": False, "data.1.flip": False}
    now = old | {"lora.type": "lora", "timesteps.shift": None, "loss.type": "mse", "data.1.weight": 1.0}
    assert run_dir.require_same(FOLDER, {"settings": old, "inputs": {}}, {"settings": now, "inputs": {}}) == []
    assert refused(old, now | {"lora.type": "lokr", "data.1.weight": 2.0}) == ["data.1.weight", "lora.type"]
    assert refused(now, old) == ["data.1.weight", "lora.type", "loss.type"]
