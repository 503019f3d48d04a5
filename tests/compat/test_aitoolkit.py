"""Jobs of AI Toolkit: every key is mapped, without effect or refused, and what comes out is the config it means."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.sweep_values import make_sweep_runs
from zimage_train.compat.aitoolkit import previews
from zimage_train.compat.aitoolkit.convert import write_config
from zimage_train.compat.aitoolkit.keys import FILE, FLAGS, FLAGS_LEFT_OUT, KEYS, TYPOS
from zimage_train.compat.aitoolkit.rules import HandledHere, Mapped, Refused, WithoutEffect
from zimage_train.compat.aitoolkit.sections import _any_of
from zimage_train.compat.formats import read_job_as_config
from zimage_train.config import strict_yaml
from zimage_train.config.load import flatten_keys, read_config, read_config_with_notes
from zimage_train.config.module_groups import BLOCK_MODULES
from zimage_train.config.schema import Config
from zimage_train.diffusion.request import preview_requests
from zimage_train.errors import ConfigError
from zimage_train.lora import targets
from zimage_train.models.arch import TransformerShape

from config_texts import OPTIONS

HERE = Path(__file__).parent
FRESH = HERE / "aitoolkit_jobs" / "turbo.yaml"
TURBO, BASE, DETURBO = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image", "ostris/Z-Image-De-Turbo"
ADAPTER = "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v{}.safetensors"

PLAIN: dict[str, Any] = {
    "job": "extension",
    "config": {
        "name": "a",
        "process": [
            {
                "type": "sd_trainer",
                "training_folder": "out",
                "network": {"type": "lora"},
                "train": {"noise_scheduler": "flowmatch", "dtype": "bf16"},
                "model": {"name_or_path": TURBO},
                "save": {"dtype": "bf16"},
                "datasets": [{"folder_path": "photos"}],
                "sample": {"samples": [{"prompt": "a cat"}]},
            }
        ],
    },
}
"""The least job, with the class defaults of AI Toolkit for the rest; nothing about it is worth a note."""


def job(**settings: Any) -> dict[str, Any]:
    """The least job with more settings, such as `{"datasets[].flip_x": True}`; None takes a key away."""
    values = copy.deepcopy(PLAIN)
    for key, value in settings.items():
        target: Any = values if key in FILE else values["config"]["process"][0]
        *sections, last = key.split(".")
        for part in sections:
            target = target[part[:-2]][0] if part.endswith("[]") else target.setdefault(part, {})
        target[last] = value
    return values


def write(folder: Path, values: dict[str, Any] | str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else strict_yaml.dump(values), encoding="utf-8")
    return path


@pytest.fixture
def read(tmp_path: Path):
    """`read(values)`: the settings of the config, flat, and the notes."""

    def run(values: dict[str, Any] | str, *overrides: str, name: str = "job.yaml") -> tuple[dict[str, Any], list[str]]:
        config, notes = read_config_with_notes(write(tmp_path, values, name), overrides)
        return flatten_keys(config.model_dump()), notes

    return run


@pytest.fixture
def refused(tmp_path: Path):
    """`refused(values)`: the lines with which a job is refused, the file called job.yaml."""

    def run(values: dict[str, Any] | str, *overrides: str, name: str = "job.yaml") -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read_config(write(tmp_path, values, name), overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return run


@pytest.fixture
def changed(read):
    """`changed({key: value})`: the settings in which the config differs from that of the least job, and the notes."""
    plain, notes = read(PLAIN)
    assert notes == []

    def run(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        values, notes = read(job(**settings))
        return {key: values.get(key) for key in values | plain if values.get(key) != plain.get(key)}, notes

    return run


# The table


def listed_keys() -> list[str]:
    keys: list[str] = []
    for line in (FRESH.parent / "keys.txt").read_text().splitlines():
        if not line.startswith("#"):
            section, _, words = line.partition(":")
            keys += [f"{section}.{name}" if section else name for name in words.split()]
    return keys


def test_every_key_of_a_job_has_a_row():
    keys = listed_keys()
    assert len(keys) == len(set(keys)) > 300
    assert set(keys) - set(KEYS) == set()


def test_rows_lead_to_settings_that_exist():
    sections = {name.rsplit(".", 1)[0] for name in OPTIONS}
    for key, row in KEYS.items():
        if isinstance(row, Mapped):
            for to in row.to.split(", ") if row.to else []:
                assert to in OPTIONS or to in sections or to == "sample.prompts", key
    assert set(TYPOS.values()) <= {key.split(".")[-1] for key in KEYS}
    assert set(FLAGS.values()) <= {key.split(".")[-1] for key in KEYS if key.startswith("sample.samples[]")}


MAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "config.name": ({}, {"name": "b"}),
    "name": ({"name": "b"}, {"name": "b"}),
    "training_folder": ({"training_folder": "runs/x"}, {"output_dir": "runs/x"}),
    "training_seed": ({"training_seed": 7}, {"seed": 7}),
    "trigger_word": (
        {"trigger_word": "zchar"},
        {"data.0.trigger": "zchar", "data.0.dropout_keeps_trigger": True},
    ),
    "network.pretrained_lora_path": ({"network.pretrained_lora_path": "a.st"}, {"lora.init_from": "a.st"}),
    "network.type": ({"network.type": "lokr"}, {"lora.type": "lokr", "lora.rank": None, "lora.factor": "auto"}),
    "network.lokr_factor": (
        {"network.type": "lokr", "network.lokr_factor": 8},
        {"lora.type": "lokr", "lora.rank": None, "lora.factor": 8},
    ),
    "network.lokr_full_rank": (
        {"network.type": "lokr", "network.lokr_full_rank": False, "network.linear": 8},
        {"lora.type": "lokr", "lora.rank": 8, "lora.factor": "auto"},
    ),
    "network.linear": ({"network.linear": 32}, {"lora.rank": 32}),
    "network.rank": ({"network.rank": 8, "network.linear": 8}, {"lora.rank": 8}),
    "network.dropout": ({"network.dropout": 0.1}, {"lora.dropout": 0.1}),
    "network.transformer_only": ({"network.transformer_only": False}, {"lora.targets": ".*"}),
    "network.network_kwargs.rank_dropout": (
        {"network.network_kwargs.rank_dropout": 0.25},
        {"lora.rank_dropout": 0.25},
    ),
    "network.network_kwargs.ignore_if_contains": (
        {"network.network_kwargs.ignore_if_contains": ["adaLN", "feed_forward", "to_k", "to_q", "to_v"]},
        {"lora.targets": r"layers\.\d+\.attention\.to_out\.0"},
    ),
    "network.network_kwargs.only_if_contains": (
        {"network.network_kwargs.only_if_contains": ["layers.7."]},
        {"lora.targets": r"layers\.7\." + _any_of([re.escape(one) for one in BLOCK_MODULES])},
    ),
    "save.save_every": ({"save.save_every": 100}, {"save.every": 100}),
    "save.max_step_saves_to_keep": ({"save.max_step_saves_to_keep": 9}, {"save.keep": 9}),
    "save.dtype": ({"save.dtype": "float32"}, {"save.dtype": "fp32"}),
    "train.steps": ({"train.steps": 2000}, {"train.steps": 2000}),
    "train.batch_size": ({"train.batch_size": 2}, {"train.batch_size": 2}),
    "train.gradient_accumulation": ({"train.gradient_accumulation": 4}, {"train.grad_accumulation": 4}),
    "train.max_grad_norm": ({"train.max_grad_norm": 0.5}, {"train.max_grad_norm": 0.5}),
    "train.dtype": ({"train.dtype": "float"}, {"model.dtype": "fp32"}),
    "train.lr": ({"train.lr": 1e-4}, {"optimizer.lr": 1e-4}),
    "train.optimizer": (
        {"train.optimizer": "Adam"},
        {"optimizer.name": "adam", "optimizer.weight_decay": 0.0},
    ),
    "train.optimizer_params": (
        {"train.optimizer_params": {"weight_decay": 0.1, "betas": [0.9, 0.99], "eps": 1e-8}},
        {"optimizer.weight_decay": 0.1, "optimizer.params.betas": [0.9, 0.99], "optimizer.params.eps": 1e-8},
    ),
    "train.lr_scheduler": (
        {"train.lr_scheduler": "constant_with_warmup"},
        {"schedule.name": "constant_with_warmup", "schedule.warmup_steps": 1000},
    ),
    "train.lr_scheduler_params": (
        {"train.lr_scheduler": "cosine", "train.lr_scheduler_params": {"eta_min": 1e-7}},
        {"schedule.name": "cosine", "schedule.params": None, "schedule.params.end_factor": pytest.approx(0.1)},
    ),
    "train.ema_config.use_ema": (
        {"train.ema_config.use_ema": True},
        {"ema.decay": 0.999, "sample.weights": "ema"},
    ),
    "train.ema_config.ema_decay": (
        {"train.ema_config.use_ema": True, "train.ema_config.ema_decay": 0.99},
        {"ema.decay": 0.99, "sample.weights": "ema"},
    ),
    "train.unload_text_encoder": ({"train.unload_text_encoder": True, "train.cache_text_embeddings": True}, {}),
    "train.cache_text_embeddings": (
        {"train.cache_text_embeddings": True, "datasets[].trigger_word": "zchar"},
        {"data.0.trigger": "zchar", "data.0.dropout_keeps_trigger": True},
    ),
    "train.noise_scheduler": ({"train.noise_scheduler": "flowmatch"}, {}),
    "train.timestep_type": ({"train.timestep_type": "weighted"}, {"timesteps.type": "weighted"}),
    "train.content_or_style": ({"train.content_or_style": "content"}, {"timesteps.bias": "high_noise"}),
    "train.linear_timesteps": (
        {"train.linear_timesteps": True},
        {"timesteps.type": "linear", "timesteps.weight": "bell"},
    ),
    "train.noise_offset": ({"train.noise_offset": 0.05}, {"timesteps.offset_noise": 0.05}),
    "train.min_denoising_steps": (
        {"train.min_denoising_steps": 200, "train.timestep_type": "linear"},
        {"timesteps.type": "linear", "timesteps.max": 0.8},
    ),
    "train.max_denoising_steps": (
        {"train.max_denoising_steps": 799, "train.timestep_type": "linear"},
        {"timesteps.type": "linear", "timesteps.min": 0.2},
    ),
    "train.do_differential_guidance": ({"train.do_differential_guidance": True}, {"guidance.differential": 3.0}),
    "train.differential_guidance_scale": (
        {"train.do_differential_guidance": True, "train.differential_guidance_scale": 5},
        {"guidance.differential": 5.0},
    ),
    "train.do_guidance_loss": ({"train.do_guidance_loss": True}, {"guidance.contrastive": 3.0}),
    "train.guidance_loss_target": (
        {"train.do_guidance_loss": True, "train.guidance_loss_target": 4},
        {"guidance.contrastive": 4.0},
    ),
    "train.do_guidance_loss_cfg_zero": (
        {"train.do_guidance_loss": True, "train.do_guidance_loss_cfg_zero": True},
        {"guidance.contrastive": 3.0, "guidance.cfg_zero": True},
    ),
    "train.guidance_loss_schedule": (
        {"train.do_guidance_loss": True, "train.guidance_loss_schedule": "sigma"},
        {"guidance.contrastive": 3.0, "guidance.contrastive_schedule": "sigma"},
    ),
    "train.loss_type": (
        {"train.loss_type": "pseudo_huber"}, {"loss.type": "pseudo_huber", "loss.delta": 0.01},
    ),
    "train.diff_output_preservation": (
        {"train.diff_output_preservation": True, "train.diff_output_preservation_class": "dog",
         "datasets[].trigger_word": "zdog"},
        {"preserve.kind": "trigger", "preserve.class_word": "dog", "data.0.trigger": "zdog"},
    ),
    "train.diff_output_preservation_class": (
        {"train.diff_output_preservation_class": "dog"}, {},
    ),
    "train.diff_output_preservation_multiplier": (
        {"train.diff_output_preservation": True, "train.diff_output_preservation_class": "person",
         "train.diff_output_preservation_multiplier": 0.5, "datasets[].trigger_word": "zchar"},
        {"preserve.kind": "trigger", "preserve.weight": 0.5, "data.0.trigger": "zchar"},
    ),
    "train.blank_prompt_preservation": ({"train.blank_prompt_preservation": True}, {"preserve.kind": "blank"}),
    "train.blank_prompt_preservation_multiplier": (
        {"train.blank_prompt_preservation": True, "train.blank_prompt_preservation_multiplier": 2},
        {"preserve.kind": "blank", "preserve.weight": 2.0},
    ),
    "train.inverted_mask_prior": (
        {"train.inverted_mask_prior": True, "datasets[].alpha_mask": True},
        {"data.0.mask": "alpha", "data.0.mask_floor": 0.0, "data.0.mask_prior": 0.5},
    ),
    "train.inverted_mask_prior_multiplier": (
        {"train.inverted_mask_prior": True, "datasets[].alpha_mask": True, "train.inverted_mask_prior_multiplier": 1},
        {"data.0.mask": "alpha", "data.0.mask_floor": 0.0, "data.0.mask_prior": 1.0},
    ),
    "train.skip_first_sample": ({"train.skip_first_sample": True}, {"sample.first": False}),
    "train.disable_sampling": ({"train.disable_sampling": True}, {"sample.first": False, "sample.every": None}),
    "model.name_or_path": (
        {"model.name_or_path": DETURBO},
        {"model.variant": "deturbo"},
    ),
    "model.extras_name_or_path": ({"model.extras_name_or_path": "extras"}, {"model.extras": "extras"}),
    "model.arch": (
        {"model.arch": "zimage:deturbo", "model.name_or_path": "models/mine"},
        {"model.variant": "deturbo", "model.path": "models/mine"},
    ),
    "model.assistant_lora_path": ({"model.assistant_lora_path": ADAPTER.format(1)}, {"model.adapter": "v1"}),
    "model.quantize": ({"model.quantize": True}, {"model.quantize": "auto"}),
    "model.qtype": ({"model.quantize": True, "model.qtype": "uint4"}, {"model.quantize": "auto"}),
    "datasets[].folder_path": ({"datasets[].folder_path": "pics"}, {"data.0.folder": "pics"}),
    "datasets[].dataset_path": ({"datasets[].dataset_path": "pics"}, {"data.0.folder": "pics"}),
    "datasets[].resolution": ({"datasets[].resolution": [512, 768]}, {"data.0.resolution": [512, 768]}),
    "datasets[].num_repeats": ({"datasets[].num_repeats": 3}, {"data.0.repeats": 3}),
    "datasets[].batch_size": ({"datasets[].batch_size": 2}, {"data.0.batch_size": 2}),
    "datasets[].trigger_word": ({"datasets[].trigger_word": "zchar"}, {"data.0.trigger": "zchar"}),
    "datasets[].default_caption": ({"datasets[].default_caption": "a man"}, {"data.0.default_caption": "a man"}),
    "datasets[].caption_ext": ({"datasets[].caption_ext": "caption"}, {"data.0.caption_ext": ".caption"}),
    "datasets[].caption_type": ({"datasets[].caption_type": ".md"}, {"data.0.caption_ext": ".md"}),
    "datasets[].caption_dropout_rate": ({"datasets[].caption_dropout_rate": 0.1}, {"data.0.caption_dropout": 0.1}),
    "datasets[].cache_text_embeddings": (
        {"datasets[].cache_text_embeddings": True, "datasets[].trigger_word": "zchar"},
        {"data.0.trigger": "zchar", "data.0.dropout_keeps_trigger": True},
    ),
    "datasets[].shuffle_tokens": ({"datasets[].shuffle_tokens": True}, {"data.0.shuffle_tags": True}),
    "datasets[].keep_tokens": (
        {"datasets[].keep_tokens": 2, "datasets[].token_dropout_rate": 0.1},
        {"data.0.keep_tags": 2, "data.0.tag_dropout": 0.1},
    ),
    "datasets[].token_dropout_rate": ({"datasets[].token_dropout_rate": 0.1}, {"data.0.tag_dropout": 0.1}),
    "datasets[].flip_x": ({"datasets[].flip_x": True}, {"data.0.flip": True}),
    "datasets[].loss_multiplier": ({"datasets[].loss_multiplier": 0.5}, {"data.0.weight": 0.5}),
    "datasets[].mask_path": (
        {"datasets[].mask_path": "masks"},
        {"data.0.mask": "masks", "data.0.mask_floor": 0.0},
    ),
    "datasets[].alpha_mask": (
        {"datasets[].alpha_mask": True, "datasets[].mask_path": "masks"},
        {"data.0.mask": "alpha", "data.0.mask_floor": 0.0},
    ),
    "datasets[].mask_min_value": (
        {"datasets[].alpha_mask": True, "datasets[].mask_min_value": 0.2},
        {"data.0.mask": "alpha", "data.0.mask_floor": 0.2},
    ),
    "sample.sample_every": ({"sample.sample_every": 50}, {"sample.every": 50}),
    "sample.prompts": (
        {"sample.samples": None, "sample.prompts": ["a dog"]},
        {"sample.prompts.0.prompt": "a dog"},
    ),
    "sample.width": ({"sample.width": 770}, {"sample.width": 768}),
    "sample.height": ({"sample.height": 20}, {"sample.height": 64}),
    "sample.neg": ({"sample.neg": "blur"}, {"sample.negative": "blur"}),
    "sample.seed": ({"sample.seed": 9}, {"sample.seed": 9, "sample.prompts.0.seed": 9}),
    "sample.walk_seed": ({"sample.walk_seed": True}, {"sample.prompts.0.seed": None}),
    "sample.guidance_scale": ({"sample.guidance_scale": 3.5}, {"sample.guidance": 2.5}),
    "sample.sample_steps": ({"sample.sample_steps": 25}, {"sample.steps": 25}),
    "sample.samples[].prompt": ({"sample.samples[].prompt": "a dog"}, {"sample.prompts.0.prompt": "a dog"}),
    "sample.samples[].width": ({"sample.samples[].width": 700}, {"sample.prompts.0.width": 688}),
    "sample.samples[].height": ({"sample.samples[].height": 704}, {"sample.prompts.0.height": 704}),
    "sample.samples[].neg": ({"sample.samples[].neg": "fog"}, {"sample.prompts.0.negative": "fog"}),
    "sample.samples[].seed": ({"sample.samples[].seed": 5}, {"sample.prompts.0.seed": 5}),
    "sample.samples[].guidance_scale": ({"sample.samples[].guidance_scale": 1}, {"sample.guidance": 0.0}),
    "sample.samples[].sample_steps": ({"sample.samples[].sample_steps": 8}, {"sample.steps": 8}),
    "logging.use_wandb": ({"logging.use_wandb": True}, {"log.wandb": "ai-toolkit"}),
    "logging.project_name": ({"logging.use_wandb": True, "logging.project_name": "faces"}, {"log.wandb": "faces"}),
}  # fmt: skip
"""Mapped key -> settings of a job that has it, and exactly what they change."""
ELSEWHERE = {
    "config.process": "test_a_job_has_one_process",
    "datasets[].is_reg": "test_regularization_images",
    "datasets[].prior_reg": "test_regularization_images",
    "train.reg_weight": "test_regularization_images",
}


@pytest.mark.parametrize("key", [key for key in MAPPED if key != "config.name"])
def test_mapped_keys_change_their_setting(key: str, changed):
    """A mapped key changes the settings that it stands for, and nothing else."""
    settings, expected = MAPPED[key]
    assert changed(settings)[0] == expected


def test_a_dora_is_imported(changed):
    """A DoRA keeps its rank, and loses the dropout that it has there."""
    settings = {"network.type": "dora", "network.linear": 8, "network.dropout": 0.1}
    assert changed(settings)[0] == {"lora.type": "dora", "lora.rank": 8}


def test_mapped_keys_are_all_tested():
    """Every mapped key is in the table above, or in a test of its own."""
    mapped = {key for key, row in KEYS.items() if isinstance(row, Mapped)}
    assert mapped == MAPPED.keys() | ELSEWHERE.keys()
    assert set(ELSEWHERE.values()) <= globals().keys()


NOT_MAPPED = {key: row for key, row in KEYS.items() if isinstance(row, WithoutEffect | HandledHere | Refused)}


@pytest.mark.parametrize("key", NOT_MAPPED)
def test_neutral_values_are_silent(key: str, changed):
    for value in (None, *NOT_MAPPED[key].neutral):
        assert changed({key: value}) == ({}, []), value


@pytest.mark.parametrize("key", [key for key, row in NOT_MAPPED.items() if not isinstance(row, Refused)])
def test_keys_without_effect(key: str, changed):
    """Keys without effect are named, and change nothing."""
    difference, notes = changed({key: "odd"})
    row, shown = NOT_MAPPED[key], key.replace("[]", ".0")
    assert isinstance(row, WithoutEffect | HandledHere) and difference == {}
    head = "no effect in AI Toolkit either" if isinstance(row, WithoutEffect) else "left out"
    assert notes == [f"{head}: {shown} ({row.why})"]


@pytest.mark.parametrize("key", [key for key, row in NOT_MAPPED.items() if isinstance(row, Refused)])
def test_refused_keys(key: str, refused):
    """Refused keys are named with their line."""
    row, shown = NOT_MAPPED[key], key.replace("[]", ".0")
    assert isinstance(row, Refused)
    values = job(**{key: "odd"})
    lines = strict_yaml.dump(values).splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "odd" in text)
    assert refused(values) == [f"job.yaml:{line}: {shown}: is 'odd' (text) ({row.why}); {row.hint}"]


# Whole jobs


def test_a_fresh_job_of_the_web_form():
    config, notes = read_config_with_notes(FRESH)
    assert config == Config.model_validate(
        {
            "name": "my_first_lora_v1",
            "output_dir": "out",
            "model": {"variant": "turbo", "adapter": "v2", "dtype": "bf16", "quantize": "auto"},
            "data": [
                {
                    "folder": "photos",
                    "resolution": [512, 768, 1024],
                    "caption_dropout": 0.05,
                    "repeat_equal_sizes": True,
                }
            ],
            "lora": {"rank": 32, "targets": ["attention", "feed_forward", "adaln"]},
            "train": {"steps": 3000},
            "timesteps": {"type": "weighted"},
            "optimizer": {"name": "adamw8bit", "lr": 1e-4, "weight_decay": 1e-4, "params": {"eps": 1e-6}},
            "sample": {
                "every": 250,
                "prompts": ["a lighthouse at dusk", "a bowl of cherries on a blue table"],
                "steps": 8,
                "guidance": 0.0,
                "seed": 42,
            },
            "save": {"every": 250, "keep": 4},
        }
    )
    assert any("network.linear_alpha" in note and "alpha is the rank" in note for note in notes)
    assert any(note.startswith("sample.sample_steps 9 becomes 8") for note in notes)
    assert any(note.startswith("datasets.0.resolution counts fully for small images, as there") for note in notes)


def test_defaults_are_those_of_ai_toolkit(read):
    """Keys that a job leaves out have the defaults of AI Toolkit's classes."""
    values, _ = read(PLAIN)
    expected = {
        "output_dir": "out", "model.variant": "turbo", "model.adapter": None, "model.quantize": None,
        "data.0.resolution": [512], "data.0.caption_dropout": 0.0, "data.0.caption_ext": ".txt", "data.0.repeats": 1,
        "lora.rank": 4, "lora.targets": ["attention", "feed_forward", "adaln"], "train.steps": 1000,
        "train.batch_size": 1, "train.grad_accumulation": 1, "train.max_grad_norm": 1.0, "timesteps.type": "sigmoid",
        "timesteps.bias": "balanced", "timesteps.min": 0.0, "timesteps.max": 1.0, "optimizer.name": "adamw",
        "optimizer.lr": 1e-6, "optimizer.weight_decay": 0.01, "optimizer.params.eps": 1e-6, "schedule.name": "constant",
        "ema.decay": None, "sample.every": 100, "sample.width": 512, "sample.height": 512, "sample.steps": 20,
        "sample.guidance": 6.0, "sample.seed": 0, "sample.prompts.0.seed": 0, "save.every": 1000, "save.keep": 5,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected


def test_defaults_that_matter_are_noted(read):
    """Keys that are left out and matter are noted."""
    values = job(**{"train.dtype": None, "save.dtype": None, "train.noise_scheduler": None})
    config, notes = read(values)
    assert config["model.dtype"] == "fp32" and config["save.dtype"] == "bf16"
    assert [note.split()[0] for note in notes] == ["train.dtype", "train.noise_scheduler", "save.dtype"]


@pytest.mark.parametrize(
    ("settings", "variant", "path"),
    [
        ({"model.name_or_path": TURBO}, "turbo", None),
        ({"model.name_or_path": BASE}, "base", None),
        ({"model.name_or_path": DETURBO, "model.extras_name_or_path": TURBO}, "deturbo", None),
        ({"model.name_or_path": "/models/Z-Image-De-Turbo/"}, "deturbo", "/models/Z-Image-De-Turbo/"),
        ({"model.name_or_path": "models/z_image_turbo_bf16.safetensors"}, "turbo",
         "models/z_image_turbo_bf16.safetensors"),
        ({"model.name_or_path": "models/z-image-base"}, "base", "models/z-image-base"),
        ({"model.name_or_path": "models/Z-Image/transformer"}, "base", "models/Z-Image/transformer"),
        ({"model.name_or_path": "x/mine", "model.arch": "zimage:turbo"}, "turbo", "x/mine"),
        ({"model.name_or_path": "x/mine", "model.arch": "zimage:base"}, "base", "x/mine"),
        ({"model.name_or_path": "x/mine", "model.arch": "zimage", "model.assistant_lora_path": "a.safetensors"},
         "turbo", "x/mine"),
    ],
)  # fmt: skip
def test_variant_of_a_job(settings, variant, path, read):
    """The variant follows from the model's name, the architecture's tag or the adapter."""
    values, _ = read(job(**settings))
    assert (values["model.variant"], values["model.path"], values["model.extras"]) == (variant, path, None)


HASH = "f332072aa78be7aecdf3ee76d5c247082da564a6"


@pytest.mark.parametrize(
    ("repository", "variant"),
    [("Tongyi-MAI--Z-Image", "base"), ("Tongyi-MAI--Z-Image-Turbo", "turbo"), ("ostris--Z-Image-De-Turbo", "deturbo")],
)
@pytest.mark.parametrize("end", ["", "/", "/transformer", "/transformer/"])
@pytest.mark.parametrize("root", ["/home/x/.cache/huggingface/hub", "C:/Users/x/.cache/huggingface/hub", "turbo"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_variant_in_the_hub_cache(repository, variant, end, root, separator, read):
    """A path into the hub's cache names its model, on Linux and on Windows."""
    path = f"{root}/models--{repository}/snapshots/{HASH}{end}".replace("/", separator)
    values, _ = read(job(**{"model.name_or_path": path, "model.arch": "zimage"}))
    assert (values["model.variant"], values["model.path"]) == (variant, path)


def test_unknown_model_in_the_hub_cache(refused):
    """A snapshot of another repository may be any member of the family."""
    path = f"/hub/models--x--mine/snapshots/{HASH}"
    (line,) = refused(job(**{"model.name_or_path": path, "model.arch": "zimage"}))
    assert f"model.name_or_path: is '{path}', which may be any member" in line


@pytest.mark.parametrize("variant", [BASE, DETURBO])
@pytest.mark.parametrize(
    "adapter", [ADAPTER.format(1), ADAPTER.format(2), "D:\\x\\zimage_turbo_training_adapter_v2.safetensors"]
)
def test_adapter_on_another_variant(variant: str, adapter: str, refused):
    """An adapter of Turbo beside another variant is refused, with the key and the line of the job."""
    values = job(**{"model.name_or_path": variant, "model.assistant_lora_path": adapter})
    number = next(n for n, line in enumerate(strict_yaml.dump(values).splitlines(), 1) if "assistant_lora" in line)
    (line,) = refused(values)
    assert line.startswith(f"job.yaml:{number}: model.assistant_lora_path: adapter ")
    assert "was made for Turbo and would harm" in line


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"datasets[].is_reg": True, "trigger_word": "x"}, "datasets"),
        ({"sample.samples[].prompt": "a [Trigger]"}, "sample.samples.0"),
        ({"sample.samples[].prompt": "a cat -w 512"}, "sample.samples.0"),
        ({"sample.neg": "a [NAME]"}, "sample.neg"),
        ({"train.min_denoising_steps": 500, "train.max_denoising_steps": 500}, "train.max_denoising_steps"),
    ],
)
def test_conflicts_name_the_key_of_the_job(settings, key: str, refused):
    """Settings of a job that do not go together are named by its key, with its line."""
    assert re.match(rf"job\.yaml:\d+: {re.escape(key)}", refused(job(**settings))[0])


def test_notes_name_the_keys_that_are_there(read):
    """A note on a prompt names the list that it is in; CFG scales 0 and 1 are the same, so they are not noted."""
    prompts = ["a --l 0", "b --l 1 --d -1", "c --l 4"]
    _, notes = read(job(**{"sample.samples": None, "sample.prompts": prompts, "sample.guidance_scale": 1}))
    said = [note for note in notes if note.startswith("sample.")]
    assert [note.split(";")[0].split(",")[0] for note in said] == [
        "sample.prompts.2 asks for guidance_scale 4",
        "sample.prompts.1 asks for seed -1",
    ]


@pytest.mark.parametrize(("resolution", "is_noted"), [(512, False), ([512], False), ([512, 768], True)])
def test_small_images_weigh_as_there(resolution, is_noted: bool, read):
    """Each resolution counts for small images too, as in AI Toolkit, which a note says where there are several."""
    values, notes = read(job(**{"datasets[].resolution": resolution}))
    assert values["data.0.repeat_equal_sizes"] is True
    assert any("repeat_equal_sizes: true" in note for note in notes) is is_noted


def test_variant_that_is_unclear(refused):
    """If a model may be any member of the family, the user is asked to say which."""
    (line,) = refused(job(**{"model.name_or_path": "x/mine", "model.arch": "zimage"}))
    assert "model.name_or_path: is 'x/mine', which may be any member of the family; set model.arch" in line


@pytest.mark.parametrize("arch", ["flux", "zimage_l2p", "sdxl", "qwen_image:2509"])
def test_other_families_are_refused(arch: str, refused):
    (line,) = refused(job(**{"model.arch": arch}))
    assert f"model.arch: is '{arch}'" in line


@pytest.mark.parametrize(("path", "adapter"), [(ADAPTER.format(2), "v2"), ("here/a.safetensors", "here/a.safetensors")])
def test_the_adapter_is_named_or_a_path(path: str, adapter: str, read):
    assert read(job(**{"model.assistant_lora_path": path}))[0]["model.adapter"] == adapter


def test_problems_are_reported_at_once(refused):
    """All problems are reported at once, each with its line."""
    text = FRESH.read_text()
    for old, new in (
        ("steps: 3000", "steps: many"),
        ("lr: 0.0001", "learning_rate: 0.0001"),
        ("loss_type: mse", "loss_type: stepped\n        min_snr_gamma: 5.0"),
        ("arch: zimage:turbo", "is_flux: true"),
        ("keep: 4", "keep: 0"),
        ("name: my_first_lora_v1", "name: mine-12"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    lines = refused(text)
    number = {name: n for n, line in enumerate(text.splitlines(), 1) for name in [line.split(":")[0].strip(" -")]}
    assert [line.split(": ")[:2] for line in lines] == [
        [f"job.yaml:{number[key.split('.')[-1]] if key != 'config.name' else 4}", key]
        for key in (
            "config.name", "save.max_step_saves_to_keep", "train.steps", "train.learning_rate", "train.loss_type",
            "train.min_snr_gamma", "model.is_flux",
        )
    ]  # fmt: skip
    assert lines[3].endswith("unknown key; did you mean lr?")
    assert lines[2].endswith("is 'many' (text); expected a whole number")
    assert lines[0].endswith("is 'mine-12'; it may not end in -digits, which marks the LoRA of a step")


@pytest.mark.parametrize(
    ("loss_type", "guided", "expected", "noted"),
    [
        ("mae", False, {"loss.type": "mae"}, None),
        ("mae", True, {"loss.type": "mae"}, "gradient of mae"),
        ("wavelet", True, {"guidance.differential": 3.0}, "acts here"),
        ("pseudo_huber", True, {"loss.type": "pseudo_huber", "guidance.differential": 3.0}, "acts here"),
    ],
)
def test_loss_types(loss_type: str, guided: bool, expected: dict, noted: str | None, read):
    """AI Toolkit's losses keep their meaning; its Haar wavelet is the mean square."""
    values, notes = read(job(**{"train.loss_type": loss_type, "train.do_differential_guidance": guided}))
    defaults = {"loss.type": "mse", "guidance.differential": None}
    for key, default in defaults.items():
        assert values.get(key, default) == expected.get(key, default)
    notes = [note for note in notes if "guidance" in str(note)]
    assert (noted is None and not notes) or noted in str(notes)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"train.learning_rate": 1}, "train.learning_rate: unknown key; did you mean lr?"),
        ({"train.gradient_acumulation": 1}, "train.gradient_acumulation: unknown key; did you mean"),
        ({"train.rank": 4}, "train.rank: unknown key; did you mean network.rank?"),
        ({"datasets[].repeats": 4}, "datasets.0.repeats: unknown key; did you mean num_repeats?"),
        ({"learning_rate": 4}, "learning_rate: unknown key; did you mean train.lr?"),
        ({"folder_path": "x"}, "folder_path: unknown key; did you mean datasets.0.folder_path?"),
        ({"sample.samples[].promt": "x"}, "sample.samples.0.promt: unknown key; did you mean prompt?"),
        ({"train.zzz": 1}, "train.zzz: unknown key; AI Toolkit has no such key; remove it"),
        ({"network.network_kwargs.ignore_if": []}, "network.network_kwargs.ignore_if: unknown key; did you mean"),
    ],
)
def test_unknown_keys_are_refused(settings, hint, refused):
    """Unknown keys are refused, with the key that was meant."""
    (line,) = refused(job(**settings))
    assert hint in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.steps": 1.5}, "train.steps: is 1.5; expected a whole number"),
        ({"train.lr": "fast"}, "train.lr: is 'fast' (text); expected a number"),
        ({"train.lr": float("inf")}, "train.lr: is inf; expected a finite number"),
        ({"train.lr": -1.0}, "train.lr: is -1.0; expected more than 0"),
        ({"datasets[].flip_x": 3}, "datasets.0.flip_x: is 3; expected true or false"),
        ({"datasets[].resolution": 500}, "datasets.0.resolution"),
        ({"trigger_word": 12}, "trigger_word: is 12; expected text"),
        ({"train": 5}, "train: is 5; expected a section"),
        ({"datasets": {"folder_path": "x"}}, "datasets: is a section; expected a list of sections"),
        ({"sample.prompts": "x"}, "sample.prompts: is 'x' (text); expected a list of texts"),
        ({"train.content_or_style": "both"}, "expected one of balanced, content, style"),
        ({"train.optimizer_params": {"beta": 1}}, "train.optimizer_params: adamw has no 'beta'; it has betas, eps"),
    ],
)
def test_wrong_values_are_refused(settings, message, refused):
    """Wrong values are refused, named by the job's keys."""
    assert any(message in line for line in refused(job(**settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.optimizer": "dadaptation"}, "train.optimizer: is 'dadaptation'"),
        ({"train.optimizer": "automagic3"}, "train.optimizer: is 'automagic3'"),
        ({"train.lr_scheduler": "piecewise_constant"}, "train.lr_scheduler: is 'piecewise_constant'"),
        ({"train.lr_scheduler": "cosine", "train.lr_scheduler_params": {"warmup": 3}},
         "train.lr_scheduler_params.warmup: is unknown to cosine"),
        ({"train.lr_scheduler_params": {"factor": 0.5}}, "train.lr_scheduler_params.factor: scales the whole run"),
        ({"train.lr_scheduler": "linear", "train.lr_scheduler_params": {"start_factor": 0.1}}, "start_factor: is 0.1"),
        ({"train.timestep_type": "lognorm_blend"}, "train.timestep_type: is 'lognorm_blend'"),
        ({"train.noise_scheduler": "ddpm"}, "train.noise_scheduler: is 'ddpm'"),
        ({"train.max_denoising_steps": 0}, "train.max_denoising_steps: is 0, after 0"),
        ({"train.unload_text_encoder": True}, "train.unload_text_encoder: makes AI Toolkit train on the trigger alone"),
        ({"train.do_guidance_loss": True, "train.guidance_loss_target": [2, 4]}, "guidance_loss_target: is a range"),
        ({"train.diff_output_preservation": True}, "train.diff_output_preservation: needs a trigger"),
        ({"train.diff_output_preservation": True, "trigger_word": "z"}, "diff_output_preservation_class: is empty"),
        ({"train.diff_output_preservation": True, "train.blank_prompt_preservation": True, "trigger_word": "z",
          "train.diff_output_preservation_class": "man"}, "train.blank_prompt_preservation: is on, and"),
        ({"network": None}, "network: is missing, so AI Toolkit would train the whole model"),
        ({"network.transformer_only": False, "network.network_kwargs": {"only_if_contains": ["x"]}},
         "network.transformer_only: is false beside network_kwargs"),
        ({"network.type": "lokr", "network.network_kwargs": {"rank_dropout": 0.1}},
         "network.network_kwargs.rank_dropout: is not possible here with a LoKr"),
        ({"network.network_kwargs": {"only_if_contains": ["double"]}}, "network.network_kwargs: leaves no module"),
        ({"model.qtype": "uint3|a/b/c.safetensors"}, "model.qtype: names an accuracy recovery adapter"),
        ({"model.name_or_path": None}, "model.name_or_path: is missing"),
        ({"model.assistant_lora_path": ADAPTER.format(2), "model.name_or_path": BASE}, "adapter v2 was made for Turbo"),
        ({"datasets": None}, "datasets: is missing"),
        ({"datasets": []}, "datasets: is empty"),
        ({"datasets[].folder_path": None}, "datasets.0.folder_path: is missing"),
        ({"datasets[].dataset_path": "captions.json"}, "datasets.0.dataset_path: is a .json of captions"),
        ({"training_folder": None}, "training_folder: is missing"),
        ({"sample.samples[].prompt": None}, "sample.samples.0.prompt: is missing"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused(settings, message, refused):
    """Settings that cannot be honoured are refused, with a problem for each."""
    (line,) = refused(job(**settings))
    assert message in line


def test_a_job_has_one_process(refused):
    values = copy.deepcopy(PLAIN)
    values["config"]["process"] *= 2
    (line,) = refused(values)
    assert "config.process: has 2 processes; give each of them a job of its own" in line
    values["config"]["process"] = None
    assert any("config.process: is null; give a list of one process" in line for line in refused(values))


@pytest.mark.parametrize("value", ["extract", "generate", "mod"])
def test_other_jobs_are_refused(value: str, refused):
    (line,) = refused(PLAIN | {"job": value})
    assert line.startswith("job.yaml:1: job: ") and "only training jobs are read" in line


@pytest.mark.slow
@pytest.mark.parametrize("value", ["x", 0, -1, float("nan"), [1], {"x": 1}], ids=str)
def test_any_value_is_at_most_refused(value, tmp_path: Path):
    """Any value of any key is accepted or refused, and never a crash."""
    others = {"datasets[].alpha_mask": True, "train.optimizer": "prodigy", "train.lr_scheduler": "cosine"}
    for key in (key for key, row in KEYS.items() if isinstance(row, Mapped)):
        try:
            read_config(write(tmp_path, job(**others | {key: value})))
        except ConfigError as error:
            assert error.problems, key


# What several keys decide together


@pytest.mark.parametrize(
    ("name", "ours", "weight_decay", "eps"),
    [
        ("adam", "adam", 0.0, 1e-6), ("adamw", "adamw", 0.01, 1e-6), ("adam8bit", "adam8bit", 0.0, 1e-6),
        ("AdamW8bit", "adamw8bit", 0.01, 1e-6), ("adam8", "adam8bit", 0.0, 1e-6), ("adamw8", "adamw8bit", 0.0, 1e-6),
        ("ademamix8bit", "ademamix8bit", 0.01, 1e-6), ("lion", "lion", 0.0, None), ("lion8bit", "lion8bit", 0.0, None),
        ("adagrad", "adagrad", 0.0, None), ("adafactor", "adafactor", 0.0, None), ("automagic", "automagic", 0.0, None),
        ("automagic2", "automagic", 0.0, None), ("prodigy", "prodigy", 0.0, 1e-6), ("prodigyopt", "prodigy", 0.0, 1e-6),
        ("prodigy8bit", "prodigy8bit", 0.0, 1e-6),
    ],
)  # fmt: skip
def test_optimizer_defaults(name, ours, weight_decay, eps, read):
    """Optimizers have the defaults that they have in AI Toolkit."""
    values, notes = read(job(**{"train.optimizer": name}))
    assert (values["optimizer.name"], values["optimizer.weight_decay"]) == (ours, weight_decay)
    assert values.get("optimizer.params.eps") == eps
    assert (values["optimizer.lr"] == 1.0) == ours.startswith("prodigy")
    assert bool(notes) == (ours.startswith(("prodigy", "automagic")) or name in ("adam8", "adamw8"))
    assert values["train.max_grad_norm"] == (None if name in ("adafactor", "automagic2") else 1.0)


def test_prodigy_keeps_a_rate_that_is_meant(changed):
    settings = {"train.optimizer": "prodigy", "train.lr": 0.5}
    assert changed(settings)[0]["optimizer.lr"] == 0.5 and changed(settings)[1] == []


@pytest.mark.parametrize(
    ("name", "params", "schedule", "is_noted"),
    [
        ("constant", {}, ("constant", 0, {}), False),
        ("constant_with_warmup", {"num_warmup_steps": 50}, ("constant_with_warmup", 50, {}), False),
        ("constant_with_warmup", {"num_warmup_steps": 0}, ("constant", 0, {}), False),
        ("cosine", {}, ("cosine", 0, {"end_factor": 0.0}), False),
        ("cosine_with_restarts", {"T_mult": 2}, ("cosine", 0, {"end_factor": 0.0}), True),
        ("linear", {}, ("linear", 0, {"end_factor": 0.0}), True),
        ("linear", {"start_factor": 1.0, "end_factor": 0.1}, ("linear", 0, {"end_factor": 0.1}), False),
        ("linear", {"end_factor": 0.1}, ("linear", 0, {"end_factor": 0.1}), True),
        ("step", {"step_size": 100}, ("step", 0, {"every": 100, "factor": 0.1}), True),
        ("polynomial", {"power": 2.0, "lr_end": 1e-7, "num_warmup_steps": 5},
         ("polynomial", 5, {"power": 2.0, "end_factor": 0.1}), True),
    ],
)  # fmt: skip
def test_schedules(name, params, schedule, is_noted, tmp_path: Path):
    path = write(tmp_path, job(**{"train.lr_scheduler": name, "train.lr_scheduler_params": params}))
    config, notes = read_config_with_notes(path)
    found = config.schedule
    assert (found.name, found.warmup_steps, {k: round(v, 9) for k, v in found.params.items()}) == schedule
    assert bool(notes) == is_noted


def test_shift_of_every_variant(read):
    """AI Toolkit shifts by 3 whatever the model, so Base, which is sampled with 6, needs that number."""
    shifted = {"train.timestep_type": "shift"}
    base, _ = read(job(**shifted, **{"model.name_or_path": BASE}))
    assert (base["timesteps.type"], base["timesteps.shift"]) == ("uniform_shift", 3.0)
    turbo, _ = read(job(**shifted))
    assert (turbo["timesteps.type"], turbo.get("timesteps.shift")) == ("uniform_shift", None)


def test_bell_beside_weighted(read):
    """AI Toolkit reads the table of weighted where linear_timesteps is on beside it."""
    values, _ = read(job(**{"train.linear_timesteps": True, "train.timestep_type": "weighted"}))
    assert (values["timesteps.type"], values.get("timesteps.weight")) == ("weighted", None)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("linear", 0.2, 0.9), ("sigmoid", 0.301193, 0.782714), ("shift", 0.428571, 0.964286)]
)
def test_timestep_limits_are_quantiles(kind: str, low: float, high: float, read):
    """Limits of timesteps are converted to quantiles of their density."""
    settings = {"train.timestep_type": kind, "train.min_denoising_steps": 100, "train.max_denoising_steps": 799}
    values, _ = read(job(**settings))
    assert values["timesteps.min"] == pytest.approx(low, abs=1e-6)
    assert values["timesteps.max"] == pytest.approx(high, abs=1e-6)


def test_differential_guidance(changed):
    """Differential guidance acts here, with a note that AI Toolkit ignores it."""
    (note,) = changed({"train.do_differential_guidance": True})[1]
    assert note.startswith("train.do_differential_guidance acts here; AI Toolkit ignores it")
    assert changed({"train.do_differential_guidance": True, "train.do_guidance_loss": True})[1] == []


def test_regularization_images(tmp_path: Path):
    values = job(**{"trigger_word": "zchar", "train.reg_weight": 0.5})
    process = values["config"]["process"][0]
    process["datasets"] += [
        {"folder_path": "people", "is_reg": True, "loss_multiplier": 0.5},
        {"folder_path": "men", "is_reg": True, "prior_reg": True},
    ]
    config, notes = read_config_with_notes(write(tmp_path, values))
    assert [entry.regularization for entry in config.data] == [False, True, "prior"]
    assert [entry.trigger for entry in config.data] == ["zchar", None, None]
    assert [entry.weight for entry in config.data] == [1.0, 0.25, 0.5]
    assert config.train.regularization_share == 0.5 and notes == []


def test_triggers_of_job_and_datasets(tmp_path: Path):
    """Triggers come from the job and from its datasets."""
    values = job(**{"trigger_word": "zchar"})
    values["config"]["process"][0]["datasets"] += [{"folder_path": "b", "trigger_word": "zdog"}]
    config, notes = read_config_with_notes(write(tmp_path, values))
    assert [(entry.trigger, entry.dropout_keeps_trigger) for entry in config.data] == [("zchar", True), ("zdog", True)]
    assert len(notes) == 1 and notes[0].startswith("datasets.1.trigger_word counts alone here")


@pytest.mark.parametrize(
    ("only", "ignored"),
    [
        ([], ["adaLN"]),
        (["attention"], []),
        (["layers.1."], []),
        (["layers.1"], ["layers.12."]),
        (["to_q", "w2"], ["layers.0.", "layers.29."]),
        (["layers$$3$$"], ["feed_forward.w1"]),
        (["transformer.layers.4.attention.to_out.0"], []),
    ],
)
def test_targets_by_words(only, ignored, tmp_path: Path):
    """Targets chosen by words are exactly the modules that AI Toolkit trains."""
    values = job(**{"network.network_kwargs": {"only_if_contains": only, "ignore_if_contains": ignored}})
    config = read_config(write(tmp_path, values))
    linears = list(TransformerShape().linears)

    def is_trained(module: str) -> bool:
        name = f"transformer.{module}"
        hit = any(word in name or word in name.replace(".", "$$") for word in only)
        return module.startswith("layers.") and (hit or not only) and not any(word in name for word in ignored)

    assert (
        targets.select_modules(config.lora.targets, linears)
        == [module for module in linears if is_trained(module)]
        != []
    )


def test_targets_without_words(read):
    """Without words, targets are all 240 modules of the layers, or all 276 modules."""
    linears = list(TransformerShape().linears)
    assert len(targets.select_modules(read(PLAIN)[0]["lora.targets"], linears)) == 240
    every = read(job(**{"network.transformer_only": False}))[0]["lora.targets"]
    assert len(targets.select_modules(every, linears)) == len(linears) == 276


# Prompts


@pytest.mark.parametrize(
    ("prompt", "words", "flags"),
    [
        ("a cat", "a cat", {}),
        ("a cat --w 512 --h 768", "a cat", {"w": "512", "h": "768"}),
        ("a cat --n blurry, bad hands --d 7", "a cat", {"n": "blurry, bad hands", "d": "7"}),
        ("a cat --l 3.5 --s 20 --m 0.8", "a cat", {"l": "3.5", "s": "20", "m": "0.8"}),
        ("a cat -- a black one -- asleep", "a cat -- a black one -- asleep", {}),
        ("well--known, --style raw", "well--known, --style raw", {}),
        ("--seed 3 a cat", "a cat", {"seed": "3"}),
        ("a cat --n", "a cat", {"n": ""}),
        ("a cat --ev 1,2", "a cat", {"ev": "1,2"}),
        ("a cat --w wide", "a cat --w wide", {}),
    ],
)
def test_flags_of_prompts(prompt: str, words: str, flags: dict[str, str]):
    assert previews.split_flags(prompt) == (words, flags)


def test_prompt_flags_win(changed):
    """Flags within a prompt win over the keys of the sample."""
    settings = {"sample.samples[].prompt": "a cat --w 768 --h 700 --d 3 --n fog --l 2 --steps 8 --m 0.5 --fps 2"}
    settings |= {"sample.samples[].width": 512, "sample.samples[].seed": 1}
    difference, notes = changed(settings)
    assert difference == {
        "sample.prompts.0.width": 768, "sample.prompts.0.height": 688, "sample.prompts.0.seed": 3,
        "sample.prompts.0.negative": "fog", "sample.guidance": 1.0, "sample.steps": 8,
    }  # fmt: skip
    assert sorted(re.findall(r"--\w+", " ".join(notes))) == ["--fps", "--m"]


def test_every_flag_is_one_or_the_other():
    assert not FLAGS.keys() & FLAGS_LEFT_OUT.keys()


def test_prompts_that_disagree(read):
    """Prompts that disagree share the values of the `sample` section."""
    values = job(**{"sample.guidance_scale": 1, "sample.sample_steps": 8})
    values["config"]["process"][0]["sample"]["samples"] = [{"prompt": "a"}, {"prompt": "b --s 30", "guidance_scale": 4}]
    config, notes = read(values)
    assert (config["sample.steps"], config["sample.guidance"]) == (8, 0.0)
    assert [note.split(";")[0] for note in notes] == [
        "sample.samples.1 asks for sample_steps 30",
        "sample.samples.1 asks for guidance_scale 4",
    ]


def test_seeds_walk_or_stay(read):
    three = [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c", "seed": -1}]
    stay, notes = read(job(**{"sample.seed": 9, "sample.samples": three}))
    assert [stay[f"sample.prompts.{n}.seed"] for n in range(3)] == [9, 5, 9]
    assert len(notes) == 1 and notes[0].startswith("sample.samples.2 asks for seed -1")
    walk, _ = read(job(**{"sample.seed": 9, "sample.samples": three, "sample.walk_seed": True}))
    assert [walk[f"sample.prompts.{n}.seed"] for n in range(3)] == [None, 5, None] and walk["sample.seed"] == 9


def test_nine_steps_are_eight_for_turbo(read):
    """Nine sampling steps become eight for Turbo alone."""
    assert read(job(**{"sample.sample_steps": 9}))[0]["sample.steps"] == 8
    assert read(job(**{"sample.sample_steps": 9, "model.name_or_path": BASE}))[0]["sample.steps"] == 9


def test_the_trigger_is_put_into_prompts(changed):
    settings = {"sample.samples[].prompt": "[trigger] asleep", "trigger_word": "zchar"}
    assert changed(settings)[0]["sample.prompts.0.prompt"] == "zchar asleep"
    settings = {"sample.samples[].prompt": "Zchar and [TRIGGER], zcharming", "trigger_word": "zchar"}
    assert changed(settings)[0]["sample.prompts.0.prompt"] == "zchar and zchar, zcharming"


def test_trigger_of_a_dataset_in_prompts(tmp_path: Path):
    """A trigger that only a dataset has is put into prompts too."""
    settings = {"sample.samples[].prompt": "[trigger] asleep", "datasets[].trigger_word": "zchar"}
    config = read_config(write(tmp_path, job(**settings)))
    assert [request.prompt for request in preview_requests(config)] == ["zchar asleep"]


# The file


def test_placeholders_are_replaced(read, monkeypatch):
    """Placeholders are replaced by the job's name and by environment variables."""
    monkeypatch.setenv("PICTURES", "/data/pictures")
    monkeypatch.setenv("RATE", "2e-4")
    text = strict_yaml.dump(job(**{"trigger_word": "x_[name]", "training_folder": "out/[name]"}))
    text = text.replace("folder_path: photos", "folder_path: ${PICTURES}/[name]  # ${NOT_SET}")
    text = text.replace("  # ${NOT_SET}", "\n# ${NOT_SET}").replace("dtype: bf16", "dtype: bf16\n      lr: ${RATE}", 1)
    values, _ = read(text)
    assert values["data.0.folder"] == "/data/pictures/a" and values["data.0.trigger"] == "x_a"
    assert values["output_dir"] == "out/a" and values["optimizer.lr"] == 2e-4


def test_unset_variables_are_named(refused, monkeypatch):
    """Environment variables that are not set are named."""
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    text = strict_yaml.dump(job(**{"train.min_snr_gamma": 5})).replace("photos", "${NOT_SET_HERE}/x")
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "NOT_SET" in line)
    found = refused(text)
    missing = f"job.yaml:{line}: ${{NOT_SET_HERE}}: is no environment variable; set NOT_SET_HERE, or write the value"
    assert missing in found and len(found) == 2 and any("min_snr_gamma" in one for one in found)


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json(indent, read):
    values = job(**{"sample.samples[].prompt": 'caf\u00e9 \U0001f642 // "no" comment'})
    assert read(json.dumps(values, indent=indent), name="job.json") == read(values)


def test_json_with_comments(read, refused):
    """JSON jobs may have comments and trailing commas."""
    text = json.dumps(job(**{"train.lr": 1e-4}), indent=2)
    text = "// a job\n/* of\ntwo lines */\n" + re.sub(r"([}\]])\n", r"\1,  // here\n", text).replace(
        "},  // here\n}", "}\n}"
    )
    assert read(text, name="job.jsonc") == read(job(**{"train.lr": 1e-4}))
    wrong = text.replace('"lr"', '"l_r"')
    line = next(n for n, line in enumerate(wrong.splitlines(), 1) if "l_r" in line)
    (found,) = refused(wrong, name="job.jsonc")
    assert found.startswith(f"job.jsonc:{line}: train.l_r: unknown key")


def test_yaml_1_1_words_are_true_and_false(changed):
    assert changed({"datasets[].flip_x": "yes"})[0] == {"data.0.flip": True}
    assert changed({"datasets[].flip_x": "Off"})[0] == {}


def test_windows_path_in_double_quotes(refused):
    """A Windows path in double quotes is named by the key of the job, once and with its line."""
    text = strict_yaml.dump(PLAIN).replace("folder_path: photos", r'folder_path: "C:\new\train"')
    number = next(n for n, line in enumerate(text.splitlines(), 1) if "folder_path" in line)
    (line,) = refused(text)
    assert line.startswith(rf'job.yaml:{number}: datasets.0.folder_path: is "C:\new\train", and a backslash in double')


def test_overrides_use_config_keys(read, refused):
    """Overrides use the keys of a config, not those of the job."""
    values, _ = read(PLAIN, "train.steps=7", "data.0.folder=elsewhere")
    assert (values["train.steps"], values["data.0.folder"]) == (7, "elsewhere")
    assert refused(PLAIN, "train.lr=1") == ["--set train.lr=1: train.lr: unknown key; did you mean 'optimizer.lr'?"]


def test_configs_are_read_as_ever(tmp_path: Path):
    path = HERE.parents[1] / "configs" / "quickstart.yaml"
    config, notes = read_config_with_notes(path, ["train.steps=3"])
    assert config.train.steps == 3 and notes == []
    with pytest.raises(ConfigError, match="is no job of AI Toolkit"):
        read_job_as_config(path)
    half = write(tmp_path, "job: extension\nname: a\n")
    with pytest.raises(ConfigError, match="job: unknown key"):
        read_config(half)


def test_a_native_config_loads_no_importer(tmp_path: Path):
    """The table of AI Toolkit's keys is built only when a job is read, also by the command line."""
    native = HERE.parents[1] / "configs" / "quickstart.yaml"
    code = f"""
import sys
from pathlib import Path
from zimage_train.config.load import read_config
read_config(Path({str(native)!r}))
print([name for name in sys.modules if name.startswith("zimage_train.compat")])
from zimage_train.cli import app
read_config(Path({str(native)!r}))
print([name for name in sys.modules if name.startswith("zimage_train.compat.aitoolkit")])
print(read_config(Path({str(FRESH)!r})).name, "zimage_train.compat.aitoolkit.keys" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "my_first_lora_v1 True"]


def test_native_json_config_with_comments(tmp_path: Path):
    """A native config may be JSON with comments; lines and surrogate pairs are right."""
    text = """{
\t"name": "a", // a comment
\t"output_dir": "caf\\u00e9 \\ud83d\\ude42 // runs",
\t"data": [{"folder": "photos"}]
}"""
    assert read_config(write(tmp_path, text, "config.jsonc")).output_dir == "caf\u00e9 \U0001f642 // runs"
    with pytest.raises(ConfigError, match=r"config.jsonc:3: output: unknown key"):
        read_config(write(tmp_path, text.replace("output_dir", "output"), "config.jsonc"))


def test_written_config_reads_back(tmp_path: Path):
    """A written config reads back equal, here and in plain YAML."""
    config, notes = read_job_as_config(FRESH)
    text = write_config(config, notes, FRESH)
    assert text.splitlines()[0] == "# Imported from turbo.yaml, a job of AI Toolkit."
    assert all(f"# {note}" in text for note in notes) and str(FRESH.parent) not in text
    assert yaml.safe_load(text) == config.model_dump()
    assert flatten_keys(yaml.safe_load(text)).keys() == flatten_keys(config.model_dump()).keys()
    assert read_config(write(tmp_path, text, "config.yaml")) == config


# The command


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    code = getattr(done.exception, "exit_code", 1) if done.exception else 0
    return code, done.output + (f"{done.exception}" if code else "")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A job on the miniature."""
    values = job(
        **{
            "training_folder": str(tmp_path / "runs"),
            "train.dtype": "fp32",
            "train.steps": 2,
            "model.name_or_path": str(mini.TURBO),
            "model.assistant_lora_path": str(mini.ADAPTER_V1),
            "datasets[].folder_path": str(mini.IMAGES),
            "datasets[].resolution": 64,
            "sample.width": 64,
            "sample.height": 64,
            "train.force_first_sample": True,
        }
    )
    return write(tmp_path, values)


def test_import_writes_a_valid_config(tiny: Path, tmp_path: Path, shared_cache: Path):
    """`import` writes a config that `check` accepts."""
    config = tmp_path / "config.yaml"
    code, output = run("import", str(tiny), "-o", str(config))
    assert code == 0 and "note: left out: train.force_first_sample" in output
    code, output = run("import", str(tiny), "-o", str(config))
    assert code == 2 and "exists; give another name, or --force" in output
    assert run("import", str(tiny), "-o", str(config), "--force")[0] == 0
    cached = ["--set", f"cache.folder={shared_cache}"]
    code, output = run("check", str(config), *cached)
    assert code == 0, output
    assert run("check", str(tiny), *cached)[0] == 0


def test_import_prints_without_a_file(tiny: Path):
    """`import` prints the config if no output file is named."""
    done = CliRunner().invoke(app, ["import", str(tiny)])
    assert yaml.safe_load(done.stdout)["train"]["steps"] == 2 and "note:" in done.stderr


def test_a_refused_job_writes_nothing(tmp_path: Path):
    path = write(tmp_path, job(**{"train.min_snr_gamma": 5}))
    target = tmp_path / "config.yaml"
    code, output = run("import", str(path), "-o", str(target))
    assert code == 2 and "train.min_snr_gamma" in output and not target.exists()


@pytest.mark.slow
def test_job_trains_on_the_miniature(tmp_path: Path, shared_cache: Path):
    """A job trains as it is on the miniature."""
    options = {
        "model.path": mini.TURBO,
        "model.adapter": mini.ADAPTER_V1,
        "model.dtype": "fp32",
        "data.0.folder": mini.IMAGES,
        "data.0.resolution": "[64]",
        "train.steps": 3,
        "output_dir": tmp_path / "runs",
        "cache.folder": shared_cache,
        "sample.width": 64,
        "sample.height": 64,
        "log.tensorboard": "false",
    }
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, ["train", str(Path(__file__).parent / "aitoolkit_jobs" / "turbo.yaml"), *words])
    assert done.exit_code == 0, (done.output[-500:], done.exception)
    (lora,) = tmp_path.glob("runs/*/lora/*.safetensors")
    assert lora.name == "my_first_lora_v1.safetensors"
    assert "matched 48/48 modules (attention 24, feed_forward 18, adaln 6)" in done.output


def test_job_is_not_overwritten(tmp_path: Path):
    """A job is not overwritten by the config made from it."""
    path = tmp_path / "job.yaml"
    path.write_bytes((Path(__file__).parent / "aitoolkit_jobs" / "turbo.yaml").read_bytes())
    before = path.read_bytes()
    done = CliRunner().invoke(app, ["import", str(path), "-o", str(path), "--force"])
    assert isinstance(done.exception, ConfigError) and "is the job itself" in str(done.exception)
    assert path.read_bytes() == before


def test_a_job_can_be_swept(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_bytes((Path(__file__).parent / "aitoolkit_jobs" / "turbo.yaml").read_bytes())
    found = make_sweep_runs(path, [], ["lora.rank=4,8"])
    assert [one.config.lora.rank for one in found] == [4, 8]
    assert [one.config.name for one in found] == ["my_first_lora_v1+rank_4", "my_first_lora_v1+rank_8"]


def test_automagic_initial_rate(tmp_path: Path):
    """Automagic begins at the rate at which it begins in AI Toolkit."""
    config, notes = read_config_with_notes(write(tmp_path, job(**{"train.optimizer": "automagic", "train.lr": 1})))
    assert config.optimizer.lr == 1e-6 and any("automagic finds the rate itself" in note for note in notes)


def test_prior_under_the_trigger(tmp_path: Path):
    """Images with the trigger that are held to the prior are refused."""
    values = job()
    values["config"]["process"][0]["datasets"] += [{"folder_path": "b", "prior_reg": True}]
    with pytest.raises(ConfigError, match="trains images with the trigger towards the model itself"):
        read_config(write(tmp_path, values))
