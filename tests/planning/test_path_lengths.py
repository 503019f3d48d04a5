"""Windows opens no path of more than 259 characters: told by `check`, not after hours; simulated on this system."""

import re
from pathlib import Path
from typing import Any

import pytest

from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.io import atomic, operating_system
from zimage_train.planning import path_lengths, preflight


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_system, "SYSTEM", "win32")


def settings_of_length(tmp_path: Path, setting: str, characters: int) -> dict[str, Any]:
    """Settings in which the output folder, the name or the cache folder is so long."""
    if setting == "name":
        return {"name": "n" * characters}
    folder = str(tmp_path / "x").ljust(characters, "x")
    return {"output_dir": folder} if setting == "output_dir" else {"cache": {"folder": folder}}


def longest(config: Config) -> int:
    root = (Path(config.output_dir) / config.name).absolute()
    return max(map(path_lengths._length, path_lengths._paths_in_run(config, root)))


@pytest.mark.parametrize(("setting", "characters"), [("output_dir", 240), ("name", 190), ("cache", 240)])
def test_path_too_long_for_windows(make_config, tmp_path: Path, windows: None, setting: str, characters: int):
    """A path that Windows cannot open is refused, with its length."""
    config = make_config(**settings_of_length(tmp_path, setting, characters))
    with pytest.raises(ConfigError) as caught:
        preflight.check_run(config)
    assert caught.value.exit_code == 2
    said = re.search(r"would have (\d+) characters, and Windows opens 259; shorten (.*) by (\d+)$", str(caught.value))
    assert said is not None, str(caught.value)
    length, what, excess = int(said[1]), said[2], int(said[3])
    assert what == ("cache.folder" if setting == "cache" else "output_dir or name") and length == 259 + excess
    # A name stands in the path twice, as the folder of the run and in the name of its LoRA.
    shorter = characters - ((excess + 1) // 2 if setting == "name" else excess)
    path_lengths.require_short_paths(make_config(**settings_of_length(tmp_path, setting, shorter)))
    with pytest.raises(ConfigError):
        path_lengths.require_short_paths(make_config(**settings_of_length(tmp_path, setting, shorter + 1)))


def test_rare_characters_count_twice(make_config, tmp_path: Path, windows: None):
    plain, rare = (make_config(output_dir=str(tmp_path / (letter * 30))) for letter in "x𠀀")
    assert longest(rare) - longest(plain) == 30


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_elsewhere_a_path_may_be_long(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str):
    monkeypatch.setattr(operating_system, "SYSTEM", system)
    path_lengths.require_short_paths(make_config(**settings_of_length(tmp_path, "output_dir", 300)))


@pytest.mark.slow
def test_written_paths_are_predicted(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The longest path that a run writes is the predicted path.

    The name is as long as the rest of the path, and every file that the run opens to write is counted.
    """
    config = make_config(
        name="n" * 60,
        train={"steps": 2},
        save={"every": 1},
        ema={"decay": 0.9},
        sample={"every": 1, "prompts": ["a"], "width": 64, "height": 64},
        log={"tensorboard": True},
    )
    written: list[Path] = []
    original = atomic.temporary_path

    def noted(path: Path) -> Path:
        written.append(original(path).absolute())
        return original(path)

    monkeypatch.setattr(atomic, "temporary_path", noted)
    run_training(config, fresh=False)
    root = (Path(config.output_dir) / config.name).absolute()
    found = [path for path in [*written, *root.rglob("*")] if path.is_relative_to(root)]
    assert max(map(path_lengths._length, found)) == longest(config)
