"""The encoders as the caches want them: made when something is missing, freed before the transformer is loaded."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zimage_train.dataset import cache_builder
from zimage_train.dataset.cache_builder import CacheStats, EncodeImages, EncodePrompts, Shard
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.io.progress import Progress
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.models import text_encoder, vae


def image_encoder(extras: Path, device: torch.device) -> EncodeImages:
    """The VAE's encoder; in fp32, since latents are made once and used ever after.

    Where a batch does not fit the device it goes through in tiles of 512 px, whose overlaps are blended.
    """
    model = vae.load_vae(extras, device, torch.float32)

    def encode(images: list[Image.Image]) -> Tensor:
        return vae.encode_images(model, torch.stack([vae.to_pixels(image) for image in images]))

    return encode


def prompt_encoder(
    extras: Path, device: torch.device, dtype: str, warn: Callable[[str], None] = lambda text: None
) -> EncodePrompts:
    """The text encoder; `warn` is told of prompts that it does not read to their end."""
    return partial(text_encoder.load_text_encoder(extras, device, TORCH_DTYPES[dtype]).encode_all, warn=warn)


@dataclass(frozen=True)
class Encoders:
    """Which encoders, where, and what they are by content."""

    extras: Path
    device: torch.device
    dtype: str
    vae_digest: str
    text_digest: str
    warn: Callable[[str], None]


def encode_missing(
    cache: TensorCache,
    encoders: Encoders,
    items: Iterable[TrainItem],
    prompts: Iterable[str],
    tick: Progress,
    share: Shard,
) -> tuple[CacheStats, CacheStats]:
    """Encode what is missing of `items` and `prompts`, one encoder after the other, and free both."""
    extras, device, dtype = encoders.extras, encoders.device, encoders.dtype
    batch_px = (
        cache_builder.BATCH_PX if device.type == "cuda" else 0
    )  # one by one, a CPU makes the same bits every time
    images = cache_builder.fill_latents(
        cache, items, encoders.vae_digest, lambda: image_encoder(extras, device), tick, share, batch_px
    )
    _free()
    texts = cache_builder.fill_prompts(
        cache,
        prompts,
        encoders.text_digest,
        dtype,
        lambda: prompt_encoder(extras, device, dtype, encoders.warn),
        tick,
        share,
    )
    _free()
    return images, texts


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
