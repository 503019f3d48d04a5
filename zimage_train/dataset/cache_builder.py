"""Filling the caches: what is missing is encoded, in batches, beside other processes that do the same.

Encoders come as callables and are made only when something is missing. Who encodes an entry claims it first, so that
two pods on one volume share the work; a claim whose owner is gone is taken over.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from zimage_train.dataset import images
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.dataset.tensor_cache import TensorCache, latent_key, prompt_key
from zimage_train.errors import DataError, Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.models.components import LATENT_CHANNELS, LATENT_STRIDE

PROMPT_BYTES = 700_000
"""Embeddings of a caption of about 130 tokens in bf16; asked of the disk before anything is encoded."""
BATCH_PX = 2**20
"""Of images of one size that are encoded together."""
CLAIM_SECONDS = 120.0
"""After which a claim that nobody renews is taken over: its owner is gone, or slower than this machine."""
POLL_SECONDS = 0.5

EncodeImages = Callable[[list[Image.Image]], Tensor]
"""Pictures of one size to latents (b, 16, h/8, w/8)."""
EncodePrompts = Callable[[list[str], Callable[[int, int], None]], Iterator[tuple[str, Tensor]]]
"""Prompts to embeddings (tokens, features), with a tick; they may come in another order."""
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Shard:
    """Which of several processes this is; each begins with its own share of what is missing."""

    rank: int = 0
    world_size: int = 1


SINGLE_PROCESS = Shard()
Made = tuple[str, Tensor]
"""A key and its value."""


@dataclass
class CacheStats:
    """What a filling did."""

    found: int = 0
    encoded: int = 0
    damaged: int = 0

    def __str__(self) -> str:
        damaged = f", {self.damaged} of them damaged entries" if self.damaged else ""
        return f"{self.found} found, {self.encoded} encoded{damaged}"


def fill_latents(
    cache: TensorCache,
    items: Iterable[TrainItem],
    vae_digest: str,
    load_encoder: Callable[[], EncodeImages],
    tick: Tick,
    share: Shard = SINGLE_PROCESS,
    batch_px: int = BATCH_PX,
) -> CacheStats:
    """Encode every image at every size that is not in the cache yet, those of one size together up to `batch_px`.

    Raises:
        DataError: an image changed since it was checked, or the VAE makes values of it that are not finite.
        DiskError: there is no room for them, or they cannot be written.
    """
    jobs = {latent_key(item.image, item.size, item.flip, vae_digest): item for item in items}

    def size(item: TrainItem) -> int:
        return 4 * LATENT_CHANNELS * (item.size.width // LATENT_STRIDE) * (item.size.height // LATENT_STRIDE)

    def batches(keys: list[str]) -> Iterator[list[str]]:
        alike: dict[Bucket, list[str]] = {}
        for key in keys:
            alike.setdefault(jobs[key].size, []).append(key)
        for bucket, same in alike.items():
            most = max(batch_px // (bucket.width * bucket.height), 1)
            yield from (same[start : start + most] for start in range(0, len(same), most))

    def encode(encoder: EncodeImages, keys: list[str], done: Callable[[int, int], None]) -> Iterator[Made]:
        latents = encoder([_fitted(jobs[key]) for key in keys])
        for key, one in zip(keys, latents, strict=True):
            if not one.isfinite().all():
                what = "the VAE's latents of it are not finite"
                path = str(jobs[key].image.path)
                raise DataError(Problem(path, what, "remove the image, or use another VAE"))
            yield key, one.clone()

    sizes = {key: size(item) for key, item in jobs.items()}
    return _CacheBuilder(cache, "pictures", tick, share, batches, load_encoder, encode).run(sizes)


def fill_prompts(
    cache: TensorCache,
    prompts: Iterable[str],
    encoder_digest: str,
    dtype: str,
    load_encoder: Callable[[], EncodePrompts],
    tick: Tick,
    share: Shard = SINGLE_PROCESS,
) -> CacheStats:
    """Encode every prompt that is not in the cache yet, all of a process's share together.

    Raises:
        WeightsError: the text encoder makes values that are not finite.
    """
    jobs = {prompt_key(prompt, encoder_digest, dtype): prompt for prompt in prompts}
    keys = {prompt: key for key, prompt in jobs.items()}

    def encode(encoder: EncodePrompts, wanted: list[str], done: Callable[[int, int], None]) -> Iterator[Made]:
        for prompt, embeds in encoder([jobs[key] for key in wanted], done):
            if not embeds.isfinite().all():
                what = f"its embedding of {prompt[:40]!r} is not finite"
                raise WeightsError(Problem("text_encoder", what, "get the files of model.extras again"))
            yield keys[prompt], embeds

    def batches(wanted: list[str]) -> Iterator[list[str]]:
        yield wanted

    sizes = dict.fromkeys(jobs, PROMPT_BYTES)
    return _CacheBuilder(cache, "prompts", tick, share, batches, load_encoder, encode).run(sizes)


def fill_generated(
    cache: TensorCache, sizes: dict[str, int], draw: Callable[[str], Tensor], tick: Tick, share: Shard
) -> CacheStats:
    """Draw what of the keys of `sizes` (bytes) is not in the cache yet, one after the other.

    Raises:
        WeightsError: the model draws what is not finite.
    """

    def encode(encoder: Callable[[str], Tensor], keys: list[str], done: Callable[[int, int], None]) -> Iterator[Made]:
        for key in keys:
            value = encoder(key)
            if not value.isfinite().all():
                what, todo = "draws images that are not finite", "use other weights, or another lora.init_from"
                raise WeightsError(Problem("model", what, todo))
            yield key, value

    def batches(keys: list[str]) -> Iterator[list[str]]:
        yield from ([key] for key in keys)

    return _CacheBuilder(cache, "own images", tick, share, batches, lambda: draw, encode, "drawing").run(sizes)


@dataclass
class _CacheBuilder:
    """Makes what is missing, beside others that do the same on the same folder."""

    cache: TensorCache
    what: str
    tick: Tick
    share: Shard
    batches: Callable[[list[str]], Iterator[list[str]]]
    load_encoder: Callable[[], Any]
    encode: Callable[[Any, list[str], Callable[[int, int], None]], Iterator[Made]]
    verb: str = "encoding"
    """What making an entry is called in progress."""
    encoder: Any = None
    damaged: set[str] = field(default_factory=set)

    def run(self, sizes: dict[str, int]) -> CacheStats:
        """Make every key of `sizes` (bytes) that is not there; then wait for those that others are making."""
        atomic.remove_stale_temp_files(self.cache.folder)
        missing: list[str] = []
        for number, key in enumerate(sizes, 1):
            if self.cache.read(key) is None:
                missing.append(key)
            else:
                self.cache.forget(key)
            self.tick(f"checking cached {self.what}", number, len(sizes))
        self.damaged = {key for key in missing if self.cache.has_file(key)}
        atomic.require_free_space(self.cache.folder, sum(sizes[key] for key in missing), f"cached {self.what}")
        encoded = self._make(missing[self.share.rank :: self.share.world_size]) + self._await(missing)
        return CacheStats(found=len(sizes) - encoded, encoded=encoded, damaged=len(self.damaged))

    def _make(self, keys: list[str]) -> int:
        """Make those of `keys` that nobody else makes or has made; how many they were."""
        made = 0
        for batch in self.batches(keys):
            claimed: list[str] = []
            try:
                claimed += (key for key in batch if self._is_missing(key) and self.cache.claim(key))
                made += self._encode(claimed, made, len(keys))
            finally:
                for key in claimed:
                    self.cache.release(key)
        return made

    def _is_missing(self, key: str) -> bool:
        return not self.cache.has_file(key) or (key in self.damaged and self.cache.read(key) is None)

    def _encode(self, keys: list[str], before: int, total: int) -> int:
        if not keys:
            return 0
        if self.encoder is None:
            self.encoder = self.load_encoder()

        def by_layer(done: int, layers: int) -> None:
            self.cache.renew(keys)
            self.tick(f"{self.verb} {self.what}, layer by layer", done, layers)

        renewed = time.monotonic()
        for number, (key, value) in enumerate(self.encode(self.encoder, keys, by_layer), 1):
            self.cache.write(key, value.cpu())
            if time.monotonic() - renewed > CLAIM_SECONDS / 4:
                self.cache.renew(keys)
                renewed = time.monotonic()
            self.tick(f"{self.verb} {self.what}", before + number, total)
        return len(keys)

    def _await(self, keys: list[str]) -> int:
        """Wait for what others make; make it here if they do not come to it."""
        made = 0
        seen: dict[str, tuple[float, float]] = {}
        while left := [key for key in keys if self._is_missing(key)]:
            now, free = time.monotonic(), []
            for key in left:
                renewed = self.cache.claimed_at(key)
                if renewed is None:
                    free.append(key)
                elif key in seen and seen[key][0] == renewed and now - seen[key][1] > CLAIM_SECONDS:
                    self.cache.take_over(key)
                    free.append(key)
                elif key not in seen or seen[key][0] != renewed:
                    seen[key] = (renewed, now)
            made += self._make(free)
            if not free:
                what = f"waiting for {self.what} that others encode (or have left, after {CLAIM_SECONDS:.0f} s)"
                self.tick(what, len(keys) - len(left), len(keys))
                time.sleep(POLL_SECONDS)
        return made


def _fitted(item: TrainItem) -> Image.Image:
    path = item.image.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read any more ({error.strerror})", "put it back")) from None
    if hashlib.sha256(content).hexdigest() != item.image.digest:
        raise DataError(Problem(str(path), "changed while this command ran", "run it again"))
    fitted = images.fit(images.load(path, content), item.size)
    return ImageOps.mirror(fitted) if item.flip else fitted
