"""The VAE: images to latents and back, shifted and scaled as its config says."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from torch import Tensor

from zimage_train import typing
from zimage_train.errors import Problem, WeightsError
from zimage_train.models import components, single_files
from zimage_train.models.components import LATENT_STRIDE
from zimage_train.models.loading import load_parameters, stream_tensors

TILE_PX = 512


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE at `path`, a diffusers folder or a single file with diffusers' names or the original ones.

    Raises:
        WeightsError: it is not an AutoencoderKL with 16 channels and stride 8, or does not have exactly its tensors.
    """
    config, weights = components.read_vae(path)
    try:
        with init_empty_weights():
            vae = cast(AutoencoderKL, AutoencoderKL.from_config(config))
        _ = float(vae.config["shift_factor"]) * float(vae.config["scaling_factor"])
    except Exception as error:  # noqa: BLE001  the class checks nothing and fails in many ways on an inconsistent config
        what = f"does not describe an AutoencoderKL ({type(error).__name__}: {str(error)[:100]})"
        where = str(path / "config.json" if path.is_dir() else path)
        raise WeightsError(Problem(where, what, "get the file again", "damaged-config")) from None
    tensors = stream_tensors(weights)
    if single_files.is_ldm_vae(weights):
        tensors = _from_ldm(path, dict(tensors), config)
    load_parameters(vae, tensors, str(path), device, dtype)
    return vae.eval()


def _from_ldm(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return tensors with the names of the original implementation under those of diffusers.

    Raises:
        WeightsError: some are missing, so that others cannot be converted.
    """
    try:
        converted = convert_ldm_vae_checkpoint(tensors, config)
    except (KeyError, IndexError) as error:
        message = f"is not a whole VAE (no {error.args[0] if error.args else 'such tensor'})"
        raise WeightsError(Problem(str(path), message, "get the file again", "missing-tensors")) from None
    return iter(converted.items())


def to_pixels(image: Image.Image) -> typing.PixelImage:
    """Convert an RGB image to (3, h, w) in [-1, 1], fp32."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1.0


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: typing.PixelBatch) -> typing.LatentBatch:
    """Return latents (b, 16, h/8, w/8) in fp32 of pixels (b, 3, h, w) in [-1, 1]: (mean - shift) * scale."""
    on_device = pixels.to(vae.device, vae.dtype)
    # The mean of the posterior, not a sample: a latent is encoded once and cached, so a sample would be a draw of
    # noise frozen into the dataset.
    mean = _with_tiling_fallback(vae, lambda: vae.encode(on_device, return_dict=False)[0].mode())
    return (mean.float() - vae.config["shift_factor"]) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: typing.LatentBatch) -> list[Image.Image]:
    """Return the images of latents (b, 16, h/8, w/8), rounded to 8 bits as diffusers' image processor does."""
    scaled = latents.to(vae.device, vae.dtype) / vae.config["scaling_factor"] + vae.config["shift_factor"]
    decoded = _with_tiling_fallback(vae, lambda: vae.decode(scaled, return_dict=False)[0])
    pixels = (decoded * 0.5 + 0.5).clamp(0, 1)
    arrays = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
    return [Image.fromarray(array) for array in (arrays * 255).round().astype("uint8")]


def _with_tiling_fallback(vae: AutoencoderKL, run: Callable[[], Tensor]) -> Tensor:
    """Return `run()`, computed in tiles of 512 px with blended overlaps if the whole image does not fit in memory.

    Whole images are preferred: group norm and attention of the VAE see the entire image, so tiles give other values.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return run()
    # Not within `except`, where the traceback would keep the tensors of the failed attempt alive.
    torch.cuda.empty_cache()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // LATENT_STRIDE
    vae.enable_tiling()
    try:
        return run()
    finally:
        vae.disable_tiling()
