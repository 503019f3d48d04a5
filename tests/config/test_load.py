"""The config: read strictly, refused with all problems at once, written so that everyone reads it back alike.

What each fault in it is refused with is in tests/faults/test_faults_config.py.
"""

import itertools
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zimage_train.config import key_names, load, strict_yaml
from zimage_train.config.load import dump_config, flatten_keys, read_config
from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.config.strict_yaml import YamlError
from zimage_train.config.triggers import placeholder_in
from zimage_train.config.types import RECOMPUTE_MODES, SCHEDULE_PARAMS
from zimage_train.config.variants import VARIANTS
from zimage_train.errors import ConfigError

from config_texts import LEAST, OPTIONS, nested, refusal, write
from helpers import script

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
quick = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


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
        return refusal(tmp_path, text, *overrides, least=least)

    return run


# Names


def test_unknown_key_in_a_list_entry(refused):
    """An unknown key in the second `data` entry is reported at that entry."""
    text = "name: a\ndata:\n  - folder: x\n  - folder: y\n    repeat: 2\n"
    assert refused(text, least="") == ["c.yaml:5: data.1.repeat: unknown key; did you mean 'repeats'?"]


def test_hints_name_existing_options():
    """Every hint names an option that exists."""
    assert set(key_names.COMMON_NAMES.values()) <= {name.replace("[]", ".0") for name in OPTIONS}
    assert not set(key_names.COMMON_NAMES) & {name.split(".")[-1] for name in OPTIONS}
    assert not set(key_names.MISSING_SETTINGS) & set(OPTIONS)


@pytest.mark.parametrize("key", key_names.MISSING_SETTINGS)
def test_settings_of_others_are_refused(key: str, refused):
    """A setting that only other trainers have is refused with the reason."""
    (line,) = refused("", f"{key}=x")
    assert line == f"--set {key}=x: {key}: unknown key; {key_names.MISSING_SETTINGS[key]}"


# Values


ACCEPTED_AND_REFUSED = {
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "model.adapter_strength": ([0.0, 1, 2.0], [-0.1, 2.1]),
    "data[].resolution": ([32, 4096, [512], [512, 1024]], [16, 4112, 520, [512, 520], [], [512.0]]),
    "data[].repeats": ([1, 1000, "by_folder"], [0, 1001, "auto"]),
    "data[].caption_dropout": ([0.0, 0, 1.0], [-0.1, 1.1]),
    "data[].max_pixels": ([None, 1024, 2**24], [1023, 2**24 + 1]),
    "data[].batch_size": ([None, 1, 1024], [0, 1025]),
    "data[].keep_tags": ([0], [-1, 513]),
    "data[].tag_dropout": ([0.0, 0.99], [-0.1, 1.0]),
    "data[].mask_floor": ([0.1], [-0.1, 1.0, 0.0]),
    "data[].mask_prior": ([0.0], [-0.1, 100.1, 1.0]),
    "data[].weight": ([0.01, 1, 100.0], [0.0, -0.1, 100.1]),
    "train.epochs": ([None, 0.1, 10**6], [0.0, -1, 10**6 + 1]),
    "train.regularization_share": ([0.01, 0.99], [0.0, 1.0]),
    "guidance.contrastive": ([0.5, 100.0, None], [0.0, -1.0, 101.0]),
    "preserve.weight": ([0.1, 100], [0.0, 101]),
    "ema.decay": ([None, 0.001, 0.9999], [0.0, 1.0]),
    "validation.every": ([1, None], [0]),
    "validation.resolution": ([32, 4096], [16, 1000]),
    "data[].caption_ext": ([".txt", ".caption"], ["txt", "", ".a/b"]),
    "data[].trigger": (["zorb", "a zorb"], ["", " ", " zorb", "zorb\n", "[trigger]"]),
    "lora.rank": ([1, 1024], [0, -1, 1025]),
    "lora.factor": (["auto", 2, 1024], [1, 0, 1025, "whole"]),
    "lora.alpha": ([0.5, 8, None], [0, 0.0, -1.0]),
    "lora.dropout": ([0.0, 0.99], [-0.1, 1.0]),
    "lora.rank_dropout": ([0.0, 0.99], [-0.1, 1.0]),
    "lora.module_dropout": ([0.0, 0.99], [-0.1, 1.0]),
    "lora.ranks": (
        [{}, {"attention": 1}, {"layers.0[.].+": 1024, "refiners": 4}],
        [{"attention": 0}, {"attention": 1025}, {"attention": 8.0}, {"(": 8}, 8, [8]],
    ),
    "optimizer.lr_factors": (
        [{}, {"attention": 0.001, ".+w1": 1000}],
        [{"attention": 0.0}, {"attention": 1000.1}, {"attention": "auto"}, {"(": 1.0}, 1.0],
    ),
    "optimizer.lora_plus": ([0.1, 1, 16, 1000.0], [0.0, -1.0, 1000.1, None]),
    "train.steps": ([1, 10_000_000], [0, -5, 10_000_001]),
    "train.batch_size": ([1, 1024], [0, 1025]),
    "train.grad_accumulation": ([1, 4096], [0, 4097]),
    "train.max_grad_norm": ([0.1, None], [0.0, -1.0]),
    "timesteps.min": ([0.0, 0.99], [-0.01, 1.0]),
    "timesteps.max": ([0.01, 1.0], [0.0, 1.01]),
    "timesteps.shift": ([None, 0.1, 3, 100.0, "flux", "qwen", "variant"], [0.0, -1.0, 100.1, "flux2"]),
    "timesteps.mean": ([-20.0, 0, 20.0], [-20.1, 20.1]),
    "timesteps.scale": ([0.01, 1, 20.0], [0.0, 20.1]),
    "timesteps.sigmas": ([[1.0], [0.5, 0.001]], [[], [0.0], [1.1], 0.5, [0.5, 0.5]]),
    "timesteps.jitter": ([0.0, 0.5], [-0.1, 0.6]),
    "timesteps.weight": (
        ["bell", "aitoolkit", [[0, 1000.0], [1, 0]]],
        ["none", [[0.0, 1.0]], [[0.0, 1e4], [1.0, 1.0]]],
    ),
    "timesteps.offset_noise": ([0.0, 0.02, 1], [-0.01, 1.1]),
    "guidance.differential": ([0.5, 100.0, None], [0.0, -1.0, 101.0]),
    "loss.delta": ([None], [0.0, -1.0, 1000.1]),
    "loss.detail": ([0.0, 1, 100.0], [-0.1, 100.1]),
    "loss.min_snr": ([None], [0.0, 1000.1]),
    "loss.min_snr_floor": ([None], [-0.1, 1.1]),
    "optimizer.lr": ([1e-9, 1, 10.0], [0.0, -1e-4, 10.1]),
    "optimizer.weight_decay": ([0.0, 1.0], [-0.1, 1.1]),
    "schedule.warmup_steps": ([0, 100], [-1, 10_000_001]),
    "model.quantize": ([None, "fp8", "int8", "nf4", "auto"], ["int4", "none", 8, True]),
    "memory.checkpointing": (["auto", True, False, *RECOMPUTE_MODES], ["some", 1, None]),
    "memory.offload": (["auto", 0, 0.5, 1.0], [-0.1, 1.1, "half", True]),
    "memory.budget_gb": (["auto", 0.5, 24], [0, -1.0, 10_001, "24"]),
    "sample.every": ([1, 10**6, None], [0, -1]),
    "sample.width": ([32, 4096], [16, 1000, 4112]),
    "sample.height": ([32, 4096], [16, 1000, 4112]),
    "sample.steps": (["auto", 1, 1000], [0, 1001]),
    "sample.guidance": (["auto", 0, 50.0], [-0.1, 50.1]),
    "sample.seed": ([0, 2**63 - 1], [-1, 2**63]),
    "teacher.steps": ([9, 1000], [8, 1001, 9.0]),
    "teacher.guidance": ([0.0, 50], [-0.1, 50.1]),
    "slider.guidance": ([0.1, 100], [0.0, 100.1]),
    "slider.anchor_weight": ([0.1, 100], [0.0, 100.1]),
    "sample.lora_weights": ([[1.0], [-100.0, 1.0, 100.0], None], [[], [1.0, 101.0], [1.0, -100.1]]),
    "sample.prompts[].seed": ([None, 0, 2**63 - 1], [-1, 2**63]),
    "sample.prompts[].width": ([None, 64], [16, 1000]),
    "sample.prompts[].height": ([None, 64], [16, 1000]),
    "sample.extra_loras[].weight": ([-100.0, 0, 1.5, 100], [-100.1, 100.1]),
    "train.beside[].weight": ([-100.0, 0, 1.5, 100], [-100.1, 100.1]),
    "save.every": ([1, 10**6, None], [0]),
    "save.keep": ([1, 100], [0, -1]),
    "save.checkpoint_minutes": ([0.5, 10, None], [0, -1.0, 10_001]),
}
TYPES_WITH_EFFECT = {
    "timesteps.shift": "sigmoid", "timesteps.mean": "sigmoid", "timesteps.scale": "logsnr", "timesteps.sigmas": "fixed",
    "timesteps.jitter": "turbo_grid", "timesteps.weight": "linear", "lora.factor": "lokr",
}  # fmt: skip
"""Option that is refused beside the default of `type` -> a type with which it has an effect."""


def valued(option: str, value: object) -> dict[str, Any]:
    """A config that is valid but for what `option` is."""
    values = nested(option, value)
    if option in TYPES_WITH_EFFECT:
        values[option.partition(".")[0]]["type"] = TYPES_WITH_EFFECT[option]
    if option.startswith("slider."):
        values["slider"] |= {"positive": "old", "anchor": "a house"}
        values["train"] = {"method": "slider"}
    return values


@pytest.mark.parametrize("option", ACCEPTED_AND_REFUSED)
def test_ranges_are_exact(option: str):
    accepted, outside = ACCEPTED_AND_REFUSED[option]
    for value in accepted:
        assert load.validate_config(valued(option, value), load.dotted_key)[1] == [], value
    for value in outside:
        config, problems = load.validate_config(valued(option, value), load.dotted_key)
        section = option.replace("[]", ".0").rsplit(".", 1)[0]
        assert config is None and all(one.location.startswith(section) for one in problems), value


def test_number_ranges_are_all_tested():
    """Every option with a number has its range in the table above."""
    numbers = {name for name, field in OPTIONS.items() if re.search(r"\b(int|float)\b", str(field.annotation))}
    assert numbers - set(ACCEPTED_AND_REFUSED) == set()


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("output_dir", "no", "no"),
        ("output_dir", "on", "on"),
        ("output_dir", "12:30", "12:30"),
        ("output_dir", "2024-01-02", "2024-01-02"),
        ("output_dir", "0x10", "0x10"),
        ("output_dir", "1.2.3", "1.2.3"),
        ("output_dir", "~runs", "~runs"),
        ("output_dir", "a/$b", "a/$b"),
        ("output_dir", '"1e-4"', "1e-4"),
        ("output_dir", "'010'", "010"),
        ("output_dir", "a#b", "a#b"),
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
    found = flatten_keys(read(f"{section}:\n  {key}: {text}" if section else f"{key}: {text}").model_dump())[option]
    assert found == value and type(found) is type(value)


def test_short_forms(read):
    """A prompt may be plain text, and a resolution a single number."""
    config = read("sample: {prompts: [one, {prompt: two, seed: 5}]}", "data.0.resolution=512")
    assert [(one.prompt, one.seed) for one in config.sample.prompts] == [("one", None), ("two", 5)]
    stacked = read("sample: {extra_loras: [a=b.safetensors=-0.5, {file: c, weight: 2}, distillpatch]}")
    found = [(one.file, one.weight) for one in stacked.sample.extra_loras]
    assert found == [("a=b.safetensors", -0.5), ("c", 2.0), ("distillpatch", 1.0)]
    assert config.data[0].resolution == [512]


def test_relations_between_settings(refused):
    """Relations between settings are checked."""
    assert "min 0.6 must be below max 0.5" in refused("timesteps: {min: 0.6, max: 0.5}")[0]
    assert "min 0.5 must be below max 0.5" in refused("timesteps: {min: 0.5, max: 0.5}")[0]
    assert "needs exactly one of folder, metadata and prompts" in refused("data: [{trigger: x}]", least="name: a\n")[0]
    both = "data: [{folder: x, metadata: y.csv}]"
    assert "needs exactly one of folder, metadata and prompts" in refused(both, least="name: a\n")[0]
    assert "at least 1 entry" in refused("data: []", least="name: a\n")[0]
    assert refused("", least="{}") == ["c.yaml:1: name: is missing; add it", "c.yaml:1: data: is missing; add it"]


NOISE_LEVELS = {
    "type: linear, mean: 0.5": "mean: has no effect with timesteps.type: linear",
    "type: cosine_bell, scale: 2.0": "scale: has no effect",
    "type: sigmoid, sigmas: [0.5]": "sigmas: has no effect",
    "type: uniform_shift, jitter: 0.1": "jitter: has no effect",
    "type: turbo_grid, shift: 3.0": "shift: has no effect",
    "type: fixed, sigmas: [0.5, 0.6], shift: flux": "shift: has no effect",
    "weight: bell": "weight: has no effect with timesteps.type: weighted; use linear",
    "type: fixed": "fixed needs sigmas",
    "type: fixed, sigmas: [0.5, 0.5]": "0.5 stands twice",
    "type: fixed, sigmas: [0.0]": "expected more than 0.0",
    "type: fixed, sigmas: []": "at least 1 entry",
    "type: fixed, sigmas: [0.5], bias: high_noise": "bias: has no effect where a single sigma is drawn",
    "type: fixed, sigmas: [0.5], stratified: true": "stratified: has no effect where a single sigma is drawn",
    "type: turbo_grid, min: 0.2": "min 0.2 and max 1 leave every sigma as it is",
    "type: turbo_grid, min: 0.96, max: 0.99": "min 0.96 and max 0.99 leave none of the sigmas",
    "type: sigmoid, mean: 10.0, max: 0.2": "leave less than a millionth of sigmoid",
    "type: logsnr, max: 0.02": "leave less than a millionth of logsnr",
    "type: sigmoid, shift: 0": "expected more than 0.0 or flux, qwen or variant",
    "type: sigmoid, shift: fluxx": "expected a number or flux, qwen or variant",
    "type: linear, weight: [[0.0, 1.0]]": "is no list of pairs",
    "type: linear, weight: [[0.0, 1.0], [0.5]]": "is no list of pairs",
    "type: linear, weight: [[0.5, 1.0], [0.2, 1.0]]": "its sigmas do not increase",
    "type: linear, weight: [[0.0, 1.0], [1.2, 1.0]]": "its sigmas do not increase",
    "type: linear, weight: [[0.0, 0.0], [1.0, 0.0]]": "its weights are from 0 to 0",
    "type: linear, weight: [[0.0, -1.0], [1.0, 1.0]]": "its weights are from -1 to 1",
    "type: shift": "write type: sigmoid and shift: 3.0 for that of musubi-tuner",
    "type: flux_shift": "write type: sigmoid and shift: flux",
    "sigmoid_scale: 1.0": "did you mean 'timesteps.scale'?",
    "discrete_flow_shift: 2.0": "did you mean 'timesteps.shift'?",
}


@pytest.mark.parametrize("text", NOISE_LEVELS)
def test_noise_levels_that_do_nothing(text: str, refused):
    """Settings of the noise levels that contradict each other, or would do nothing, are refused."""
    (line,) = refused(f"timesteps: {{{text}}}")
    assert NOISE_LEVELS[text] in line


def test_noise_levels_in_use(read):
    """Settings of the noise levels are accepted where they have an effect."""
    for text in (
        "type: sigmoid, mean: -0.5, scale: 1.2, shift: 2.0, min: 0.1, weight: aitoolkit, stratified: true",
        "type: logsnr, scale: 2.0, shift: variant",
        "type: turbo_grid, jitter: 0.02, min: 0.29",
        "type: turbo_grid, max: 0.9, weight: bell",
        "type: fixed, sigmas: [0.5], jitter: 0.1, bias: high_noise",
    ):
        assert read(f"timesteps: {{{text}}}").timesteps.summary


# The model's variants


@pytest.mark.parametrize(("variant", "adapter"), [("turbo", "v2"), ("deturbo", None), ("base", None)])
def test_adapter_follows_the_variant(read, variant: str, adapter: str | None):
    """The adapter follows the variant unless it is set."""
    assert read(f"model: {{variant: {variant}}}").model.adapter == adapter == VARIANTS[variant].adapter
    assert read("", f"model.variant={variant}").model.adapter == adapter
    assert read(f"model: {{variant: {variant}, adapter: null}}").model.adapter is None
    assert read(f"model: {{variant: {variant}, adapter: x.safetensors}}").model.adapter == "x.safetensors"


def test_adapter_without_a_model_section(read):
    """A config without a `model` section has Turbo's adapter."""
    assert (read().model.variant, read().model.adapter, read().model.adapter_strength) == ("turbo", "v2", 1.0)


@pytest.mark.parametrize("variant", ["deturbo", "base"])
@pytest.mark.parametrize("adapter", ["v1", "v2"])
def test_adapter_of_another_variant(refused, variant: str, adapter: str):
    """Turbo's adapter is refused for another variant."""
    (line,) = refused(f"model: {{variant: {variant}, adapter: {adapter}}}")
    assert f"adapter {adapter} was made for Turbo and would harm {variant}; leave it out" in line


# The name


@pytest.mark.parametrize("name", ["a", "redhair_v1", "A b.c+d-e", "äöü猫", "v1.2", "x-1a", "2024", "a" * 200])
def test_names_valid_on_every_system(read, name: str):
    """Names that are valid folder names on every system are accepted."""
    assert read(least=f'name: "{name}"\ndata: [{{folder: x}}]\n').name == name


# The file


def test_an_anchor_of_ordinary_size_is_read(read):
    config = read("sample: {width: &side 512, height: *side}")
    assert (config.sample.width, config.sample.height) == (512, 512)


@settings(quick, max_examples=60)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_arbitrary_bytes(tmp_path_factory, content: bytes):
    """Arbitrary bytes are refused, and never crash the reader."""
    folder = tmp_path_factory.getbasetemp()
    for prefix in (b"", LEAST.encode(), LEAST.encode() + b"sample: {negative: "):
        try:
            read_config(write(folder, prefix + content))
        except ConfigError as error:
            assert error.problems and all(one.message for one in error.problems)


# All at once


def test_problems_are_reported_at_once(refused):
    """All problems are reported at once, in the order of the file."""
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
            "c.yaml:12: seed: given twice, first in line 11; remove one of them",
            "--set nonsense: is not key=value; write for example --set train.steps=100",
            "c.yaml:4: train.steps: is 0; expected at least 1",
            "c.yaml:5: train.batch_size: is 'two' (text); expected a whole number",
            "c.yaml:6: lora.rnak: unknown key; did you mean 'rank'?",
            "c.yaml:8: sample.width: 1000 is no multiple of 16; 992 or 1008 would do",
            "c.yaml:9: sample.every: is 0; expected at least 1, or null, which is never",
            "--set optimizer.lr=-1: optimizer.lr: is -1; expected more than 0.0",
            "--set save=5: save: is 5; expected a section",
            "c.yaml:10: lr: unknown key; did you mean 'optimizer.lr'?",
        ]
    )


# --set


def test_overrides_replace_and_add(read):
    """Overrides replace values and add sections."""
    config = read(
        "train: {steps: 10, batch_size: 2}\nsample: {prompts: [a, b, c]}",
        "train.steps=20",
        "optimizer.lr=2e-4",
        "sample.prompts=[d]",
        "lora={rank: 4}",
        "data.0.folder=other",
        "data.0.resolution=[64, 96]",
        "name = b c ",
        "output_dir=",
        "output_dir=x=y",
        "model.adapter=null",
    )
    assert (config.train.steps, config.train.batch_size, config.optimizer.lr) == (20, 2, 2e-4)
    assert [one.prompt for one in config.sample.prompts] == ["d"]
    assert (config.lora.rank, config.data[0].folder, config.data[0].resolution) == (4, "other", [64, 96])
    assert (config.name, config.output_dir, config.model.adapter) == ("b c", "x=y", None)


def test_override_of_a_list_entry(read):
    """An index changes a single entry of a list."""
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
def test_bad_override_is_named(refused, override: str, message: str):
    """A bad override is refused by its text."""
    least = "name: a\ntrain: {steps: 4}\ndata: [{folder: x, resolution: [64]}]\n"
    (line,) = refused("", override, least=least)
    assert line.startswith(f"--set {override}: {message}")


# Written and read back


SPECIAL_TEXTS = [
    "", " ", " x ", "no", "yes", "on", "y", "null", "~", "true", "True", "010", "0o7", "0x1f", "0b1", "1_000", "12:30",
    "1e-4", "1e5", "1.", ".5", "5e", "+1", "-.5e3", ".inf", "-.INF", ".nan", "=", "<<", "2024-01-01", "2024-01-01 1:02",
    "# c", "a # b", "a: b", "a:", "- a", "-", "---", "...", "'", '"', "[x]", "{x}", "&a", "*a", "!t", "%x", "@x", "`x`",
    "|", ">", "? x", "\t", "\n", "a\nb", "a\n", "\na", "a\n\n  b\n", "a\\b", "\x07", "\x85", "\u2028", "\ufeff",
    "\u00a0", "猫", "😀", "1" * 120, "x" * 255, "word " * 51, "[trigger]",
]  # fmt: skip

texts = st.sampled_from(SPECIAL_TEXTS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)
numbers = st.floats(1e-7, 10.0) | st.sampled_from([8e-05, 1e-4, 1.0, 1e-07])
pixels = st.integers(2, 256).map(lambda count: count * 16)
every = st.none() | st.integers(1, 10**6)
plain_texts = texts.filter(lambda text: placeholder_in(text) is None)
"""Without `[trigger]`, which only prompts of a config with a trigger may have."""
prompts = st.lists(
    plain_texts
    | st.fixed_dictionaries(
        {"prompt": plain_texts},
        optional={
            "negative": st.none() | plain_texts,
            "seed": st.none() | st.integers(0, 2**63 - 1),
            "width": st.none() | pixels,
            "height": st.none() | pixels,
        },
    ),
    max_size=3,
)


def is_trigger(text: str) -> bool:
    return text not in ("", "[trigger]") and len(text.splitlines()) == 1


entries = st.fixed_dictionaries(
    {},
    optional={
        "resolution": pixels | st.lists(pixels, min_size=1, max_size=3),
        "repeats": st.integers(1, 1000),
        "trigger": st.none() | texts.map(str.strip).filter(is_trigger),
        "default_caption": texts,
        "caption_ext": st.sampled_from([".txt", ".caption", ".a.b"]),
        "caption_dropout": st.floats(0, 1) | st.sampled_from([0, 1]),
    },
)
filled = texts.filter(bool)
paths = filled.filter(
    lambda text: not any(unicodedata.category(char) == "Cc" for char in text) and text[0] not in "~$%"
)
"""Without control characters, which no path is meant to have, and without what a shell would expand."""
sources = st.tuples(st.sampled_from(["folder", "metadata"]), paths)
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
        "output_dir": paths | st.just(""),
        "seed": st.integers(0, 2**63 - 1),
        "model": st.fixed_dictionaries(
            {},
            optional={
                "variant": st.sampled_from(["turbo", "deturbo", "base"]),
                "path": st.none() | paths,
                "extras": st.none() | paths,
                "adapter": st.none() | paths,
                "adapter_strength": st.floats(0, 2),
                "dtype": st.sampled_from(["bf16", "fp32"]),
            },
        ),
        "cache": st.fixed_dictionaries({"folder": st.none() | paths}),
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
                "max_grad_norm": st.none() | numbers,
            },
        ),
        "timesteps": st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["linear", "sigmoid", "uniform_shift", "cosine_bell"]),
                "shift": st.none() | st.sampled_from(["flux", "qwen", "variant"]) | st.floats(0.5, 9.0),
                "stratified": st.booleans(),
                "weight": st.none() | st.sampled_from(["bell", "aitoolkit"]) | st.just([[0.0, 1.0], [0.5, 2.0]]),
                "min": st.floats(0, 0.4),
                "max": st.floats(0.5, 1),
            },
        ).filter(lambda values: "type" in values or values.get("weight") is None),  # weighted has a weight of its own
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
                "negative": plain_texts,
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


@pytest.mark.slow
@settings(quick, max_examples=30)
@given(configs)
def test_effective_config_reads_back(tmp_path_factory, values: dict[str, Any]):
    """The effective config reads back equal, here and in plain YAML."""
    config, problems = load.validate_config(values, load.dotted_key)
    if problems and any("made for Turbo" in str(one) for one in problems):
        return
    assert config is not None, problems
    text = dump_config(config)
    assert read_config(write(tmp_path_factory.getbasetemp(), text)) == config
    assert typed(yaml.safe_load(text)) == typed(config.model_dump()) == typed(strict_yaml.parse(text).value)
    assert dump_config(read_config(write(tmp_path_factory.getbasetemp(), text))) == text


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        (
            """
            name: a
            model: {adapter: v2}
            data: [{folder: photos, mask: alpha}, {folder: photos, mask: masks}, {metadata: list.jsonl}]
            lora: {init_from: distillpatch}
            sample: {every: 1, compare_on: base, extra_loras: [{file: distillpatch}, {file: org/repo/a.safetensors}]}
            """,
            {
                "data.0.folder": "photos",
                "data.1.folder": "photos",
                "data.1.mask": "masks",
                "data.2.metadata": "list.jsonl",
            },
        ),
        (
            """
            name: a
            model: {adapter: null}
            data: [{prompts: prompts.txt}]
            train: {method: de_distill}
            """,
            {"data.0.prompts": "prompts.txt"},
        ),
        (
            """
            name: a
            model: {text_encoder: photos, tokenizer: masks, vae: list.jsonl, extras: org/repo}
            data: [{folder: org/repo}]
            """,
            {"model.text_encoder": "photos", "model.tokenizer": "masks", "model.vae": "list.jsonl"},
        ),
    ],
    ids=["short names", "prompts", "parts of the model"],
)
def test_paths_are_made_absolute(tmp_path: Path, monkeypatch, text: str, absolute: dict[str, str]):
    """Paths become absolute; short names that are looked up first stay, even beside files of the same names."""
    monkeypatch.chdir(tmp_path)
    for name in ("v2", "alpha", "base", "distillpatch", "prompts.txt", "photos", "masks", "list.jsonl"):
        (tmp_path / name).mkdir()
    config, problems = load.validate_config(yaml.safe_load(text), load.dotted_key)
    assert config is not None, problems
    resolved = flatten_keys(load.resolve_paths(config).model_dump())
    found = {key: value for key, value in resolved.items() if str(value).startswith(str(tmp_path))}
    assert found == {key: str(tmp_path / path) for key, path in (absolute | {"output_dir": "runs"}).items()}


@settings(quick, max_examples=300)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | texts | st.booleans() | st.none())
def test_yaml_values_read_back(value: Any):
    """Any plain value is written such that every YAML reader reads the same."""
    text = strict_yaml.dump({"key": value, "list": [value]})
    expected = typed({"key": value, "list": [value]})
    if isinstance(value, int) and len(str(value)) > strict_yaml.LONGEST_NUMBER:
        return
    assert typed(strict_yaml.parse(text).value) == expected
    assert typed(yaml.safe_load(text)) == expected


@pytest.mark.parametrize(("value", "text"), [(8e-05, "8.0e-05"), (1e-4, "0.0001"), (1e16, "1.0e+16"), (-0.0, "-0.0")])
def test_yaml_small_numbers(value: float, text: str):
    """Small numbers are written with a decimal point."""
    assert strict_yaml.dump({"lr": value}) == f"lr: {text}\n"
    assert math.copysign(1, yaml.safe_load(text)) == math.copysign(1, value)


def test_effective_config_is_complete(read):
    """Every option is in the effective config."""
    config = read("sample: {prompts: [x], extra_loras: [y]}\ntrain: {beside: z}")
    written = {re.sub(r"\.\d+\.", "[].", name) for name in flatten_keys(yaml.safe_load(dump_config(config)))}
    assert written == set(OPTIONS)


def test_flatten_names_every_leaf_once():
    value = {"a": {"b": 1, "c": {}}, "d": [{"e": 1}, {"e": [1, 2]}], "f": [], "g": None}
    assert flatten_keys(value) == {"a.b": 1, "a.c": {}, "d.0.e": 1, "d.1.e": [1, 2], "f": [], "g": None}


WEIRD = st.sampled_from(
    [None, True, -1, 0, 10**30, 1.5, -0.5, "", "x", "auto", [], [1], ["x"], {}, {"x": 1}, [{}], [[]]]
)


@settings(quick, max_examples=150)
@given(st.sampled_from(list(OPTIONS)), WEIRD)
def test_one_changed_value(option: str, value: Any):
    """Any value of any option is accepted, or refused naming its section."""
    config, problems = load.validate_config(valued(option, value), load.dotted_key)
    section = option.replace("[]", ".0").split(".")[0]
    assert (config is None) == bool(problems)
    assert all(one.location.split(".")[0] == section for one in problems)


# What is generated from the schema


@pytest.fixture(scope="module")
def generate():
    return script("generate")


def test_generated_files_are_fresh(generate, capsys):
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_generated_files_are_checked(generate, tmp_path: Path, capsys):
    """`generate.py --check` fails for a stale or missing file, and writing makes it pass."""
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
    told = [f"{name} is stale; run python scripts/generate.py" for name in generate.GENERATED]
    assert capsys.readouterr().out.splitlines() == told
    assert generate.main(["--chekc"], tmp_path) == 2


def test_reference_config(read):
    """The reference is the default config, with a comment for every option."""
    path = ROOT / "configs" / "reference.yaml"
    assert read_config(path) == read(least="name: my_lora\ndata: [{folder: photos}]\n")
    lines = path.read_text().splitlines()
    values = flatten_keys(yaml.safe_load(path.read_text()))
    empty = {
        "prompts[]": "sample.prompts",
        "extra_loras[]": "sample.extra_loras",
        "beside[]": "train.beside",
    }
    inside = {name for name in OPTIONS for part in empty if part in name}
    assert {re.sub(r"\.\d+\.", "[].", name) for name in values} | inside == set(OPTIONS) | set(empty.values())
    uncommented = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r" *[a-z_]+:", line) and not before.strip().startswith("#")
    ]
    assert uncommented == []
    for name, field in OPTIONS.items():
        assert " ".join((field.description or "").split()) in path.read_text(), name


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


def test_json_schema_keys(schema):
    """The JSON schema requires `name` and `data`, and allows no unknown key."""
    assert sorted(schema["required"]) == ["data", "name"]
    objects = [schema, *schema["$defs"].values()]
    assert all(one["additionalProperties"] is False for one in objects if one["type"] == "object")
    described = [(name, key) for one in objects for name, key in one["properties"].items()]
    assert [name for name, key in described if not key.get("description")] == []


@settings(quick, max_examples=40)
@given(configs)
def test_json_schema_accepts_valid_values(schema, values: dict[str, Any]):
    """The JSON schema accepts every value that the reader accepts."""
    assert complaints(schema, values, schema) == []


def test_json_schema_accepts_shipped_files(schema):
    """The JSON schema accepts the shipped configs."""
    for path in (ROOT / "configs").glob("*.yaml"):
        assert complaints(schema, strict_yaml.parse(path.read_text()).value, schema) == []


def test_json_schema_refuses(schema):
    """The JSON schema refuses what the reader refuses."""
    assert complaints(schema, {"name": "a"}, schema) == ["missing data"]
    assert complaints(schema, nested("optimizer.lr", 1.0) | {"lr": 1.0}, schema) == ["unknown lr"]
    unmarked = {
        (option, str(value))
        for option, (_, outside) in ACCEPTED_AND_REFUSED.items()
        for value in outside
        if not complaints(schema, valued(option, value), schema)
    }
    by_validators = {"data[].trigger", "memory.budget_gb", "sample.steps", "sample.guidance", "data[].resolution"}
    by_validators |= {"lora.ranks", "optimizer.lr_factors"}  # their keys are regular expressions
    by_validators |= {"data[].mask_floor", "data[].mask_prior", "timesteps.sigmas", "timesteps.weight"}
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
    ("optimizer", "ademamix8bit", "alpha"): ([0.1, 5], [0.0, -1]),
    ("optimizer", "ademamix", "t_alpha"): ([1, 3000], [0, 1.5]),
    ("optimizer", "ademamix", "t_beta3"): ([1, 3000], [0]),
    ("optimizer", "adafactor", "beta1"): ([0.0, 0.9], [1.0]),
    ("optimizer", "adafactor", "decay_rate"): ([-0.8, -1], [0.0, 0.8]),
    ("optimizer", "adafactor", "clip_threshold"): ([1.0], [0.0]),
    ("optimizer", "adagrad", "lr_decay"): ([0.0, 1.0], [-0.1, 1.1]),
    ("optimizer", "adagrad", "initial_accumulator_value"): ([0.0, 0.1], [-0.1]),
    ("optimizer", "adamw_schedulefree", "betas"): ([[0.9, 0.999]], [[0.0, 0.9], [0.9, 1.0]]),
    ("optimizer", "adamw_schedulefree", "r"): ([0.0, 1.0], [-0.1, 1.1]),
    ("optimizer", "adamw_schedulefree", "weight_lr_power"): ([0.0, 2.0], [-0.1, 10.1]),
    ("optimizer", "came", "eps1"): ([1e-30], [0.0]),
    ("optimizer", "came", "eps2"): ([1e-16], [0.0]),
    ("optimizer", "muon", "momentum"): ([0.0, 0.95], [1.0]),
    ("optimizer", "muon", "nesterov"): ([True, False], [1]),
    ("optimizer", "muon", "ns_steps"): ([1, 20], [0, 21, 1.5]),
    ("optimizer", "automagic", "bump"): ([0.0, 0.02, 1.0], [-0.1, 1.1]),
    ("optimizer", "automagic", "min_lr"): ([1e-9], [0.0]),
    ("optimizer", "automagic", "max_lr"): ([1e-2], [0.0]),
    ("schedule", "cosine", "end_factor"): ([0, 0.0, 1.0, 0.1], [-0.1, 1.1]),
    ("schedule", "cosine_with_restarts", "cycles"): ([1, 5], [0, 1.5]),
    ("schedule", "polynomial", "power"): ([0.5, 2], [0.0, -1.0]),
    ("schedule", "step", "every"): ([1, 500], [0, 1.5]),
    ("schedule", "step", "factor"): ([0.1, 1.0], [0.0, 1.1]),
    ("schedule", "one_cycle", "start_factor"): ([0.1, 1.0], [0.0, 1.1]),
    ("schedule", "one_cycle", "peak_at"): ([0.0, 0.3], [1.0, -0.1]),
}


@pytest.mark.parametrize(("section", "name", "key"), PARAMS)
def test_params_have_their_ranges_too(section: str, name: str, key: str):
    accepted, outside = PARAMS[section, name, key]
    for value in [*accepted, *outside]:
        needed = {"every": 1} if name == "step" else {}
        values = nested(f"{section}.params", needed | {key: value})
        values[section]["name"] = name
        config, problems = load.validate_config(values, load.dotted_key)
        assert (config is not None) == (value in accepted and type(value) in map(type, accepted)), value
        assert [problem.location for problem in problems] == ([] if config else [f"{section}.params"])


def test_every_param_is_in_that_table():
    optimizer = {("optimizer", key) for spec in OPTIMIZERS.values() for key in spec.params}
    schedule = {("schedule", key) for known in SCHEDULE_PARAMS.values() for key in known}
    assert {(section, key) for section, _, key in PARAMS} == optimizer | schedule


def test_params_cover_every_name():
    """Every optimizer and every schedule has its table of `params`."""

    def choices(option: str) -> set[str]:
        return set(OPTIONS[option].annotation.__args__)

    assert set(OPTIMIZERS) == choices("optimizer.name")
    assert set(SCHEDULE_PARAMS) == choices("schedule.name")


def test_the_line_of_every_key_is_known():
    document = strict_yaml.parse("a: 1\nb:\n  - c: 2\n    d:\n      e: 3\n  - 4\n")
    assert document.lines[("a",)] == 1
    assert document.lines[("b", 0, "c")] == 3
    assert document.lines[("b", 0, "d", "e")] == 5
    assert document.lines[("b", 1)] == 6
    with pytest.raises(YamlError):
        strict_yaml.parse("a: [")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r'data: [{folder: "C:\new\train"}]', r'c.yaml:2: data.0.folder: is "C:\new\train", and a backslash in double'),
        (r'model: {path: "d:\table"}', r'c.yaml:3: model.path: is "d:\table", and a backslash in double'),
        (r'output_dir: "\\nas\new"', r'c.yaml:3: output_dir: is "\\nas\new", and a backslash in double quotes begins'),
        (
            r'data: [{folder: "C:\Users\me"}]',
            "c.yaml:2: has a backslash in double quotes, which begins an escape there",
        ),
        (r'data: [{folder: "\\server\share"}]', "c.yaml:2: has a backslash in double quotes, which begins an escape"),
        ('data:\n- folder: "C:\\train\\"\n  trigger: x', "c.yaml:3: has a backslash in double quotes, which begins"),
        (r'data: [{folder: "data\new"}]', r"c.yaml:2: data.0.folder: is 'data\new', with a line break; a backslash in"),
        (r'model: {extras: "x\tom"}', r"c.yaml:3: model.extras: is 'x\tom', with a tab; a backslash in double quotes"),
        (
            r'cache: {folder: "a\bin"}',
            r"c.yaml:3: cache.folder: is 'a\x08in', with the control character 0x08; a backslash",
        ),
        (r'sample: {extra_loras: ["x\new.safetensors"]}', "c.yaml:3: sample.extra_loras.0"),
        (r'lora: {init_from: "x\new"}', "c.yaml:3: lora.init_from: is 'x"),
        (r'validation: {folder: "x\new"}', "c.yaml:3: validation.folder: is 'x"),
    ],
)
def test_windows_paths_in_double_quotes(text: str, said: str, tmp_path: Path):
    """A Windows path in double quotes, whose backslashes are escapes there, is named with what to write."""
    data = "" if text.startswith("data") else "data: [{folder: x}]\n"
    path = tmp_path / "c.yaml"
    path.write_text(f"name: x\n{data}{text}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(said)
    assert "use single quotes" in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "output_dir: ~/runs",
            "output_dir: is '~/runs', and ~ is not expanded in a config; write the whole path",
        ),
        (r"output_dir: ~\runs", r"output_dir: is '~\runs', and ~ is not expanded in a config"),
        ("data: [{folder: $HOME/x}]", "data.0.folder: is '$HOME/x', and $HOME is not expanded in a config; write the "),
        ("model: {path: '${MODELS}/z.safetensors'}", "model.path: is '${MODELS}/z.safetensors', and ${MODELS} is not"),
        (r"cache: {folder: '%TEMP%\c'}", r"cache.folder: is '%TEMP%\c', and %TEMP% is not expanded in a config; write"),
        ("lora: {init_from: '~'}", "lora.init_from: is '~', and ~ is not expanded in a config"),
        ("sample: {extra_loras: [~/a.safetensors=0.5]}", "sample.extra_loras.0"),
    ],
)
def test_paths_that_a_shell_expands(text: str, said: str, tmp_path: Path):
    """A path with ~ or a variable, which would be a folder of that name here, is named with what to write."""
    data = "" if text.startswith("data") else "data: [{folder: x}]\n"
    (tmp_path / "c.yaml").write_text(f"name: x\n{data}{text}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "c.yaml")
    (problem,) = caught.value.problems
    assert str(problem).partition(": ")[2].startswith(said), problem


@pytest.mark.parametrize(
    "text",
    [r"'C:\new\train'", r"C:\new\train", '"C:/new/train"', r'"C:\\new\\train"', r'"\\\\nas\\new"', r"'\\nas\new'"],
)
def test_windows_paths_that_are_right(text: str):
    """Windows paths in single quotes, without quotes, or with two backslashes each are read as they are."""
    value = strict_yaml.parse(f"folder: {text}")
    assert not value.problems
    assert value.value["folder"].replace("/", "\\") in (r"C:\new\train", r"\\nas\new")


def test_other_escapes_are_read():
    """Escapes that are no Windows path are read as YAML has them."""
    assert strict_yaml.parse(r'a: "one\ntwo\t\"x\""').value == {"a": 'one\ntwo\t"x"'}


@pytest.mark.parametrize(
    "text",
    [
        "loss: {type: huber, delta: 100.0, detail: 2.0}",
        "loss: {min_snr: 5, min_snr_floor: 0.2}\ntimesteps: {type: linear}",
        "loss: {type: pseudo_huber}\nguidance: {differential: 2, contrastive: 3, cfg_zero: true}",
    ],
)
def test_losses_that_are_read(text: str, read):
    """A config written out with every setting is read again as it was."""
    config = read(text)
    assert Config.model_validate(config.model_dump()) == config


def test_settings_that_conflict(read, refused):
    """Settings that do not go together are refused."""
    for text, said in (
        (
            "sample: {prompts: ['a [Trigger]']}",
            "c.yaml:3: sample.prompts.0: has [Trigger], and no trigger is set",
        ),
        ("sample: {negative: 'a [name]'}", "c.yaml:3: sample.negative: has [name], and no trigger is set"),
        ("sample: {prompts: ['a cat -w 512']}", "sample.prompts.0: has -w 512, which would be words"),
        ("sample: {prompts: ['a cat --w 512']}", "sample.prompts.0: has --w 512, which would be words"),
        ("model: {variant: deturbo, adapter: v2}", "c.yaml:3: model.adapter: adapter v2 was made for Turbo"),
        ("sample: {weights: ema}", "sample.weights: ema needs ema.decay"),
        ("optimizer: {name: automagic, params: {min_lr: 0.1, max_lr: 0.01}}", "min_lr is above max_lr"),
        ("loss: {delta: 0.1}", "loss.delta: loss.type mse has no delta; use huber or pseudo_huber, or leave"),
        ("loss: {type: mae, delta: 0.1}", "loss.delta: loss.type mae has no delta"),
        ("loss: {min_snr_floor: 0.1}", "loss.min_snr_floor: needs loss.min_snr; set it, or leave"),
        (
            "loss: {min_snr: 5}",
            "loss.min_snr: timesteps.type: weighted has weights of noise levels already; set timesteps.type",
        ),
        (
            "loss: {type: mae}\nguidance: {differential: 2}",
            "guidance.differential: has no effect with loss.type: mae",
        ),
        ("guidance: {cfg_zero: true}", "guidance.cfg_zero: needs guidance.contrastive; set it"),
        ("guidance: {contrastive: 1, cfg_zero: true}", "guidance.cfg_zero: needs guidance.contrastive"),
        ("guidance: {contrastive_schedule: sigma}", "guidance.contrastive_schedule: needs guidance.contrastive"),
        (
            "train: {method: trajectory_imitation}\nlora: {init_from: x}\nloss: {min_snr: 5}",
            "loss.min_snr: weights noise levels, and trajectory_imitation trains at Turbo's eight; leave",
        ),
        (
            "loss: {min_snr: 5}\ntimesteps: {type: linear, weight: bell}",
            "loss.min_snr: timesteps.weight has weights of noise levels already; leave loss.min_snr out",
        ),
        (
            "train: {method: trajectory_imitation}\nlora: {init_from: x}\ntimesteps: {type: sigmoid, stratified: true}",
            "timesteps.stratified: has no effect with train.method: trajectory_imitation, which trains at",
        ),
        (
            "optimizer: {name: adamw_schedulefree}\nschedule: {name: cosine}",
            "adamw_schedulefree needs no schedule",
        ),
        (
            "optimizer: {name: adamw_schedulefree}\nema: {decay: 0.9}",
            "adamw_schedulefree exports an average",
        ),
        (
            "lora: {type: dora}\nmodel: {adapter: null}\ntrain: {beside: x.safetensors}",
            "lora.type: the change of a DoRA depends on the weights, to which train.beside adds others; leave",
        ),
        (
            "lora: {type: dora}\nmodel: {adapter: null}\ntrain: {method: slider}\nslider: {positive: a}",
            "at the weight -1 is not the reverse of that at +1; set lora.type: lora, lokr or loha",
        ),
        (
            "lora: {type: oft}",
            "lora.type: an OFT that learns beside a training adapter changes Turbo more, once that is removed",
        ),
        ("lora: {type: oft, alpha: 8}", "lora.alpha: alpha is a scale, and a rotation has none; leave it out"),
        ("lora: {type: oft, rank: 1}", "lora.rank: one row cannot be rotated; give a rank of 2 or more"),
        ("lora: {type: dora, rank: null}", "lora.rank: type: dora needs a rank; give a number"),
        ("lora: {type: oft, factor: 8}", "lora.factor: factor is for type: lokr, and type: oft has none; leave it out"),
        ("lora: {type: loha, rslora: true}", "lora.rslora: rslora is for type: lora; leave it out"),
        ("schedule: {name: constant_with_warmup}", "constant_with_warmup needs warmup_steps"),
        ("schedule: {name: one_cycle, warmup_steps: 5}", "one_cycle rises by itself"),
        ("schedule: {name: step}", "step needs params: {every: steps}"),
        ("preserve: {kind: trigger}", "set data.0.trigger, or use blank"),
        ("optimizer: {params: {betas: [0.9, 0.9, 0.9]}}", "betas is [0.9, 0.9, 0.9]; expected 2 numbers"),
        ("optimizer: {name: ademamix, params: {betas: [0.9]}}", "betas is [0.9]; expected 3 numbers"),
    ):
        assert any(said in line for line in refused(text)), (text, refused(text))
    for entry, said in (
        ("{folder: x, regularization: true, trigger: a}", "leave trigger out"),
        ("{folder: x, regularization: true}", "one must show the concept"),
        ("{folder: x, dropout_keeps_trigger: true}", "dropout_keeps_trigger needs a trigger"),
        ("{folder: x, mask_floor: 0.3}", "mask_floor needs a mask"),
        ("{folder: x, keep_tags: 2}", "keep_tags needs shuffle_tags or tag_dropout"),
        ("{metadata: x.jsonl, repeats: by_folder}", "repeats: by_folder needs folder"),
    ):
        assert any(said in line for line in refused(f"name: a\ndata: [{entry}]\n", least="")), entry
