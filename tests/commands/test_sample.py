"""The `sample` command says of its options what a config would say of its settings."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.sample import locate_model
from zimage_train.config.schema import ModelSettings
from zimage_train.errors import Argument, Problem, WeightsError, ZImageTrainError
from zimage_train.models import locate

EXTRAS_HINT = "give a folder or hub id that has them, or --text-encoder, --tokenizer and --vae"


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
    assert str(problem) == f"--extras: {what}; {EXTRAS_HINT}"


def test_extras_lacking_a_part_named_once(tmp_path: Path):
    """Extras that lack a part are named once."""
    problem = problem_of(path=str(mini.TURBO), extras=str(tmp_path))
    what = f"{tmp_path} has no text_encoder, tokenizer, vae"
    assert str(problem) == f"--extras: {what}; {EXTRAS_HINT}"


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae"])
def test_missing_part_names_its_option(part: str):
    """A part that is missing is an error of its own option."""
    problem = problem_of(path=str(mini.TURBO), **{part: "./nowhere"})
    option = f"--{part.replace('_', '-')}"
    assert (problem.code, problem.place.argument, problem.place.key) == ("missing-file", Argument(option), None)
    assert str(problem).startswith(f"{option}: ./nowhere: is neither a path that exists nor a hub id")


def test_parts_are_checked_first(tmp_path: Path):
    """A VAE that cannot be read is refused before anything is drawn, together with other parts."""
    for name in ("x.safetensors", "y.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF" + b"\x01" * 100)
    with pytest.raises(ZImageTrainError) as caught:
        parts = {"text_encoder": str(tmp_path / "x.safetensors"), "vae": str(tmp_path / "y.safetensors")}
        locate_model(ModelSettings.model_validate({"path": str(mini.TURBO), **parts}))
    assert caught.value.exit_code == 4
    assert [str(problem).count("is a GGUF") for problem in caught.value.problems] == [1, 1]


def test_file_that_is_no_model_is_refused(tmp_path: Path, monkeypatch):
    """A file that is no model is refused before anything is downloaded."""
    monkeypatch.setattr(locate, "locate", pytest.fail)
    (tmp_path / "x.safetensors").write_text("hello")
    assert "is not a safetensors file" in str(problem_of(path=str(tmp_path / "x.safetensors")))
    assert "is a LoRA, no transformer" in str(problem_of(path=str(mini.ADAPTER_V1)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--extras", ""], "--extras: is empty; give a folder or hub id, or leave it out"),
        (["--text-encoder", ""], "--text-encoder: is empty; give a folder or hub id, or leave it out"),
        (["--lora", ""], "--lora: is empty; give a LoRA file"),
        (["-o", str(mini.ADAPTER_V1)], f"--output: {mini.ADAPTER_V1} is not a folder; choose another place"),
    ],
)
def test_an_option_that_cannot_be_is_named(words: list[str], message: str):
    done = CliRunner().invoke(app, ["sample", str(mini.TURBO), "--prompt", "x", *words])
    assert isinstance(done.exception, ZImageTrainError) and str(done.exception) == message
