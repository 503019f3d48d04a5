"""The `sample` command says of its options what a config would say of its settings."""

from pathlib import Path

import pytest

from zimage_train.commands.sample import locate_model
from zimage_train.config.schema import ModelSettings
from zimage_train.errors import Argument, Problem, WeightsError


def problem_of(**settings: str) -> Problem:
    with pytest.raises(WeightsError) as caught:
        locate_model(ModelSettings(**settings))  # type: ignore[arg-type]
    return caught.value.problems[0]


def test_missing_model_names_the_argument(tmp_path: Path):
    """A model that is missing is an error of the argument."""
    problem = problem_of(path=str(tmp_path / "gone.safetensors"))
    place = problem.place
    assert (problem.code, place.argument, place.key) == ("missing-file", Argument("MODEL"), None)
    assert str(problem).startswith(f"MODEL: {tmp_path / 'gone.safetensors'}: does not exist; ")


def test_missing_extras_name_the_option(tmp_path: Path):
    """Extras that are missing are an error of the option."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    problem = problem_of(path=str(tmp_path / "model"), extras="./nowhere")
    assert (problem.code, problem.place.argument) == ("missing-file", Argument("--extras"))
    what = "the text encoder and VAE of ./nowhere is neither a path that exists nor a hub id"
    assert str(problem) == f"--extras: {what}; give a folder or hub id that has them"
