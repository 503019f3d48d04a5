"""Filling the caches: images and prompts that are missing are encoded, and their encoders freed before training.

Each process of a run encodes its own share and waits for the others; what is missing then, as on a machine with a
cache of its own, each encodes for itself. Two runs on one volume agree on nothing: an entry is named by its content and
written whole, so the worst is that both encode the same image.
"""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.images import fit, load
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.dataset.tensor_cache import TensorCache, latent_key, prompt_key
from zimage_train.errors import DataError, Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.io.progress import Progress, StepProgress
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.models import text_encoder, vae
from zimage_train.models.components import LATENT_CHANNELS, LATENT_STRIDE

PROMPT_BYTES = 700_000
"""Embeddings of a caption of about 130 tokens in bf16; asked of the disk before anything is encoded."""
BATCH_PX = 2**20
"""Of images of one size that are encoded together on a GPU."""

EncodeImages = Callable[[list[Image.Image]], Tensor]
"""Images of one size to latents (b, 16, h/8, w/8)."""
EncodePrompts = Callable[[list[str], StepProgress], Iterator[tuple[str, Tensor]]]
"""Prompts to embeddings (tokens, features), with a tick; they may come in another order."""
"""Told what is done, how much of it, and of how much."""
EncodeKeys = Callable[[list[str]], Iterator[tuple[str, Tensor]]]
"""Missing keys to pairs of a key and its value, in any order; begins by loading what it encodes with."""


@dataclass(frozen=True)
class Shard:
    """Which of several processes this is, and how it waits for the others."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class CacheStats:
    """What filling a cache did."""

    found: int
    encoded: int
    damaged: int

    def __str__(self) -> str:
        damaged = f", {self.damaged} of them damaged entries" if self.damaged else ""
        return f"{self.found} found, {self.encoded} encoded{damaged}"


@dataclass(frozen=True)
class Encoders:
    """Which encoders, where, and what they are by content."""

    extras: Path
    device: torch.device
    dtype: str
    vae_digest: str
    text_digest: str
    warn: Callable[[str], None]


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


def encode_missing(
    cache: TensorCache,
    encoders: Encoders,
    items: Iterable[TrainItem],
    prompts: Iterable[str],
    tick: Progress,
    share: Shard,
) -> tuple[CacheStats, CacheStats]:
    """Encode what is missing of `items` and `prompts`, one encoder after the other, and free both.

    Raises:
        DataError: an image changed since it was checked, or the VAE makes values of it that are not finite.
        WeightsError: the text encoder makes values that are not finite.
        DiskError: there is no room for them, or they cannot be written.
    """
    images = _fill_latents(cache, encoders, items, tick, share)
    _free()
    texts = _fill_prompts(cache, encoders, prompts, tick, share)
    _free()
    return images, texts


def fill_generated(
    cache: TensorCache, sizes: dict[str, int], draw: Callable[[str], Tensor], tick: Progress, share: Shard
) -> CacheStats:
    """Draw what of the keys of `sizes` (bytes) is not in the cache yet, one after the other.

    Raises:
        WeightsError: the model draws what is not finite.
    """

    def encode(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            value = draw(key)
            if not value.isfinite().all():
                what, todo = "draws images that are not finite", "use other weights, or another lora.init_from"
                raise WeightsError(Problem("model", what, todo))
            yield key, value

    return _fill(cache, "own images", sizes, encode, tick, share)


def _fill_latents(
    cache: TensorCache, encoders: Encoders, items: Iterable[TrainItem], tick: Progress, share: Shard
) -> CacheStats:
    jobs = {latent_key(item.image, item.size, item.flip, encoders.vae_digest): item for item in items}
    # One by one, a CPU makes the same bits every time.
    batch_px = BATCH_PX if encoders.device.type == "cuda" else 0

    def encode(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        encoder = image_encoder(encoders.extras, encoders.device)
        for batch in _batches_of_one_size(keys, jobs, batch_px):
            latents = encoder([_fitted(jobs[key]) for key in batch])
            for key, one in zip(batch, latents, strict=True):
                if not one.isfinite().all():
                    what = "the VAE's latents of it are not finite"
                    path = str(jobs[key].image.path)
                    raise DataError(Problem(path, what, "remove the image, or use another VAE"))
                yield key, one.clone()

    sizes = {key: _latent_bytes(item.size) for key, item in jobs.items()}
    return _fill(cache, "images", sizes, encode, tick, share)


def _fill_prompts(
    cache: TensorCache, encoders: Encoders, prompts: Iterable[str], tick: Progress, share: Shard
) -> CacheStats:
    jobs = {prompt_key(prompt, encoders.text_digest, encoders.dtype): prompt for prompt in prompts}
    keys_by_prompt = {prompt: key for key, prompt in jobs.items()}
    by_layer = partial(tick, "encoding prompts, layer by layer")

    def encode(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        encoder = prompt_encoder(encoders.extras, encoders.device, encoders.dtype, encoders.warn)
        for prompt, embeds in encoder([jobs[key] for key in keys], by_layer):
            if not embeds.isfinite().all():
                what = f"its embedding of {prompt[:40]!r} is not finite"
                raise WeightsError(Problem("text_encoder", what, "get the files of model.extras again"))
            yield keys_by_prompt[prompt], embeds

    return _fill(cache, "prompts", dict.fromkeys(jobs, PROMPT_BYTES), encode, tick, share)


def _fill(
    cache: TensorCache, what: str, sizes: dict[str, int], encode: EncodeKeys, tick: Progress, share: Shard
) -> CacheStats:
    """Encode every key of `sizes` (bytes) whose entry is missing or damaged: its own share, then what others left."""
    atomic.remove_stale_temp_files(cache.folder)
    missing: list[str] = []
    for number, key in enumerate(sizes, 1):
        if cache.read(key) is None:
            missing.append(key)
        tick(f"checking cached {what}", number, len(sizes))
    damaged = sum(cache.has_file(key) for key in missing)
    atomic.require_free_space(cache.folder, sum(sizes[key] for key in missing), f"cached {what}")

    def write(keys: list[str]) -> int:
        encoded = encode(keys) if keys else ()
        for number, (key, value) in enumerate(encoded, 1):
            cache.write(key, value.cpu())
            tick(f"encoding {what}", number, len(keys))
        return len(keys)

    # Shares are of all keys, which every process sees alike, and not of the missing ones, which become fewer meanwhile.
    own = set(list(sizes)[share.rank :: share.world_size])
    encoded = write([key for key in missing if key in own])
    share.barrier()
    encoded += write([key for key in missing if key not in own and cache.read(key) is None])
    return CacheStats(len(sizes) - encoded, encoded, damaged)


def _latent_bytes(size: Bucket) -> int:
    return 4 * LATENT_CHANNELS * (size.width // LATENT_STRIDE) * (size.height // LATENT_STRIDE)


def _batches_of_one_size(keys: list[str], jobs: dict[str, TrainItem], batch_px: int) -> Iterator[list[str]]:
    alike: dict[Bucket, list[str]] = {}
    for key in keys:
        alike.setdefault(jobs[key].size, []).append(key)
    for size, same in alike.items():
        most = max(batch_px // (size.width * size.height), 1)
        for start in range(0, len(same), most):
            yield same[start : start + most]


def _fitted(item: TrainItem) -> Image.Image:
    path = item.image.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read any more ({error.strerror})", "put it back")) from None
    if hashlib.sha256(content).hexdigest() != item.image.digest:
        raise DataError(Problem(str(path), "changed while this command ran", "run it again"))
    fitted = fit(load(path, content), item.size)
    return ImageOps.mirror(fitted) if item.flip else fitted


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
