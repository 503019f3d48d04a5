"""`train.beside`: LoRAs that are in place while another is trained, and are no part of what is exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_train import mini
from zimage_train.commands.sample import command_for
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.diffusion.frozen import load_frozen, original_weights
from zimage_train.errors import ConfigError, ZImageTrainError
from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import training_adapter
from zimage_train.planning.preflight import check_run

from helpers import folder, losses

CPU = torch.device("cpu")
SAMPLE = {"every": 2, "width": 64, "height": 64, "prompts": ["a red circle"]}
STEPS = {"steps": 2}
OPTIMIZER = {"lr": 1e-2}
SAVE = {"every": 1, "metadata": "full"}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return Path(shutil.copyfile(mini.ADAPTER_V1, tmp_path / "other.safetensors"))


def final(config: Config) -> Path:
    return folder(config) / "lora" / f"{config.name}.safetensors"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_merge_of_several(other: Path):
    """The weights are those of the file plus each change times its weight, and previews have the file's own."""
    plain = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    adapter = training_adapter.load_adapter(mini.ADAPTER_V2, 1.0, plain.shape)
    beside = training_adapter.load_beside(other, -0.5, plain.shape)
    frozen = load_frozen(mini.TURBO / "transformer", adapter, "fp32", CPU, beside=[beside])
    before = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    trained = {name: tensor.clone() for name, tensor in frozen.model.state_dict().items()}
    changed = 0
    for name, tensor in trained.items():
        module = name.removesuffix(".weight")
        expected = before[name].double()
        for lora, weight in ((adapter.lora, 1.0), (beside.lora, -0.5)):
            if name.endswith(".weight") and module in lora:
                expected = expected + weight * lora[module].delta().double()
                changed += 1
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert changed == len(adapter.lora) + len(beside.lora)
    with original_weights(frozen):
        for name, tensor in frozen.model.state_dict().items():
            assert tensor.equal(before[name])
    for name, tensor in frozen.model.state_dict().items():
        assert tensor.equal(trained[name]), "training weights are not restored bit for bit"


@pytest.mark.slow
def test_beside_run(make_config, other: Path, tmp_path: Path):
    """The loss and previews have the other LoRA; the export lacks it; facts name it; a changed file is refused."""
    plain = make_config(name="plain", sample=SAMPLE, train=STEPS, optimizer=OPTIMIZER)
    config = make_config(
        name="with", sample=SAMPLE, train=STEPS | {"beside": f"{other}=3"}, optimizer=OPTIMIZER, save=SAVE
    )
    extra = make_config(name="extra", sample=SAMPLE | {"extra_loras": [f"{other}=3"]}, train=STEPS, optimizer=OPTIMIZER)
    for one in (plain, config, extra):
        run_training(one, fresh=False)
    assert losses(config)[0] != losses(plain)[0] == losses(extra)[0]
    first = [pixels(folder(one) / "samples" / "000000-00.png") for one in (plain, config, extra)]
    assert np.abs(first[0] - first[1]).max() > 10
    assert np.array_equal(first[1], first[2]), "before step 1, previews have the other LoRA once"
    exported, alone = load_file(final(config)), load_file(final(plain))
    assert {key: value.shape for key, value in exported.items()} == {key: value.shape for key, value in alone.items()}
    facts = json.loads((folder(config) / "run.json").read_text())
    assert [(one["name"], one["weight"], one["matched"]) for one in facts["beside"]] == [
        ("other.safetensors", 3.0, "48/48")
    ]
    assert "trained beside" in (folder(config) / "report.html").read_text()
    named = json.loads(read_header(final(config)).metadata["zimage_train.beside"])
    assert named == [{"name": "other.safetensors", "weight": 3.0, "sha256": facts["beside"][0]["sha256"]}]
    assert str(tmp_path) not in json.dumps(read_header(final(config)).metadata)
    assert f"--lora {other}=3.0" in command_for(config, final(config))

    moved = Path(shutil.copyfile(other, tmp_path / "moved.safetensors"))
    longer = {"train": STEPS | {"steps": 3, "beside": [{"file": str(moved), "weight": 3.0}]}}
    run_training(make_config(name="with", sample=SAMPLE, optimizer=OPTIMIZER, save=SAVE, **longer), fresh=False)
    tensors = load_file(moved)
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key] * 2}, moved)
    longer["train"]["steps"] = 4
    with pytest.raises(ConfigError, match=r"train\.beside\.0: changed"):
        run_training(make_config(name="with", sample=SAMPLE, optimizer=OPTIMIZER, save=SAVE, **longer), fresh=False)


def test_beside_is_checked_first(make_config, other: Path, tmp_path: Path):
    """A LoRA that is missing, of another model, or in previews too is refused before training."""
    odd = tmp_path / "odd.safetensors"
    save_file({name.replace("layers.0.", "layers.90."): one for name, one in load_file(other).items()}, odd)
    config = make_config(
        train=STEPS | {"beside": ["gone.safetensors", str(odd)]},
    )
    with pytest.raises(ZImageTrainError) as refused:
        check_run(config)
    assert "train.beside.0: gone.safetensors: does not exist" in str(refused.value)
    assert "odd.safetensors: matched" in str(refused.value)
    twice = make_config(train=STEPS | {"beside": str(other)}, sample=SAMPLE | {"extra_loras": [f"{other}=0.5"]})
    with pytest.raises(ConfigError, match=r"sample\.extra_loras\.0: .*is in train\.beside.*name it only"):
        check_run(twice)


def test_beside_needs_sft(make_config):
    with pytest.raises(AssertionError, match="learns from the model alone"):
        make_config(train=STEPS | {"method": "de_distill", "beside": "a.safetensors"}, model={"adapter": None})
