"""Pictures to latents and back: the posterior's mean, shifted and scaled as the VAE's config says."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from zimage_train import typing
from zimage_train.errors import Problem, WeightsError
from zimage_train.models import components
from zimage_train.models.components import LATENT_STRIDE
from zimage_train.models.loading import load as load_weights
from zimage_train.models.loading import stream

TILE_PX = 512


def load(extras: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE of a diffusers folder.

    Raises:
        WeightsError: not an AutoencoderKL of 16 channels and stride 8, or not exactly its tensors.
    """
    folder = extras / "vae"
    config, tensors = components.vae(extras)
    try:
        with init_empty_weights():
            vae = cast(AutoencoderKL, AutoencoderKL.from_config(config))
        _ = float(vae.config["shift_factor"]) * float(vae.config["scaling_factor"])
    except Exception as error:  # noqa: BLE001  a config that contradicts itself makes the class raise whatever it runs into
        what = f"makes no AutoencoderKL ({type(error).__name__}: {str(error)[:100]})"
        raise WeightsError(Problem(str(folder / "config.json"), what, "get the file again")) from None
    load_weights(vae, stream(tensors), str(folder), device, dtype)
    return vae.eval()


def to_pixels(image: Image.Image) -> typing.PixelImage:
    """An RGB image as (3, h, w) in [-1, 1], fp32."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1.0


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: typing.PixelBatch) -> typing.LatentBatch:
    """Latents (b, 16, h/8, w/8) in fp32 of pixels (b, 3, h, w): (mean - shift) * scale."""
    there = pixels.to(vae.device, vae.dtype)
    mean = _in_tiles_if_it_must(vae, lambda: vae.encode(there, return_dict=False)[0].mode())
    return (mean.float() - vae.config["shift_factor"]) * vae.config["scaling_factor"]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: typing.LatentBatch) -> list[Image.Image]:
    """Pictures of latents (b, 16, h/8, w/8), rounded as diffusers' image processor does."""
    scaled = latents.to(vae.device, vae.dtype) / vae.config["scaling_factor"] + vae.config["shift_factor"]
    decoded = _in_tiles_if_it_must(vae, lambda: vae.decode(scaled, return_dict=False)[0])
    pixels = (decoded * 0.5 + 0.5).clamp(0, 1)
    arrays = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
    return [Image.fromarray(array) for array in (arrays * 255).round().astype("uint8")]


def _in_tiles_if_it_must(vae: AutoencoderKL, run: Callable[[], Tensor]) -> Tensor:
    """What `run` returns; where memory runs out, once more in tiles of 512 px with blended overlaps.

    Whole images come first: the VAE's norms and its attention see all of an image, and a tile is not all of it.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return run()
    torch.cuda.empty_cache()  # only here is free what the first try held
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // LATENT_STRIDE
    vae.enable_tiling()
    try:
        return run()
    finally:
        vae.disable_tiling()
