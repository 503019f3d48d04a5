"""Filling the caches: missing latents and embeddings are encoded, and the encoders are freed before training.

Each process of a run encodes its own shard and waits for the others. Entries that are missing even then, because
another machine wrote them to a cache of its own, are encoded by each process for itself. Two runs may fill a cache at
the same time without a lock: an entry is named by its inputs and written whole, so at worst both encode the same image.
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
from zimage_train.models.components import LATENT_CHANNELS, LATENT_STRIDE, ExtrasPaths

PROMPT_BYTES = 700_000
"""Estimated size of an embedding: a caption of about 130 tokens in bf16."""
BATCH_PX = 2**20
"""Pixels of the images of equal size that a GPU encodes together."""

EncodeImages = Callable[[list[Image.Image]], Tensor]
"""Encodes images of equal size to latents (b, 16, h/8, w/8)."""
EncodePrompts = Callable[[list[str], StepProgress], Iterator[tuple[str, Tensor]]]
"""Encodes prompts, and yields pairs of a prompt and its embeddings (tokens, features), in any order."""
EncodeKeys = Callable[[list[str]], Iterator[tuple[str, Tensor]]]
"""Loads an encoder, encodes the inputs of some cache keys, and yields pairs of a key and its tensor, in any order."""


@dataclass(frozen=True)
class Shard:
    """The part of the work that a process does, and a barrier to wait for the others."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class CacheStats:
    """Numbers of cache entries, as each process counts them."""

    found: int
    """Entries that this process did not encode: they were there before, or another process of the run wrote them."""
    encoded: int
    """Entries that this process encoded."""
    damaged: int
    """Entries that were damaged at the start, whichever process encoded them again."""

    def __str__(self) -> str:
        damaged = f", {self.damaged} of them damaged entries" if self.damaged else ""
        return f"{self.found} found, {self.encoded} encoded{damaged}"


@dataclass(frozen=True)
class Encoders:
    """Where the encoders are, how they are run, and their digests."""

    extras: ExtrasPaths
    device: torch.device
    dtype: str
    """Precision of the text encoder and its embeddings; the VAE always runs in fp32."""
    vae_digest: str
    text_digest: str
    warn: Callable[[str], None]
    """Called for prompts that are too long."""


def image_encoder(vae_path: Path, device: torch.device) -> EncodeImages:
    """Load the VAE and return its encoder.

    A batch that does not fit the device is encoded in tiles of 512 px, whose overlaps are blended.
    """
    # In fp32 whatever the run's precision is: latents are encoded once and used in every epoch and every later run.
    model = vae.load_vae(vae_path, device, torch.float32)

    def encode(images: list[Image.Image]) -> Tensor:
        return vae.encode_images(model, torch.stack([vae.to_pixels(image) for image in images]))

    return encode


def prompt_encoder(
    extras: ExtrasPaths, device: torch.device, dtype: str, warn: Callable[[str], None] = lambda text: None
) -> EncodePrompts:
    """Load the text encoder and return its encoding of prompts; `warn` is called for prompts that are too long."""
    return partial(text_encoder.load_text_encoder(extras, device, TORCH_DTYPES[dtype]).encode_all, warn=warn)


def encode_missing(
    cache: TensorCache,
    encoders: Encoders,
    items: Iterable[TrainItem],
    prompts: Iterable[str],
    progress: Progress,
    shard: Shard,
) -> tuple[CacheStats, CacheStats]:
    """Encode the images of `items` and the `prompts` that `cache` does not have, and free the encoders.

    Raises:
        DataError: an image has changed since it was checked, or its latents are not finite.
        WeightsError: the embedding of a prompt is not finite.
        DiskError: there is no room for the entries, or they cannot be written.
    """
    # The encoders run in turn: the text encoder alone takes most of a small card, and the transformer is next. If
    # nothing was encoded, no encoder was loaded, and a garbage collection would only cost time.
    image_stats = _fill_latents(cache, encoders, items, progress, shard)
    if image_stats.encoded:
        _free()
    prompt_stats = _fill_prompts(cache, encoders, prompts, progress, shard)
    if prompt_stats.encoded:
        _free()
    return image_stats, prompt_stats


def fill_generated(
    cache: TensorCache, sizes: dict[str, int], generate: Callable[[str], Tensor], progress: Progress, shard: Shard
) -> CacheStats:
    """Generate the tensors that `cache` does not have, in turn.

    Args:
        cache: gets the tensors.
        sizes: cache key -> bytes of its tensor.
        generate: returns the tensor of a key.
        progress: called for each key.
        shard: the part of this process.

    Raises:
        WeightsError: a generated tensor is not finite.
    """

    def generate_all(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            value = generate(key)
            if not value.isfinite().all():
                message, hint = "draws images that are not finite", "use other weights, or another lora.init_from"
                raise WeightsError(Problem("model", message, hint, "not-finite"))
            yield key, value

    return _fill(cache, "own images", sizes, generate_all, progress, shard)


def _fill_latents(
    cache: TensorCache, encoders: Encoders, items: Iterable[TrainItem], progress: Progress, shard: Shard
) -> CacheStats:
    # A dict, since repeats of an image are items of their own that have the same latents.
    items_by_key = {latent_key(item.image, item.size, item.flip, encoders.vae_digest): item for item in items}
    # Images of a batch may get other last bits than alone, depending on its size. A CPU gains little by batches and
    # encodes a single image at a time, so that its latents never depend on what else was missing.
    batch_px = BATCH_PX if encoders.device.type == "cuda" else 0

    def encode(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        encode_images = image_encoder(encoders.extras.vae, encoders.device)
        for batch in _batches_of_one_size(keys, items_by_key, batch_px):
            latents = encode_images([_load_fitted(items_by_key[key]) for key in batch])
            for key, latent in zip(batch, latents, strict=True):
                if not latent.isfinite().all():
                    path = str(items_by_key[key].image.path)
                    message = "the VAE's latents of it are not finite"
                    hint = "remove the image, or use another VAE"
                    raise DataError(Problem(path, message, hint, "not-finite"))
                # A copy, since a view keeps the latents of the whole batch in memory.
                yield key, latent.clone()

    sizes = {key: _latent_bytes(item.size) for key, item in items_by_key.items()}
    return _fill(cache, "images", sizes, encode, progress, shard)


def _batches_of_one_size(keys: list[str], items_by_key: dict[str, TrainItem], batch_px: int) -> Iterator[list[str]]:
    """Yield `keys` in batches of images of equal size, each of at most `batch_px` pixels or of a single image."""
    keys_by_size: dict[Bucket, list[str]] = {}
    for key in keys:
        keys_by_size.setdefault(items_by_key[key].size, []).append(key)
    for size, same_size in keys_by_size.items():
        batch_size = max(batch_px // (size.width * size.height), 1)
        for start in range(0, len(same_size), batch_size):
            yield same_size[start : start + batch_size]


def _load_fitted(item: TrainItem) -> Image.Image:
    """Return the image of `item`, scaled, cropped and mirrored as it is trained.

    Raises:
        DataError: the file is gone or has changed since it was checked.
    """
    path = item.image.path
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read any more ({error.strerror})"
        raise DataError(Problem(str(path), message, "put it back", "unreadable-file")) from None
    # The key of the cache entry holds the digest from the scan, so other content must not be stored under it.
    if hashlib.sha256(content).hexdigest() != item.image.digest:
        raise DataError(Problem(str(path), "changed while this command ran", "run it again", "changed-file"))
    fitted = fit(load(path, content), item.size)
    # Mirrored before it is encoded: the VAE is not symmetric, so mirrored latents are not those of the mirrored image.
    return ImageOps.mirror(fitted) if item.flip else fitted


def _latent_bytes(size: Bucket) -> int:
    return 4 * LATENT_CHANNELS * (size.width // LATENT_STRIDE) * (size.height // LATENT_STRIDE)


def _fill_prompts(
    cache: TensorCache, encoders: Encoders, prompts: Iterable[str], progress: Progress, shard: Shard
) -> CacheStats:
    keys = {prompt: prompt_key(prompt, encoders.text_digest, encoders.dtype) for prompt in prompts}
    prompts_by_key = {key: prompt for prompt, key in keys.items()}
    layer_progress = partial(progress, "encoding prompts, layer by layer")

    def encode(missing: list[str]) -> Iterator[tuple[str, Tensor]]:
        encode_prompts = prompt_encoder(encoders.extras, encoders.device, encoders.dtype, encoders.warn)
        for prompt, embeds in encode_prompts([prompts_by_key[key] for key in missing], layer_progress):
            if not embeds.isfinite().all():
                message = f"its embedding of {prompt[:40]!r} is not finite"
                raise WeightsError(Problem("text_encoder", message, "get the text encoder again", "not-finite"))
            yield keys[prompt], embeds

    return _fill(cache, "prompts", dict.fromkeys(prompts_by_key, PROMPT_BYTES), encode, progress, shard)


def _fill(
    cache: TensorCache, what: str, sizes: dict[str, int], encode: EncodeKeys, progress: Progress, shard: Shard
) -> CacheStats:
    """Encode every missing or damaged entry: first those of the shard, then those that other processes did not write.

    Args:
        what: the entries, in the plural, for progress and errors.
        sizes: cache key -> bytes of its entry, the same in every process.
        encode: called only if there are keys to encode, since it loads an encoder.
    """
    # A process that was killed while it wrote has left its temporary file.
    atomic.remove_stale_temp_files(cache.folder)
    missing: list[str] = []
    for number, key in enumerate(sizes, 1):
        # Read and compared with its digest now: a damaged entry would otherwise end the run in the middle of training.
        if cache.read(key) is None:
            missing.append(key)
        progress(f"checking cached {what}", number, len(sizes))
    damaged = {key for key in missing if cache.has_file(key)}
    # Checked for all entries before the first is encoded: better to learn of a full disk now than after an hour.
    atomic.require_free_space(cache.folder, sum(sizes[key] for key in missing), f"cached {what}")

    def encode_and_write(keys: list[str]) -> None:
        if not keys:
            return  # `encode` would load the encoder
        for number, (key, value) in enumerate(encode(keys), 1):
            cache.write(key, value.cpu())
            progress(f"encoding {what}", number, len(keys))

    # The shards are cut from all keys, of which every process has the same list, and not from the missing keys: a
    # process that looks later misses fewer, since others are writing already. In strides, so that large images, which
    # often come together, are spread over the processes.
    own_keys = set(list(sizes)[shard.rank :: shard.world_size])
    own_missing = [key for key in missing if key in own_keys]
    encode_and_write(own_missing)
    shard.barrier()
    # Read again: the entries of the other processes are in this cache now, unless they write to another disk.
    left_missing = [key for key in missing if key not in own_keys and cache.read(key) is None]
    encode_and_write(left_missing)
    encoded = [*own_missing, *left_missing]
    return CacheStats(len(sizes) - len(encoded), len(encoded), len(damaged.intersection(encoded)))


def _free() -> None:
    """Release the memory of an encoder to which no variable refers any more."""
    gc.collect()  # modules refer to themselves in cycles, which wait for the collector
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
