"""A config as text: changes keep comments, problems have lines, the form's fields follow the schema."""

import difflib
from pathlib import Path
from typing import Any

import pytest

from zimage_train.cli import app as _registers_formats  # noqa: F401
from zimage_train.config import load
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.ui import config_text
from zimage_train.ui.form_fields import ESSENTIALS, field_at, fields_of, sections

from config_texts import OPTIONS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEXT = """# a comment on top
name: a  # of the name

data:
  - folder: photos  # here
    resolution: [512, 768]
lora: {rank: 16}
optimizer:
  lr: 1.0e-4   # not higher
"""


def changed(before: str, after: str) -> list[str]:
    """The lines that differ."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


@pytest.mark.parametrize(
    ("path", "value", "lines"),
    [
        (("lora", "rank"), 32, ["-lora: {rank: 16}", "+lora: {rank: 32}"]),
        (("data", 0, "resolution"), [64], ["-    resolution: [512, 768]", "+    resolution: [64]"]),
        (("ema", "decay"), 0.99, ["+ema:", "+  decay: 0.99"]),
        (("lora", "alpha"), None, ["-lora: {rank: 16}", "+lora: {rank: 16, alpha: null}"]),
        (("name",), "b", ["-name: a  # of the name", "+name: b  # of the name"]),
        (("data", 0, "trigger"), "no", ["+    trigger: no"]),
    ],
)
def test_a_change_keeps_the_rest(path: Any, value: Any, lines: list[str]):
    text = config_text.set_value(TEXT, path, value)
    assert changed(TEXT, text) == lines
    assert config_text.value_at(config_text.check_text(text).values, path) == value


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "reference"], ids=lambda path: path.stem)
def test_shipped_configs_survive(path: Path):
    """Setting the seed changes no other line, and no setting."""
    text = path.read_text()
    after = config_text.set_value(text, ("seed",), 7)
    values, other = config_text.check_text(text).values, config_text.check_text(after).values
    assert other == values | {"seed": 7}
    assert all(line.lstrip("+-").startswith("seed:") for line in changed(text, after))


def test_a_removed_setting_has_its_default():
    text = config_text.remove_value(TEXT, ("optimizer", "lr"))
    assert "optimizer" not in text and "# of the name" in text
    assert config_text.remove_value(TEXT, ("schedule", "name")) == TEXT


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("name: a\ndata: [\n", None, ""),
        ("name: a\ndata: [{folder: x}]\nlora:\n  rank: 0\n", 4, "lora.rank"),
        ("name: a\ndata: [{folder: x}]\nlora:\n  runk: 4\n", 4, "runk"),
    ],
)
def test_problems_have_lines(text: str, line: int | None, what: str):
    checked = config_text.check_text(text)
    assert checked.config is None
    assert any((line is None or one.place.line == line) and what in str(one) for one in checked.problems)
    if line is None:
        with pytest.raises(ConfigError):
            config_text.set_value(text, ("name",), "b")


@pytest.mark.parametrize(
    "value", [None, True, 1e-4, 5e-5, [512, 768], "abc", "no", "[trigger] x", {"a": 1}, "a: b", ""]
)
def test_values_of_fields_read_back(value: Any):
    assert config_text.parse_value(config_text.dump_value(value)) == value


def test_the_form_has_every_setting():
    """What is neither a list of prompts nor of LoRAs has a field, with its choices and its default."""
    found: dict[str, Any] = {}
    for _, path, _ in sections({"data": [{}]}):
        for field in fields_of(path):
            found[field.name.replace("data.0", "data[]")] = field
    lists = {
        name for name in OPTIONS if name.startswith(("sample.prompts[]", "sample.extra_loras[]", "train.beside[]"))
    }
    assert OPTIONS.keys() - lists <= found.keys()
    config = Config.model_validate({"name": "a", "data": [{"folder": "x"}]})
    flat = load.flatten_keys(config.model_dump())
    for name, field in found.items():
        key = name.replace("data[]", "data.0")
        if field.default and key in flat:
            given = ("data[].folder", "model.adapter")  # which depends on the variant
            assert config_text.parse_value(field.default) == flat[key] or name in given, name
    assert found["guidance.cfg_zero"].kind == "switch" and found["lora.type"].choices[-1] == "oft"
    assert [field_at(path).path for path in ESSENTIALS] == list(ESSENTIALS)


def test_jobs_of_others_are_converted():
    job = """
job: extension
config:
  name: x
  process:
    - type: sd_trainer
      training_folder: runs
      datasets: [{folder_path: photos, resolution: [512]}]
      train: {steps: 10, lr: 1e-4, batch_size: 1, optimizer: adamw8bit}
      model: {name_or_path: Tongyi-MAI/Z-Image-Turbo, arch: "zimage:turbo"}
      network: {type: lora, linear: 8}
"""
    text, _ = config_text.convert_foreign("job.yaml", job)
    config = config_text.check_text(text).config
    assert config is not None and config.lora.rank == 8 and config.train.steps == 10
    assert config_text.convert_foreign("x.yaml", TEXT) == (TEXT, [])


def test_a_run_is_cloned_shortly():
    config = Config.model_validate({"name": "a", "data": [{"folder": "x"}], "lora": {"rank": 8}})
    short = config_text.without_defaults(load.dump_config(config))
    assert config_text.check_text(short).config == config and len(short.splitlines()) < 12


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("data.7.folder", "has no place"),
        ("data.x.folder", "is no setting"),
        ("name.x", "is no setting"),
        ("train.steps.foo", "is no setting"),
        ("data.0", "is no setting"),
        ("nonsense", "is no setting"),
        ("", "is no setting"),
    ],
)
def test_a_setting_without_a_place(key: str, what: str):
    """A key that is none, or that the text has no place for, is a problem and no crash."""
    with pytest.raises(ConfigError, match=what):
        config_text.set_setting(TEXT, key, "x")


@pytest.mark.parametrize("text", ["name: a\ndata: x\n", "name: a\ntrain: [1]\n", "name: a\ndata: 5\n"])
def test_a_text_of_another_shape(text: str):
    """A text whose sections are something else has no place for their settings."""
    for key in ("train.steps", "data.0.folder", "data.*.resolution"):
        try:
            config_text.set_setting(text, key, 1)
        except ConfigError as error:
            assert error.problems[0].code == "no-place"
