"""Refinements of a LoRA in whole runs: resumed, in every mode of memory, and in the files that other programs read."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import pixels, stock

from zimage_train.commands.train import run_training
from zimage_train.diffusion.request import preview_requests
from zimage_train.errors import ConfigError, ZImageTrainError
from zimage_train.lora import lora_file, verify
from zimage_train.planning.preflight import check_run

from helpers import facts, folder, losses, numbers, run_in_two_starts
from mini_config import merge

PROMPT = "a red zorb on a blue background"
SHAPED: dict[str, Any] = {
    "lora": {
        "rank": 4,
        "alpha": 3.0,
        "rslora": True,
        "start": "orthogonal",
        "ranks": {"attention": 8, "layers.[01][.]feed.+": 2},
    },
    "optimizer": {"name": "adamw", "lr": 2e-3, "lora_plus": 4.0, "lr_factors": {"attention": 0.5, ".+w2": 2.0}},
}
"""What the fused path has."""
RANDOM = merge(SHAPED, {"lora": {"dropout": 0.1, "rank_dropout": 0.3, "module_dropout": 0.2}})
"""What is random, and runs as modules."""
PISSA = merge(SHAPED, {"lora": {"start": "pissa"}})
REFINED = pytest.mark.parametrize("settings", [SHAPED, RANDOM, PISSA], ids=["shaped", "random", "pissa"])


@pytest.mark.slow
@REFINED
def test_preview_equals_the_stock_pipeline(make_config, tmp_path: Path, settings: dict[str, Any]):
    """The last preview is the image that diffusers' pipeline draws with the exported file."""
    sample = {"every": 30, "width": 96, "height": 64, "prompts": [PROMPT]}
    config = make_config(**merge(settings, {"train": {"steps": 30}, "sample": sample}))
    run_training(config, fresh=False)
    request = preview_requests(config)[0]
    size = (request.seed, request.width, request.height, request.steps, request.guidance)
    expected = stock(folder(config) / "lora" / "tiny.safetensors", tmp_path / "stock.png", PROMPT, "", *size)
    samples = folder(config) / "samples"
    assert np.abs(pixels(samples / "000030-00.png") - expected).max() <= 1
    assert np.abs(pixels(samples / "000000-00.png") - expected).max() > 20  # else the comparison says nothing


@pytest.mark.slow
@REFINED
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "automagic", "adamw_schedulefree", "muon"])
def test_run_resumes_to_the_bit(make_config, monkeypatch, settings: dict[str, Any], name: str):
    settings = merge(settings, {"train": {"steps": 4, "batch_size": 2}, "optimizer": {"name": name}})
    whole, stopped = make_config(**merge(settings, {"name": "whole"})), make_config(**settings)
    run_training(whole, fresh=False)
    run_in_two_starts(stopped, monkeypatch)
    assert numbers(stopped) == numbers(whole)
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
@REFINED
def test_memory_settings_change_no_bit(make_config, settings: dict[str, Any]):
    found = []
    memories = [{}, {"offload": 0.5}, {"offload": 1.0, "checkpointing": "full"}, {"checkpointing": "w1w3"}]
    for index, memory in enumerate(memories):
        config = make_config(**merge(settings, {"name": f"m_{index}x", "train": {"steps": 2}, "memory": memory}))
        run_training(config, fresh=False)
        found.append(numbers(config))
    assert found == [found[0]] * len(memories)


@pytest.mark.slow
def test_log_and_report_count_modules(make_config, capsys):
    config = make_config(**merge(SHAPED, {"train": {"steps": 1}}))
    run_training(config, fresh=False)
    said = capsys.readouterr().out
    # 6 layers with 4 modules of attention and 3 of feed forward.
    assert "LoRA of rank 4 (8 on attention, 2 on layers.[01][.]feed.+): matched 42/42 modules" in said
    assert "ranks: 2 on 6 modules, 4 on 12 modules, 8 on 24 modules" in said
    # A of attention; A of w1 and w3; B of attention, and A of w2; B of w1 and w3; B of w2.
    assert "factors of the learning rate: 0.5 on 24 matrices, 1 on 12 matrices, 2 on 30 matrices" in said
    assert "4 on 12 matrices, 8 on 6 matrices" in said
    assert facts(config)["lora"]["ranks"] == {"2": 6, "4": 12, "8": 24}
    assert facts(config)["lora"]["lr_factors"] == {"0.5": 24, "1.0": 12, "2.0": 30, "4.0": 12, "8.0": 6}
    page = (folder(config) / "report.html").read_text()
    assert "rank 2 on 6, rank 4 on 12, rank 8 on 24; factors of the learning rate: 0.5 on 24 matrices, 1.0 on" in page


@pytest.mark.slow
def test_a_run_begins_with_its_ranks(make_config):
    """A LoRA of several ranks is begun from, by the same ranks alone."""
    first = make_config(**merge(SHAPED, {"name": "first", "train": {"steps": 4}}))
    run_training(first, fresh=False)
    path = folder(first) / "lora" / "first.safetensors"
    settings = copy.deepcopy(SHAPED) | {"optimizer": {"lr": 1e-9, "weight_decay": 0.0}, "save": {"dtype": "fp32"}}
    settings["lora"] |= {"init_from": str(path), "alpha": None, "start": "zero"}
    second = make_config(**merge(settings, {"name": "second", "train": {"steps": 1}}))
    run_training(second, fresh=False)
    before, after = lora_file.read_lora(path), lora_file.read_lora(folder(second) / "lora" / "second.safetensors")
    assert {factors.rank for factors in before.values()} == {2, 4, 8}
    assert max(verify.relative_error(before[module], after[module]) for module in before) < 1e-4
    settings["lora"]["ranks"] = {"attention": 8}
    with pytest.raises(ConfigError, match=r"has rank 2 in layers.0.feed_forward.w1, and this run 4"):
        check_run(make_config(**settings))
    settings["lora"]["ranks"] = {}
    with pytest.raises(ConfigError, match=r"has rank 2 and 4 and 8, and lora.rank is 4"):
        check_run(make_config(**settings))


def test_check_names_unmatched_patterns(make_config):
    """`check` lists every pattern without a module, of both settings."""
    settings = {"lora": {"ranks": {"adaln": 8}}, "optimizer": {"lr_factors": {"atention": 2.0}}}
    with pytest.raises(ZImageTrainError) as caught:
        check_run(make_config(**settings))
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "lora.ranks: 'adaln' matches none of the 42 modules of lora.targets" in text
    assert "optimizer.lr_factors: 'atention' matches none of the 42 modules of lora.targets" in text
