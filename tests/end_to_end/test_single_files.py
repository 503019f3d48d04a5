"""Runs on single files: the weights of other tools train, draw and continue like those of the folder."""

import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.sample import command_for
from zimage_train.commands.train import run_training
from zimage_train.errors import ConfigError
from zimage_train.planning.preflight import check_run

from checkpoints import TRANSFORMER, comfyui, folder_tensors, ldm_vae, scaled, write
from helpers import PREVIEWED, folder, losses


def files(tmp_path: Path) -> dict[str, str]:
    """The settings of the miniature as ComfyUI's files."""
    encoder = folder_tensors(mini.TURBO / "text_encoder")
    return {
        "path": str(write(tmp_path / "z.safetensors", comfyui(folder_tensors(TRANSFORMER)))),
        "text_encoder": str(write(tmp_path / "qwen_3_4b.safetensors", encoder)),
        "vae": str(write(tmp_path / "ae.safetensors", ldm_vae(folder_tensors(mini.TURBO / "vae")))),
        "tokenizer": str(mini.TURBO / "tokenizer"),
    }


@pytest.mark.slow
def test_single_files_train_like_the_folder(make_config, tmp_path: Path, no_network: list):
    """ComfyUI's files give the same losses and LoRA; a run does not continue on them, since their digests differ."""
    from_folder = make_config(name="a", train={"steps": 3})
    from_files = make_config(name="b", train={"steps": 3}, model=files(tmp_path))
    for config in (from_folder, from_files):
        run_training(config, fresh=False)
    assert losses(from_folder) == losses(from_files)
    one, other = (
        load_file(folder(config) / "lora" / f"{config.name}.safetensors") for config in (from_folder, from_files)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match=r"text_encoder.*\n?.*vae|vae.*\n?.*text_encoder"):
        run_training(make_config(name="a", train={"steps": 4}, model=files(tmp_path)), fresh=False)
    assert no_network == []


@pytest.mark.slow
def test_previews_of_scaled_weights(make_config, tmp_path: Path):
    """On scaled fp8, the preview of a run is the image that `sample` draws with the same files."""
    stored, _, metadata = scaled(comfyui(folder_tensors(TRANSFORMER)), "musubi block")
    path = write(tmp_path / "fp8.safetensors", stored, "model.diffusion_model.", metadata)
    encoder, _, metadata = scaled(folder_tensors(mini.TURBO / "text_encoder"), "new")
    model = files(tmp_path) | {
        "path": str(path),
        "text_encoder": str(write(tmp_path / "fp8_mixed.safetensors", encoder, "", metadata)),
    }
    config = make_config(train={"steps": 2}, model=model, sample=PREVIEWED | {"prompts": ["a red zorb"]})
    run_training(config, fresh=False)
    preview = next((folder(config) / "samples").rglob("*000002*.png"))
    words = shlex.split(command_for(config, folder(config) / "lora" / "tiny.safetensors").split(" sample ")[1])
    assert {"--text-encoder", "--tokenizer", "--vae"} <= set(words) and "--extras" not in words
    done = CliRunner().invoke(app, ["sample", *words, "-o", str(tmp_path / "drawn")])
    assert done.exit_code == 0, done.output
    (drawn,) = (tmp_path / "drawn").glob("*.png")
    assert Image.open(drawn).tobytes() == Image.open(preview).tobytes()


def test_check_reads_scales(make_config, tmp_path: Path):
    """`check` knows a scaled checkpoint from its header, and lists what is wrong with each part at once."""
    model = files(tmp_path)
    stored, _, _ = scaled(comfyui(folder_tensors(TRANSFORMER)), "new")
    model["path"] = str(write(tmp_path / "fp8.safetensors", stored))
    checked = check_run(make_config(model=model))
    assert checked.model_files is not None and checked.model_files.adapter_modules == 48
