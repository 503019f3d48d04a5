"""What the text encoder, tokenizer and VAE of a diffusers folder are, by headers and configs alone (torch-free).

The loaders ask the same functions, so what `check` lets through is what they load.
"""

from pathlib import Path
from typing import Any

from zimage_train.errors import Problem, WeightsError, ZImageTrainError, collected, raise_all
from zimage_train.model.headers import TensorInfo, read_json, read_sharded

LATENT_CHANNELS = 16
LATENT_STRIDE = 8
"""Pixels per latent."""


def require(extras: Path, features: int) -> None:
    """Refuse a folder whose parts cannot be loaded, or whose embeddings do not have the transformer's `features`.

    Raises:
        WeightsError: lists what is wrong with each part.
    """

    errors: list[ZImageTrainError] = []
    with collected(errors):
        width = text_encoder(extras)[0].get("hidden_size")
        if width != features:
            what = f"makes embeddings of {width} features, and the transformer takes {features}"
            raise WeightsError(Problem(str(extras / "text_encoder"), what, "check model.extras"))
    with collected(errors):
        tokenizer(extras)
    with collected(errors):
        vae(extras)
    raise_all(errors)


def text_encoder(extras: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors of a Qwen3.

    Raises:
        WeightsError: it is something else, or not whole.
    """
    folder = extras / "text_encoder"
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "qwen3":
        raise WeightsError(Problem(str(folder / "config.json"), f"is a {kind}, not a Qwen3", "check model.extras"))
    return config, read_sharded(folder, "model")


def tokenizer(extras: Path) -> Path:
    """The folder of a tokenizer.

    Raises:
        WeightsError: it has no tokenizer.json, or a damaged one.
    """
    folder = extras / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        raise WeightsError(Problem(str(folder), "has no tokenizer.json", "get the folder again"))
    read_json(folder / "tokenizer.json")
    return folder


def vae(extras: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors of an AutoencoderKL of 16 channels and stride 8.

    Raises:
        WeightsError: it is something else, or not whole.
    """
    folder = extras / "vae"
    config = read_json(folder / "config.json")
    kind, channels = config.get("_class_name"), config.get("latent_channels")
    stride = 2 ** (len(config.get("block_out_channels", [])) - 1)
    if kind != "AutoencoderKL" or channels != LATENT_CHANNELS or stride != LATENT_STRIDE:
        what = f"is a {kind} with {channels} channels and stride {stride}"
        raise WeightsError(Problem(str(folder), what, "Z-Image needs an AutoencoderKL with 16 channels and stride 8"))
    return config, read_sharded(folder, "diffusion_pytorch_model")
