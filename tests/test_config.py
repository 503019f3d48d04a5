"""The config: read strictly, refused with all problems at once, written so that everyone reads it back alike.

`UPDATE_GOLDEN=1 pytest tests/test_config.py` rewrites the two files in tests/golden; read the diff before keeping it.
"""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zimage_train.config import reading, yaml_reader
from zimage_train.config.reading import dump_config, flatten, read_config
from zimage_train.config.schema import Config
from zimage_train.config.values import OPTIMIZER_PARAMS, SCHEDULE_PARAMS, Later
from zimage_train.config.yaml_reader import YamlProblem
from zimage_train.errors import ConfigError
from zimage_train.model.variants import VARIANTS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
LEAST = "name: a\ndata: [{folder: photos}]\n"

quick = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def read(tmp_path: Path):
    """`read(text, *overrides)`: the config, on top of the two settings that every config has."""

    def run(text: str = "", *overrides: str, least: str = LEAST) -> Config:
        return read_config(write(tmp_path, least + text), overrides)

    return run


@pytest.fixture
def refused(tmp_path: Path):
    """`refused(text, *overrides)`: the lines of the ConfigError, with the file called c.yaml."""

    def run(text: str | bytes = "", *overrides: str, least: str = LEAST) -> list[str]:
        content = text if isinstance(text, bytes) else least + text
        with pytest.raises(ConfigError) as caught:
            read_config(write(tmp_path, content), overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(f"{tmp_path}{os.sep}", "").splitlines()

    return run


def option_names(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option by its dotted name; `[]` stands for each entry of a list."""
    for name, field in section.model_fields.items():
        inner = reading._model_of(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            is_list = "list" in str(field.annotation)
            yield from option_names(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


OPTIONS = dict(option_names())


def nested(option: str, value: Any) -> dict[str, Any]:
    """A config that sets one option, on top of the least one."""
    values: dict[str, Any] = {"name": "a", "data": [{"folder": "photos"}]}
    target: Any = values
    *sections, last = option.split(".")
    for section in sections:
        name = section.removesuffix("[]")
        if section == "sample.prompts[]" or name == "prompts":
            target = target.setdefault("prompts", [{"prompt": "p"}])[0]
        elif section.endswith("[]"):
            target = target[name][0]
        else:
            target = target.setdefault(name, {})
    target[last] = value
    if option == "data[].metadata":
        del target["folder"]
    return values


def matches_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; UPDATE_GOLDEN=1 rewrites it"


# Names


def test_the_list_of_options_is_the_golden_one():
    matches_golden("options.txt", "".join(f"{name}\n" for name in OPTIONS))


def test_every_option_says_in_one_sentence_what_it_does():
    assert [name for name, field in OPTIONS.items() if len(field.description or "") < 10] == []
    sections = {name: field.description for name, field in Config.model_fields.items()}
    assert [name for name, text in sections.items() if not text] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1.0e-4}", "c.yaml:3: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("optimizer:\n\n  lrr: 1.0e-4", "c.yaml:5: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("lora: {rnak: 8}", "c.yaml:3: lora.rnak: unknown key; did you mean 'rank'?"),
        ("lr: 1.0e-4", "c.yaml:3: lr: unknown key; did you mean 'optimizer.lr'?"),
        ("learning_rate: 1.0e-4", "c.yaml:3: learning_rate: unknown key; did you mean 'optimizer.lr'?"),
        ("optimizer: {learning_rate: 1}",
         "c.yaml:3: optimizer.learning_rate: unknown key; did you mean 'optimizer.lr'?"),
        ("batch_size: 2", "c.yaml:3: batch_size: unknown key; did you mean 'train.batch_size'?"),
        ("steps: 2", "c.yaml:3: steps: unknown key; did you mean 'train.steps' or 'sample.steps'?"),
        ("trian: {steps: 2}", "c.yaml:3: trian: unknown key; did you mean 'train'?"),
        ("sample: {prompts: [{promt: x, prompt: y}]}",
         "c.yaml:3: sample.prompts.0.promt: unknown key; did you mean 'prompt'?"),
        ("train: {Steps: 5}", "c.yaml:3: train.Steps: unknown key; did you mean 'steps'?"),
        ("<<: {output: x}", "c.yaml:3: <<: unknown key; known here: name, output, seed,"),
        ("1: 2", "c.yaml:3: 1: unknown key; known here: name, output, seed,"),
        ("optimizer: {params: {beta: 1}}", "c.yaml:3: optimizer.params: adamw8bit has no 'beta'; it has betas, eps"),
        ("schedule: {params: {x: 1}}", "c.yaml:3: schedule.params: constant has no 'x'; it has no params"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_its_line_and_the_right_name(refused, text: str, message: str):
    (line,) = refused(text)
    assert line.startswith(message)


def test_an_unknown_key_in_the_second_data_entry_is_found_there(refused):
    text = "name: a\ndata:\n  - folder: x\n  - folder: y\n    repeat: 2\n"
    assert refused(text, least="") == ["c.yaml:5: data.1.repeat: unknown key; did you mean 'repeats'?"]


def test_every_hint_names_an_option_that_exists():
    assert set(reading.ELSEWHERE.values()) <= {name.replace("[]", ".0") for name in OPTIONS}
    assert not set(reading.ELSEWHERE) & {name.split(".")[-1] for name in OPTIONS}


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("name", "data[].folder")])
def test_one_wrong_letter_in_any_key_is_refused_naming_that_key(option: str):
    *_, last = option.split(".")
    values = nested(option, None)
    text = yaml_reader.dump(values).replace(f"{last}: null", f"{last}x: null")
    assert f"{last}x" in text
    config, problems = reading.validate(yaml_reader.parse(text).value, reading.dotted)
    assert config is None
    assert any(one.where.endswith(f"{last}x") and "unknown key" in one.what for one in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "c.yaml:4: seed: given twice, first in line 3"),
        ("train: {steps: 1, batch_size: 2, steps: 1}", "c.yaml:3: train.steps: given twice, first in line 3"),
        ("lora:\n  rank: 1\ntrain: {}\nlora:\n  alpha: 1.0", "c.yaml:6: lora: given twice, first in line 3"),
        ('seed: 1\n"seed": 2', "c.yaml:4: seed: given twice, first in line 3"),
        ("sample:\n  prompts:\n    - prompt: x\n      seed: 1\n      seed: 2",
         "c.yaml:7: sample.prompts.0.seed: given twice, first in line 6"),
    ],
)  # fmt: skip
def test_a_key_given_twice_is_refused_with_both_lines(refused, text: str, message: str):
    assert refused(text) == [f"{message}; correct it"]


# Values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1e3}", "train.steps: is 1000.0; expected a whole number"),
        ("train: {steps: 3000.0}", "train.steps: is 3000.0; expected a whole number"),
        ("train: {steps: '3000'}", "train.steps: is '3000' (text); expected a whole number"),
        ("train: {steps: null}", "train.steps: is null; expected a whole number"),
        ("train: {steps: 0x10}", "train.steps: is '0x10' (text); expected a whole number"),
        ("lora: {rank: true}", "lora.rank: is true; expected a whole number"),
        ('optimizer: {lr: "1e-4"}', "optimizer.lr: is '1e-4' (text); expected a number"),
        ("optimizer: {lr: true}", "optimizer.lr: is true; expected a number"),
        ("optimizer: {lr: 1,0e-4}", "optimizer.0e-4: unknown key"),
        ("sample: {first: 1}", "sample.first: is 1; expected true or false"),
        ("sample: {first: yes}", "sample.first: is 'yes' (text); expected true or false"),
        ("output: 2024", "output: is 2024; expected text (put it in quotes)"),
        ("output: 1e-4", "output: is 0.0001; expected text (put it in quotes)"),
        ("output: true", "output: is true; expected text (put it in quotes)"),
        ("output: [a]", "output: is a list; expected text (put it in quotes)"),
        ("train: 5", "train: is 5; expected a section"),
        ("train: [5]", "train: is a list; expected a section"),
        ("model:", "model: is null; expected a section"),
        ("model: {variant: [turbo]}", "model.variant: is a list; expected turbo, deturbo or base"),
        ("model: {variant: {turbo: 1}}", "model.variant: is a section; expected turbo, deturbo or base"),
        ("model: {variant: Turbo}",
         "model.variant: is 'Turbo'; expected turbo, deturbo or base; did you mean 'turbo'?"),
        ("optimizer: {name: adamm}",
         "optimizer.name: is 'adamm'; expected adamw, adamw8bit or prodigy; did you mean 'adamw'?"),
        ("lora: {targets: 5}", "lora.targets: is 5; expected a list or text (put it in quotes)"),
        ("lora: {targets: [attn]}", "lora.targets: unknown group 'attn'; groups are attention, feed_forward,"),
        ("lora: {targets: []}", "lora.targets: names no group, so nothing would be trained"),
        ("lora: {targets: 'layers.('}", "lora.targets: not a regular expression"),
        ("sample: {guidance: true}", "sample.guidance: is true; expected a number or auto"),
        ("sample: {steps: 8.0}", "sample.steps: is 8.0; expected a whole number or auto"),
        ("memory: {budget_gb: true}", "memory.budget_gb: is true; expected a number or auto"),
        ("memory: {checkpointing: 1}", "memory.checkpointing: is 1; expected true or false or auto"),
        ("optimizer: {params: [1]}", "optimizer.params: is a list; expected a section"),
        ("optimizer: {params: {eps: small}}", "optimizer.params: eps is 'small'; expected a valid number"),
        ("optimizer: {params: {betas: [0.9]}}", "optimizer.params: betas is [0.9]; expected"),
        ("optimizer: {params: {betas: [0.9, 1.0]}}", "optimizer.params: betas is [0.9, 1.0]; expected less than 1"),
        ("optimizer: {name: prodigy, params: {decouple: 1}}", "optimizer.params: decouple is 1; expected"),
        ("sample: {prompts: [5]}", "sample.prompts.0: is 5; expected a section"),
        ("sample: {prompts: text}", "sample.prompts: is 'text' (text); expected a list"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_naming_both(refused, text: str, message: str):
    lines = refused(text)
    assert any(line.startswith(f"c.yaml:3: {message}") for line in lines), lines


ACCEPTED_AND_REFUSED = {
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "model.adapter_strength": ([0.0, 1, 2.0], [-0.1, 2.1]),
    "data[].resolution": ([32, 4096, [512], [512, 1024]], [16, 4112, 520, [512, 520], [], [512.0]]),
    "data[].repeats": ([1, 1000], [0, 1001]),
    "data[].caption_dropout": ([0.0, 0, 1.0], [-0.1, 1.1]),
    "data[].caption_ext": ([".txt", ".caption"], ["txt", "", ".a/b"]),
    "data[].trigger": (["zorb", "a zorb"], ["", " ", " zorb", "zorb\n", "[trigger]"]),
    "lora.rank": ([1, 1024], [0, -1, 1025]),
    "lora.alpha": ([0.5, 8, None], [0, 0.0, -1.0]),
    "lora.dropout": ([0.0, 0.99], [-0.1, 1.0]),
    "train.steps": ([1, 10_000_000], [0, -5, 10_000_001]),
    "train.batch_size": ([1, 1024], [0, 1025]),
    "train.accumulate": ([1, 4096], [0, 4097]),
    "train.clip_norm": ([0.1, None], [0.0, -1.0]),
    "timesteps.min": ([0.0, 0.99], [-0.01, 1.0]),
    "timesteps.max": ([0.01, 1.0], [0.0, 1.01]),
    "guidance.differential": ([0.5, 100.0, None], [0.0, -1.0, 101.0]),
    "optimizer.lr": ([1e-9, 1, 10.0], [0.0, -1e-4, 10.1]),
    "optimizer.weight_decay": ([0.0, 1.0], [-0.1, 1.1]),
    "schedule.warmup_steps": ([0, 100], [-1, 10_000_001]),
    "memory.budget_gb": (["auto", 0.5, 24], [0, -1.0, 10_001, "24"]),
    "sample.every": ([1, 10**6, None], [0, -1]),
    "sample.width": ([32, 4096], [16, 1000, 4112]),
    "sample.height": ([32, 4096], [16, 1000, 4112]),
    "sample.steps": (["auto", 1, 1000], [0, 1001]),
    "sample.guidance": (["auto", 0, 50.0], [-0.1, 50.1]),
    "sample.seed": ([0, 2**63 - 1], [-1, 2**63]),
    "sample.prompts[].seed": ([None, 0, 2**63 - 1], [-1, 2**63]),
    "sample.prompts[].width": ([None, 64], [16, 1000]),
    "sample.prompts[].height": ([None, 64], [16, 1000]),
    "save.every": ([1, 10**6, None], [0]),
    "save.keep": ([1, 100], [0, -1]),
}


@pytest.mark.parametrize("option", ACCEPTED_AND_REFUSED)
def test_ranges_are_exact(option: str):
    accepted, outside = ACCEPTED_AND_REFUSED[option]
    for value in accepted:
        assert reading.validate(nested(option, value), reading.dotted)[1] == [], value
    for value in outside:
        config, problems = reading.validate(nested(option, value), reading.dotted)
        section = option.replace("[]", ".0").rsplit(".", 1)[0]
        assert config is None and all(one.where.startswith(section) for one in problems), value


def test_every_number_has_its_range_in_that_table():
    numbers = {
        name
        for name, field in OPTIONS.items()
        if re.search(r"\b(int|float)\b", str(field.annotation))
        and not any(isinstance(m, Later) for m in later_of(field))
    }
    assert numbers - set(ACCEPTED_AND_REFUSED) == set()


def later_of(field: FieldInfo) -> list[Any]:
    nested_metadata = [
        one for arg in getattr(field.annotation, "__args__", ()) for one in getattr(arg, "__metadata__", ())
    ]
    return [one for one in (*field.metadata, *nested_metadata) if isinstance(one, Later)]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused_everywhere(refused, value: str):
    floats = [name for name, field in OPTIONS.items() if "float" in str(field.annotation)]
    assert len(floats) > 10
    number = yaml_reader.plain_value(value)
    for name in floats:
        assert reading.validate(nested(name, number), reading.dotted)[0] is None, name
    for optimizer, params in OPTIMIZER_PARAMS.items():
        for key in params:
            held = [number, 0.9] if key == "betas" else number
            values = nested("optimizer.params", {key: held})
            values["optimizer"]["name"] = optimizer
            assert reading.validate(values, reading.dotted)[0] is None, key
    assert refused(f"optimizer: {{lr: {value}}}")[0].endswith("; give a finite number")


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("output", "no", "no"),
        ("output", "on", "on"),
        ("output", "12:30", "12:30"),
        ("output", "2024-01-02", "2024-01-02"),
        ("output", "0x10", "0x10"),
        ("output", "1.2.3", "1.2.3"),
        ("output", "~/runs", "~/runs"),
        ("output", '"1e-4"', "1e-4"),
        ("output", "'010'", "010"),
        ("output", "a#b", "a#b"),
        ("train.steps", "010", 10),
        ("train.steps", "+7", 7),
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "1E-4", 1e-4),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "1", 1.0),
        ("lora.alpha", "~", None),
        ("lora.alpha", "", None),
        ("sample.first", "FALSE", False),
    ],
)
def test_plain_values_hold_no_surprises(read, option: str, text: str, value: Any):
    section, _, key = option.rpartition(".")
    found = flatten(read(f"{section}:\n  {key}: {text}" if section else f"{key}: {text}").model_dump())[option]
    assert found == value and type(found) is type(value)


def test_a_prompt_may_be_text_and_a_resolution_one_number(read):
    config = read("sample: {prompts: [one, {prompt: two, seed: 5}]}", "data.0.resolution=512")
    assert [(one.prompt, one.seed) for one in config.sample.prompts] == [("one", None), ("two", 5)]
    assert config.data[0].resolution == [512]


def test_relations_between_settings_are_checked(refused):
    assert "min 0.6 must be below max 0.5" in refused("timesteps: {min: 0.6, max: 0.5}")[0]
    assert "min 0.5 must be below max 0.5" in refused("timesteps: {min: 0.5, max: 0.5}")[0]
    assert "needs exactly one of folder and metadata" in refused("data: [{trigger: x}]", least="name: a\n")[0]
    both = "data: [{folder: x, metadata: y.csv}]"
    assert "needs exactly one of folder and metadata" in refused(both, least="name: a\n")[0]
    assert "at least 1 entry" in refused("data: []", least="name: a\n")[0]
    assert refused("", least="{}") == ["c.yaml:1: name: is missing; add it", "c.yaml:1: data: is missing; add it"]


NOT_YET = {
    "model.quantize": "fp8",
    "model.attention": "flash",
    "data[].shuffle_tags": True,
    "data[].keep_tags": 1,
    "data[].flip": True,
    "data[].mask": "masks",
    "data[].mask_floor": 0.2,
    "data[].regularisation": True,
    "data[].weight": 2.0,
    "lora.type": "dora",
    "lora.init_from": "x.safetensors",
    "train.method": "trajectory_imitation",
    "guidance.contrastive": 1.5,
    "preserve.kind": "blank",
    "preserve.class_word": "dog",
    "preserve.weight": 0.5,
    "ema.decay": 0.999,
    "memory.offload": "blocks",
    "memory.compile": True,
    "sample.extra_loras": ["x.safetensors"],
    "validation.folder": "held_out",
    "validation.every": 100,
}


@pytest.mark.parametrize("option", NOT_YET)
def test_what_this_version_cannot_do_is_refused_and_its_neutral_value_is_not(option: str):
    default = OPTIONS[option].default
    assert reading.validate(nested(option, default), reading.dotted)[1] == []
    config, (problem,) = reading.validate(nested(option, NOT_YET[option]), reading.dotted)
    assert config is None
    assert problem.where == option.replace("[]", ".0")
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    assert str(problem).endswith(f"not possible in this version; leave it out (it can only be {shown})")


def test_every_option_that_is_not_possible_yet_is_in_that_table_and_no_other():
    assert {name for name, field in OPTIONS.items() if later_of(field)} == set(NOT_YET)


# The model's variants


@pytest.mark.parametrize(("variant", "adapter"), [("turbo", "v2"), ("deturbo", None), ("base", None)])
def test_the_adapter_follows_the_variant_unless_it_is_set(read, variant: str, adapter: str | None):
    assert read(f"model: {{variant: {variant}}}").model.adapter == adapter == VARIANTS[variant].adapter
    assert read("", f"model.variant={variant}").model.adapter == adapter
    assert read(f"model: {{variant: {variant}, adapter: null}}").model.adapter is None
    assert read(f"model: {{variant: {variant}, adapter: x.safetensors}}").model.adapter == "x.safetensors"


def test_the_adapter_of_a_config_without_a_model_section_is_turbos(read):
    assert (read().model.variant, read().model.adapter, read().model.adapter_strength) == ("turbo", "v2", 1.0)


@pytest.mark.parametrize("variant", ["deturbo", "base"])
@pytest.mark.parametrize("adapter", ["v1", "v2"])
def test_turbos_adapter_is_refused_for_another_variant(refused, variant: str, adapter: str):
    (line,) = refused(f"model: {{variant: {variant}, adapter: {adapter}}}")
    assert f"adapter {adapter} was made for Turbo and would harm {variant}; leave it out" in line


# The name


@pytest.mark.parametrize("name", ["a", "redhair_v1", "A b.c+d-e", "äöü猫", "v1.2", "x-1a", "2024", "a" * 200])
def test_names_that_are_folders_everywhere_are_fine(read, name: str):
    assert read(least=f'name: "{name}"\ndata: [{{folder: x}}]\n').name == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "a/b", "../a", "..", ".a", "-a", "a\\b", "a ", " a", "a.", "a-1", "a-000250", "a:b", "a*",
     "a\n", "a\tb", "a" * 201, "猫" * 67],
)  # fmt: skip
def test_names_that_leave_the_folder_or_look_like_a_step_are_refused(refused, name: str):
    (line,) = refused(least=f'name: "{name}"\ndata: [{{folder: x}}]\n')
    assert line.startswith("c.yaml:1: name: ")


# The file


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path):
    text = LEAST + "train:\n  steps: 5\n"
    expected = read_config(write(tmp_path, text))
    for content in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode(), text.rstrip().encode()):
        assert read_config(write(tmp_path, content)) == expected
    wrong = LEAST.replace("\n", "\r\n") + "\r\nlrr: 1\r\n"
    with pytest.raises(ConfigError, match=r"c\.yaml:4: lrr"):
        read_config(write(tmp_path, b"\xef\xbb\xbf" + wrong.encode()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "c.yaml: is empty; see configs/quickstart.yaml for a start"),
        (b"\xef\xbb\xbf", "c.yaml: is empty"),
        (b"# only a comment\n", "c.yaml: is empty"),
        (b"null\n", "c.yaml: is empty"),
        (b"- a\n", "c.yaml: holds a list, not settings"),
        (b"just text\n", "c.yaml: holds text, not settings"),
        (b"name: a\0b\n", "c.yaml: contains NUL bytes, so it is not a text file"),
        ("name: ä\n".encode("latin-1"), "c.yaml: is not UTF-8 text (byte 6)"),
        ("name: a\n".encode("utf-16"), "c.yaml: is not UTF-8 text (byte 0)"),
        (b"name: a\n" * 200_000, "c.yaml: is larger than 1 MB, so it is not a config"),
        (b"name: a\n\noutput: \x07\n", "c.yaml:3: holds the control character 0x07"),
        (b'name: a\noutput: "\\0"\n', "c.yaml:2: output: holds a character that no text has"),
        (b'name: a\noutput: "\\ud800"\n', "c.yaml:2: output: holds a character that no text has"),
        (b'name: a\n"\\ud800": 1\n', "c.yaml:2: a key must be plain text"),
        (b"name: a\ntrain: [\n", "c.yaml:3: not valid YAML"),
        (b"name: a\n\tseed: 1\n", "c.yaml:2: not valid YAML"),
        (b"name: a: b\n", "c.yaml:1: not valid YAML"),
        (b"name: 'a\n", "c.yaml:2: not valid YAML"),
        (b"name: a\n---\nname: b\n", "c.yaml:2: not valid YAML: but found another document"),
        (b"name: a\n? [x]\n: y\n", "c.yaml:2: a key must be plain text"),
        (b"name: !!str 5\n", "c.yaml:1: has the tag !!str, and only plain values are read"),
        (b"name: a\nseed: !!int '5'\n", "c.yaml:2: has the tag !!int"),
        (b"name: a\ndata: !!python/object/apply:os.system [x]\n", "c.yaml:2: has the tag !!python/object/apply:os"),
        (b"!!python/name:os.system name: a\n", "c.yaml:1: has the tag !!python/name:os.system"),
        (b"name: ! a\n", "c.yaml:1: has the tag !"),
        (b"name: a\nb: &x [*x]\n", "c.yaml:2: b.0.0"),
        (b"name: " + b"[" * 5000, "c.yaml:1: is nested more than 40 deep"),
        (b"name: " + b"[" * 50 + b"]" * 50, "c.yaml:1: is nested more than 40 deep"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_is_no_config_is_refused_in_one_line(refused, content: bytes, message: str):
    (line,) = refused(content)
    assert line.startswith(message)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    for path, message in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "cannot be read (Is a directory)")):
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        assert str(caught.value).startswith(f"{path}: {message}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(write(tmp_path, LEAST) / "below.yaml")


def test_a_small_file_that_grows_without_end_is_refused_at_once(refused):
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    start = time.monotonic()
    (line,) = refused("\n".join(layers), least="")
    assert "too large or nested too deeply" in line
    assert time.monotonic() - start < 3
    start = time.monotonic()
    (line,) = refused("train: {steps: " + "1" * 500_000 + "x}")  # slow for a regular expression that backtracks
    assert "expected a whole number" in line and len(line) < 200
    assert "whole number" in refused("train: {steps: " + "1" * 5_000 + "}")[0]  # more digits than int() takes
    assert time.monotonic() - start < 3


def test_an_anchor_of_ordinary_size_is_read(read):
    config = read("sample: {width: &side 512, height: *side}")
    assert (config.sample.width, config.sample.height) == (512, 512)


@settings(quick, max_examples=60)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_arbitrary_bytes_are_refused_and_never_crash(tmp_path_factory, content: bytes):
    folder = tmp_path_factory.getbasetemp()
    for prefix in (b"", LEAST.encode(), LEAST.encode() + b"sample: {negative: "):
        try:
            read_config(write(folder, prefix + content))
        except ConfigError as error:
            assert error.problems and all(one.what for one in error.problems)


# All at once


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(refused):
    text = """\
train:
  steps: 0
  batch_size: two
lora: {rnak: 8}
sample:
  width: 1000
  every: 0
lr: 1
seed: 1
seed: 2
"""
    lines = refused(text, "optimizer.lr=-1", "save=5", "nonsense")
    assert sorted(lines) == sorted(
        [
            "c.yaml:12: seed: given twice, first in line 11; correct it",
            "--set nonsense: is not key=value; write for example --set train.steps=100",
            "c.yaml:4: train.steps: is 0; expected at least 1",
            "c.yaml:5: train.batch_size: is 'two' (text); expected a whole number",
            "c.yaml:6: lora.rnak: unknown key; did you mean 'rank'?",
            "c.yaml:8: sample.width: 1000 is no multiple of 16; 992 or 1008 would do",
            "c.yaml:9: sample.every: is 0; expected at least 1",
            "--set optimizer.lr=-1: optimizer.lr: is -1; expected more than 0.0",
            "--set save=5: save: is 5; expected a section",
            "c.yaml:10: lr: unknown key; did you mean 'optimizer.lr'?",
        ]
    )


# --set


def test_overrides_replace_values_and_make_sections(read):
    config = read(
        "train: {steps: 10, batch_size: 2}\nsample: {prompts: [a, b, c]}",
        "train.steps=20",
        "optimizer.lr=2e-4",
        "sample.prompts=[d]",
        "lora={rank: 4}",
        "data.0.folder=other",
        "data.0.resolution=[64, 96]",
        "name = b c ",
        "output=",
        "output=x=y",
        "model.adapter=null",
    )
    assert (config.train.steps, config.train.batch_size, config.optimizer.lr) == (20, 2, 2e-4)
    assert [one.prompt for one in config.sample.prompts] == ["d"]
    assert (config.lora.rank, config.data[0].folder, config.data[0].resolution) == (4, "other", [64, 96])
    assert (config.name, config.output, config.model.adapter) == ("b c", "x=y", None)


def test_an_index_reaches_into_one_entry_only(read):
    text = "name: a\ndata:\n  - {folder: x, repeats: 2}\n  - {folder: y}\nsample: {prompts: [a, b]}\n"
    config = read("", "data.1.repeats=3", "data.0.folder=z", "sample.prompts.1=c", least=text)
    assert [(one.folder, one.repeats) for one in config.data] == [("z", 2), ("y", 3)]
    assert [one.prompt for one in config.sample.prompts] == ["a", "c"]


def test_the_later_of_two_overrides_counts(read):
    assert read("", "train.steps=1", "train.steps=2").train.steps == 2
    assert read("", "train={steps: 1, batch_size: 4}", "train.steps=2").train.batch_size == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "is not key=value; write for example --set train.steps=100"),
        ("=5", "is not key=value; write for example --set train.steps=100"),
        ("", "is not key=value; write for example --set train.steps=100"),
        ("train..steps=5", "has an empty part in its key; write for example --set train.steps=100"),
        (".train=5", "has an empty part in its key; write for example --set train.steps=100"),
        ("train.steps=[", "not valid YAML"),
        ("train.steps=1: 2: 3", "not valid YAML"),
        ("train.steps=!!int 5", "has the tag !!int, and only plain values are read; quote the value"),
        ("train={steps: 1, steps: 2}", "steps: given twice, first in line 1"),
        ("train.stpes=5", "train.stpes: unknown key; did you mean 'steps'?"),
        ("lr=5", "lr: unknown key; did you mean 'optimizer.lr'?"),
        ("new.key=5", "new: unknown key; known here: name, output"),
        ("train.steps=a", "train.steps: is 'a' (text); expected a whole number"),
        ("train.steps.x=1", "train.steps is no section of the config; check the key"),
        ("data.1.folder=x", "data has 1 entries, counted from 0; check the index"),
        ("data.x.folder=y", "data has 1 entries, counted from 0; check the index"),
        ("data.-1.folder=y", "data has 1 entries, counted from 0; check the index"),
        ("data.\u00b2=5", "data has 1 entries, counted from 0; check the index"),
        ("data.1=5", "data has 1 entries, counted from 0; check the index"),
        ("sample.prompts.0=x", "sample.prompts has 0 entries, counted from 0; check the index"),
        ("optimizer.params.x=1", "optimizer.params: adamw8bit has no 'x'; it has betas, eps"),
        ("data=[]", "data: is empty; expected at least 1 entry"),
        ("data.0.resolution.3=64", "data.0.resolution has 1 entries, counted from 0"),
    ],
)
def test_a_bad_override_is_refused_naming_it(refused, override: str, message: str):
    least = "name: a\ntrain: {steps: 4}\ndata: [{folder: x, resolution: [64]}]\n"
    (line,) = refused("", override, least=least)
    assert line.startswith(f"--set {override}: {message}")


# Written and read back


SPECIAL_TEXTS = [
    "", " ", " x ", "no", "yes", "on", "y", "null", "~", "true", "True", "010", "0o7", "0x1f", "0b1", "1_000", "12:30",
    "1e-4", "1e5", "1.", ".5", "5e", "+1", "-.5e3", ".inf", "-.INF", ".nan", "=", "<<", "2024-01-01", "2024-01-01 1:02",
    "# c", "a # b", "a: b", "a:", "- a", "-", "---", "...", "'", '"', "[x]", "{x}", "&a", "*a", "!t", "%x", "@x", "`x`",
    "|", ">", "? x", "\t", "\n", "a\nb", "a\n", "\na", "a\n\n  b\n", "a\\b", "\x07", "\x85", "\u2028", "\ufeff",
    "\u00a0", "猫", "😀", "1" * 120, "x" * 1200, "word " * 300, "[trigger]",
]  # fmt: skip

texts = st.sampled_from(SPECIAL_TEXTS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)
numbers = st.floats(1e-7, 10.0) | st.sampled_from([8e-05, 1e-4, 1.0, 1e-07])
pixels = st.integers(2, 256).map(lambda count: count * 16)
every = st.none() | st.integers(1, 10**6)
prompts = st.lists(
    texts
    | st.fixed_dictionaries(
        {"prompt": texts},
        optional={
            "negative": st.none() | texts,
            "seed": st.none() | st.integers(0, 2**63 - 1),
            "width": st.none() | pixels,
            "height": st.none() | pixels,
        },
    ),
    max_size=3,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "resolution": pixels | st.lists(pixels, min_size=1, max_size=3),
        "repeats": st.integers(1, 1000),
        "trigger": st.none() | texts.map(str.strip).filter(lambda text: text not in ("", "[trigger]")),
        "default_caption": texts,
        "caption_ext": st.sampled_from([".txt", ".caption", ".a.b"]),
        "caption_dropout": st.floats(0, 1) | st.sampled_from([0, 1]),
    },
)
filled = texts.filter(bool)
sources = st.tuples(st.sampled_from(["folder", "metadata"]), filled)
params = st.fixed_dictionaries(
    {}, optional={"eps": numbers, "betas": st.lists(st.floats(0, 0.999) | st.just(0), min_size=2, max_size=2)}
)
configs = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z_0-9][a-zA-Z .+_]{0,9}[a-z]", fullmatch=True)
        | st.sampled_from(["no", "1e5", "010"]),
        "data": st.lists(
            st.builds(lambda entry, source: entry | {source[0]: source[1]}, entries, sources), min_size=1, max_size=2
        ),
    },
    optional={
        "output": texts,
        "seed": st.integers(0, 2**63 - 1),
        "model": st.fixed_dictionaries(
            {},
            optional={
                "variant": st.sampled_from(["turbo", "deturbo", "base"]),
                "path": st.none() | filled,
                "extras": st.none() | filled,
                "adapter": st.none() | filled,
                "adapter_strength": st.floats(0, 2),
                "dtype": st.sampled_from(["bf16", "fp32"]),
            },
        ),
        "cache": st.fixed_dictionaries({"folder": st.none() | filled}),
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 1024),
                "alpha": st.none() | numbers | st.integers(1, 64),
                "targets": st.lists(st.sampled_from(["attention", "feed_forward", "adaln", "refiners"]), min_size=1)
                | st.sampled_from([r".*\.to_q", "layers.0.attention.to_q", "010"]),
                "dropout": st.floats(0, 0.99),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "steps": st.integers(1, 10**7),
                "batch_size": st.integers(1, 9),
                "clip_norm": st.none() | numbers,
            },
        ),
        "timesteps": st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["weighted", "linear", "sigmoid", "shift"]),
                "min": st.floats(0, 0.4),
                "max": st.floats(0.5, 1),
            },
        ),
        "guidance": st.fixed_dictionaries({"differential": st.none() | numbers}),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"name": st.sampled_from(["adamw", "adamw8bit", "prodigy"]), "lr": numbers, "params": params}
        ),
        "schedule": st.just({})
        | st.builds(lambda end: {"name": "cosine", "params": {"end_factor": end}}, st.floats(0, 1)),
        "memory": st.fixed_dictionaries(
            {},
            optional={"budget_gb": st.just("auto") | numbers | st.integers(1, 99), "checkpointing": st.booleans()},
        ),
        "sample": st.fixed_dictionaries(
            {},
            optional={
                "every": every,
                "first": st.booleans(),
                "prompts": prompts,
                "negative": texts,
                "width": pixels,
                "steps": st.just("auto") | st.integers(1, 1000),
                "guidance": st.just("auto") | st.floats(0, 50) | st.integers(0, 50),
            },
        ),
        "save": st.fixed_dictionaries({}, optional={"every": every, "keep": st.integers(1, 99)}),
        "log": st.fixed_dictionaries({"tensorboard": st.booleans()}),
    },
)


def typed(value: Any) -> Any:
    """A value together with the types inside it, so that 1, 1.0 and True are three things."""
    if isinstance(value, dict):
        return {typed(key): typed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [typed(one) for one in value]
    return type(value).__name__, value


@settings(quick, max_examples=30)
@given(configs)
def test_the_effective_config_reads_back_equal_here_and_in_plain_yaml(tmp_path_factory, values: dict[str, Any]):
    config, problems = reading.validate(values, reading.dotted)
    if problems and any("made for Turbo" in str(one) for one in problems):
        return
    assert config is not None, problems
    text = dump_config(config)
    assert read_config(write(tmp_path_factory.getbasetemp(), text)) == config
    assert typed(yaml.safe_load(text)) == typed(config.model_dump()) == typed(yaml_reader.parse(text).value)
    assert dump_config(read_config(write(tmp_path_factory.getbasetemp(), text))) == text


@settings(quick, max_examples=300)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | texts | st.booleans() | st.none())
def test_any_plain_value_is_written_so_that_everyone_reads_the_same(value: Any):
    text = yaml_reader.dump({"key": value, "list": [value]})
    expected = typed({"key": value, "list": [value]})
    if isinstance(value, int) and len(str(value)) > yaml_reader.LONGEST_NUMBER:
        return
    assert typed(yaml_reader.parse(text).value) == expected
    assert typed(yaml.safe_load(text)) == expected


@pytest.mark.parametrize(("value", "text"), [(8e-05, "8.0e-05"), (1e-4, "0.0001"), (1e16, "1.0e+16"), (-0.0, "-0.0")])
def test_small_numbers_are_written_with_a_point(value: float, text: str):
    assert yaml_reader.dump({"lr": value}) == f"lr: {text}\n"
    assert math.copysign(1, yaml.safe_load(text)) == math.copysign(1, value)


def test_every_option_is_in_the_effective_config(read):
    config = read("sample: {prompts: [x]}")
    written = {re.sub(r"\.\d+\.", "[].", name) for name in flatten(yaml.safe_load(dump_config(config)))}
    assert written == set(OPTIONS)


def test_flatten_names_every_leaf_once():
    value = {"a": {"b": 1, "c": {}}, "d": [{"e": 1}, {"e": [1, 2]}], "f": [], "g": None}
    assert flatten(value) == {"a.b": 1, "a.c": {}, "d.0.e": 1, "d.1.e": [1, 2], "f": [], "g": None}


WEIRD = st.sampled_from(
    [None, True, -1, 0, 10**30, 1.5, -0.5, "", "x", "auto", [], [1], ["x"], {}, {"x": 1}, [{}], [[]]]
)


@settings(quick, max_examples=150)
@given(st.sampled_from(list(OPTIONS)), WEIRD)
def test_one_changed_value_is_accepted_or_refused_naming_its_section(option: str, value: Any):
    config, problems = reading.validate(nested(option, value), reading.dotted)
    section = option.replace("[]", ".0").split(".")[0]
    assert (config is None) == bool(problems)
    assert all(one.where.split(".")[0] == section for one in problems)


# Golden messages


BAD = {
    "a misspelt key": (LEAST + "optimizer: {lrr: 1.0e-4}\nlora:\n  rnak: 8\n", []),
    "a key of another trainer": (LEAST + "learning_rate: 1.0e-4\nnetwork_dim: 16\nsave_every: 250\n", []),
    "a key in the wrong section": (LEAST + "train: {lr: 1.0e-4}\nsample: {rank: 8}\nsteps: 5\n", []),
    "a section misspelt": (LEAST + "optimiser: {lr: 1.0e-4}\n", []),
    "keys given twice": (LEAST + "train: {steps: 1, steps: 2}\nname: b\n", []),
    "types": (LEAST + 'train: {steps: 1e3}\nlora: {rank: true}\noptimizer: {lr: "1e-4"}\nsample: {first: yes}\n', []),
    "ranges": (LEAST + "train: {steps: 0}\nlora: {rank: 0}\noptimizer: {lr: -1}\nsave: {every: 0}\nseed: -1\n", []),
    "not finite": (LEAST + "optimizer: {lr: .nan}\nlora: {alpha: .inf}\nguidance: {differential: 1e999}\n", []),
    "sizes": (LEAST + "sample: {width: 1000, height: 16}\n", ["data.0.resolution=[512, 520]"]),
    "not possible yet": (
        LEAST + "model: {quantize: fp8}\nlora: {type: lokr}\ntrain: {method: de_distill}\nema: {decay: 0.999}\n",
        ["data.0.flip=true", "memory.compile=true", "sample.extra_loras=[x]"],
    ),
    "another variant's adapter": (LEAST + "model: {variant: base, adapter: v2}\n", []),
    "a choice misspelt": (LEAST + "model: {variant: turob}\ntimesteps: {type: sigmod}\nsave: {dtype: fp16}\n", []),
    "names": ("name: ../x\ndata: [{folder: photos}]\n", []),
    "a name that ends like a step": ("name: x-000250\ndata: [{folder: photos}]\n", []),
    "nothing to train on": ("name: a\n", []),
    "no folder": ("name: a\ndata: [{trigger: zorb}]\n", []),
    "params": (LEAST + "optimizer: {params: {momentum: 0.9}}\nschedule: {name: cosine, params: {end_factor: 2}}\n", []),
    "overrides": (LEAST, ["train.stpes=5", "train.steps", "data.3.folder=x", "lora.rank=x", "save={keep: 1, keep: 1}"]),
    "broken YAML": (LEAST + "train: {steps: 5\n", []),
    "a tab": (LEAST + "train:\n\tsteps: 5\n", []),
    "a tag": (LEAST + "output: !!python/object/apply:os.system [true]\n", []),
    "a list": ("- name: a\n", []),
    "an empty file": ("", []),
}  # fmt: skip


def messages(folder: Path) -> str:
    """What the user reads for each bad config, and the exit code."""
    parts = []
    for title, (text, overrides) in BAD.items():
        (folder / "bad.yaml").write_text(text, encoding="utf-8")
        try:
            read_config(Path("bad.yaml"), overrides)
            outcome = "accepted"
        except ConfigError as error:
            outcome = f"{error}\n(exit code {error.exit_code})"
        command = "".join(f" --set '{one}'" for one in overrides)
        parts.append(f"# {title}{f'{chr(10)}#{command}' if command else ''}\n{outcome}\n")
    return "\n".join(parts)


def test_error_messages_are_the_golden_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    matches_golden("config_errors.txt", messages(tmp_path))


def test_refusals_do_not_depend_on_asserts(tmp_path: Path):
    (tmp_path / "bad.json").write_text(json.dumps(BAD))
    code = """
import json
from pathlib import Path
from zimage_train.config.reading import read_config
from zimage_train.errors import ConfigError
for text, overrides in json.loads(Path("bad.json").read_text()).values():
    Path("bad.yaml").write_text(text)
    try:
        read_config(Path("bad.yaml"), overrides)
        print("accepted")
    except ConfigError as error:
        print(f"{error}\\n(exit code {error.exit_code})")
"""
    result = subprocess.run(
        [sys.executable, "-O", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    golden = (GOLDEN / "config_errors.txt").read_text(encoding="utf-8").splitlines()
    expected = [line for line in golden if line and not line.startswith("#")]
    assert (result.stdout.splitlines(), result.stderr) == (expected, "")


# What is generated from the schema


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "scripts" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_fresh(generate, capsys):
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_a_stale_or_missing_file_fails_the_check_and_writing_mends_it(generate, tmp_path: Path, capsys):
    assert generate.main(["--check"], tmp_path) == 1
    assert not list(tmp_path.iterdir())
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    for name in generate.GENERATED:
        text = (tmp_path / name).read_text()
        assert text == (ROOT / name).read_text()
        (tmp_path / name).write_text(text + " ")
        capsys.readouterr()
        assert generate.main(["--check"], tmp_path) == 1
        assert capsys.readouterr().out == f"{name} is stale; run python scripts/generate.py\n"
        (tmp_path / name).write_text(text)
    assert generate.main(["--chekc"], tmp_path) == 2


def test_the_reference_is_the_default_config_with_a_line_for_every_option(read):
    path = ROOT / "configs" / "reference.yaml"
    assert read_config(path) == read(least="name: my_lora\ndata: [{folder: photos}]\n")
    lines = path.read_text().splitlines()
    values = flatten(yaml.safe_load(path.read_text()))
    assert {re.sub(r"\.\d+\.", "[].", name) for name in values} | {name for name in OPTIONS if "prompts[]" in name} == (
        set(OPTIONS) | {"sample.prompts"}
    )
    uncommented = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r" *[a-z_]+:", line) and not before.strip().startswith("#")
    ]
    assert uncommented == []
    for name, field in OPTIONS.items():
        assert " ".join((field.description or "").split()) in path.read_text(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path):
    config = read_config(path)
    assert read_config(path, ["train.steps=1"]).train.steps == 1
    assert yaml.safe_load(path.read_text())["name"] == config.name


def complaints(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> list[str]:
    """What an editor would mark: the part of JSON schema that ours uses; any other keyword is an error of the test."""
    found: list[str] = []
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    for key, rule in schema.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "$ref":
            found += complaints(root["$defs"][rule.rsplit("/", 1)[1]], value, root)
        elif key == "anyOf":
            found += [] if any(not complaints(one, value, root) for one in rule) else [f"{value!r} fits nothing"]
        elif key == "type":
            fits = {"integer": is_number and isinstance(value, int), "number": is_number}.get(rule)
            if not (isinstance(value, kinds[rule]) if fits is None else fits):
                found.append(f"{value!r} is no {rule}")
        elif key == "enum":
            found += [] if value in rule else [f"{value!r} not in {rule}"]
        elif key == "const":
            found += (
                [] if typed(value) == typed(rule) or (is_number and value == rule) else [f"{value!r} is not {rule!r}"]
            )
        elif key == "properties" and isinstance(value, dict):
            found += [one for name in rule.keys() & value for one in complaints(rule[name], value[name], root)]
        elif key == "additionalProperties" and rule is False and isinstance(value, dict):
            found += [f"unknown {name}" for name in value.keys() - schema["properties"].keys()]
        elif key == "required" and isinstance(value, dict):
            found += [f"missing {name}" for name in rule if name not in value]
        elif key == "items" and isinstance(value, list):
            found += [one for entry in value for one in complaints(rule, entry, root)]
        elif key in ("minItems", "minLength", "maxLength") and isinstance(value, list if key == "minItems" else str):
            found += [] if (len(value) <= rule if key == "maxLength" else len(value) >= rule) else [f"{key} {value!r}"]
        elif key in BOUNDS and is_number:
            found += [] if BOUNDS[key](value, rule) else [f"{value!r} not {key} {rule}"]
        elif key == "pattern" and isinstance(value, str):
            found += [] if re.search(rule, value) else [f"{value!r} does not match {rule}"]
        elif key not in ANNOTATIONS | BOUNDS.keys() | CHECKED:
            raise KeyError(key)
    return found


BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "multipleOf": lambda value, step: value % step == 0,
}
CHECKED = {"properties", "additionalProperties", "required", "items", "minItems", "minLength", "maxLength", "pattern"}
ANNOTATIONS = {"description", "default", "title", "$schema", "$defs"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((ROOT / "configs" / "schema.json").read_text())


def test_the_json_schema_requires_name_and_data_and_allows_no_other_key(schema):
    assert sorted(schema["required"]) == ["data", "name"]
    objects = [schema, *schema["$defs"].values()]
    assert all(one["additionalProperties"] is False for one in objects if one["type"] == "object")
    described = [(name, key) for one in objects for name, key in one["properties"].items()]
    assert [name for name, key in described if not key.get("description")] == []


@settings(quick, max_examples=40)
@given(configs)
def test_the_json_schema_marks_nothing_that_the_reader_takes(schema, values: dict[str, Any]):
    assert complaints(schema, values, schema) == []


def test_the_json_schema_takes_the_shipped_configs(schema):
    for path in (ROOT / "configs").glob("*.yaml"):
        assert complaints(schema, yaml_reader.parse(path.read_text()).value, schema) == []


def test_the_json_schema_marks_what_the_reader_refuses(schema):
    assert complaints(schema, {"name": "a"}, schema) == ["missing data"]
    assert complaints(schema, nested("optimizer.lr", 1.0) | {"lr": 1.0}, schema) == ["unknown lr"]
    for option, value in NOT_YET.items():
        assert complaints(schema, nested(option, value), schema), option
    later_neutral = {option: OPTIONS[option].default for option in NOT_YET}
    assert [name for name, value in later_neutral.items() if complaints(schema, nested(name, value), schema)] == []
    unmarked = {
        (option, str(value))
        for option, (_, outside) in ACCEPTED_AND_REFUSED.items()
        for value in outside
        if not complaints(schema, nested(option, value), schema)
    }
    by_validators = {"data[].trigger", "memory.budget_gb", "sample.steps", "sample.guidance", "data[].resolution"}
    assert {option for option, _ in unmarked} <= by_validators


PARAMS = {
    ("optimizer", "adamw", "betas"): ([[0, 0.99], [0.9, 0.999]], [[0.9], [0.9] * 3, [0.9, 1.0], [-0.1, 0.9], 0.9]),
    ("optimizer", "adamw8bit", "eps"): ([1e-8, 1], [0, 0.0, -1e-8, "small", True]),
    ("optimizer", "prodigy", "beta3"): ([None, 0, 0.9], [1.0, -0.1]),
    ("optimizer", "prodigy", "decouple"): ([True, False], [1, None]),
    ("optimizer", "prodigy", "use_bias_correction"): ([True, False], ["no"]),
    ("optimizer", "prodigy", "safeguard_warmup"): ([True, False], [0.5]),
    ("optimizer", "prodigy", "d0"): ([1e-6], [0.0, -1.0]),
    ("optimizer", "prodigy", "d_coef"): ([0.5, 2], [0, -1.0]),
    ("optimizer", "prodigy", "growth_rate"): ([1.02, 2], [1.0, 1, 0.5]),
    ("optimizer", "prodigy", "slice_p"): ([1, 11], [0, 1.5]),
    ("schedule", "cosine", "end_factor"): ([0, 0.0, 1.0, 0.1], [-0.1, 1.1]),
}


@pytest.mark.parametrize(("section", "name", "key"), PARAMS)
def test_params_have_their_ranges_too(section: str, name: str, key: str):
    accepted, outside = PARAMS[section, name, key]
    for value in [*accepted, *outside]:
        values = nested(f"{section}.params", {key: value})
        values[section]["name"] = name
        config, problems = reading.validate(values, reading.dotted)
        assert (config is not None) == (value in accepted and type(value) in map(type, accepted)), value
        assert [problem.where for problem in problems] == ([] if config else [f"{section}.params"])


def test_every_param_is_in_that_table():
    optimizer = {("optimizer", key) for known in OPTIMIZER_PARAMS.values() for key in known}
    schedule = {("schedule", key) for known in SCHEDULE_PARAMS.values() for key in known}
    assert {(section, key) for section, _, key in PARAMS} == optimizer | schedule


def test_params_have_a_kind_for_every_optimizer_and_schedule():
    def choices(option: str) -> set[str]:
        return set(OPTIONS[option].annotation.__args__)

    assert set(OPTIMIZER_PARAMS) == choices("optimizer.name")
    assert set(SCHEDULE_PARAMS) == choices("schedule.name")


def test_the_line_of_every_key_is_known():
    document = yaml_reader.parse("a: 1\nb:\n  - c: 2\n    d:\n      e: 3\n  - 4\n")
    assert document.lines[("a",)] == 1
    assert document.lines[("b", 0, "c")] == 3
    assert document.lines[("b", 0, "d", "e")] == 5
    assert document.lines[("b", 1)] == 6
    with pytest.raises(YamlProblem):
        yaml_reader.parse("a: [")
