"""The encoders as the caches want them: made when something is missing, freed before the transformer is loaded."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zimage_train.data import cache as caching
from zimage_train.data.cache import Cache, EncodePicture, EncodePrompt, Tally, Tick
from zimage_train.data.plan import Item
from zimage_train.model import text, vae
from zimage_train.tensorfile import DTYPES


def picture_encoder(extras: Path, device: torch.device) -> EncodePicture:
    """The VAE's encoder; in fp32, since latents are made once and used ever after."""
    model = vae.load(extras, device, torch.float32)

    def encode(image: Image.Image) -> Tensor:
        return vae.encode(model, vae.to_pixels(image)[None])[0]

    return encode


def prompt_encoder(extras: Path, device: torch.device, dtype: str) -> EncodePrompt:
    """The text encoder."""
    return text.load(extras, device, DTYPES[dtype]).encode


@dataclass(frozen=True)
class Encoders:
    """Which encoders, where, and what they are by content."""

    extras: Path
    device: torch.device
    dtype: str
    vae_digest: str
    text_digest: str


def fill(
    cache: Cache, encoders: Encoders, items: Iterable[Item], prompts: Iterable[str], tick: Tick
) -> tuple[Tally, Tally]:
    """Encode what is missing of `items` and `prompts`, one encoder after the other, and free both."""
    extras, device, dtype = encoders.extras, encoders.device, encoders.dtype
    pictures = caching.fill_latents(cache, items, encoders.vae_digest, lambda: picture_encoder(extras, device), tick)
    _free()
    texts = caching.fill_prompts(
        cache, prompts, encoders.text_digest, dtype, lambda: prompt_encoder(extras, device, dtype), tick
    )
    _free()
    return pictures, texts


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
