"""Latents and prompt embeddings on disk, found by what went into them, checked when read.

A key is a digest of content: the picture's bytes, its size and the VAE; the prompt and the text encoder. So a changed
picture, caption or encoder is encoded again and nothing else is. Encoders come as callables and are made only when
something is missing.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from zimage_train import files, tensorfile
from zimage_train.data import images
from zimage_train.data.buckets import Bucket
from zimage_train.data.folder import Picture
from zimage_train.data.plan import Item
from zimage_train.errors import DataError, Problem, WeightsError
from zimage_train.model.extras import LATENT_CHANNELS, LATENT_STRIDE

FORMAT = 1
"""Raised when the way pictures or prompts are prepared changes, so that old entries are not found."""
PROMPT_BYTES = 700_000
"""Embeddings of a caption of about 130 tokens in bf16; asked of the disk before anything is encoded."""

EncodePicture = Callable[[Image.Image], Tensor]
EncodePrompt = Callable[[str], Tensor]
Tick = Callable[[str, int, int], None]


@dataclass
class Tally:
    """What a filling did."""

    found: int = 0
    encoded: int = 0
    damaged: int = 0

    def __str__(self) -> str:
        damaged = f", {self.damaged} of them damaged entries" if self.damaged else ""
        return f"{self.found} found, {self.encoded} encoded{damaged}"


@dataclass(frozen=True)
class Cache:
    """Entries under one folder, shared by all runs."""

    folder: Path

    def read(self, key: str) -> Tensor | None:
        """The tensor stored under `key`, or None when it is missing, damaged or stored under another key."""
        try:
            tensors, metadata = tensorfile.load_sealed(self._path(key))
        except WeightsError:
            return None
        return tensors.get("value") if metadata.get("key") == key else None

    def has_file(self, key: str) -> bool:
        return self._path(key).exists()

    def write(self, key: str, value: Tensor) -> None:
        """Store `value` under `key`.

        Raises:
            DiskError: it cannot be written.
        """
        tensorfile.save_sealed(self._path(key), {"value": value}, {"key": key})

    def _path(self, key: str) -> Path:
        kind, digest = key.split("/")
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"


def latent_key(picture: Picture, size: Bucket, vae_digest: str) -> str:
    """The key of a picture's latents: its bytes, its size, the VAE."""
    return f"latents/{_digest('latents', picture.digest, size.width, size.height, vae_digest)}"


def prompt_key(prompt: str, encoder_digest: str, dtype: str) -> str:
    """The key of a prompt's embeddings: the prompt, the text encoder with its template, the precision."""
    return f"prompts/{_digest('prompts', prompt, encoder_digest, dtype)}"


def fill_latents(
    cache: Cache, items: Iterable[Item], vae_digest: str, load_encoder: Callable[[], EncodePicture], tick: Tick
) -> Tally:
    """Encode every picture at every size that is not in the cache yet.

    Raises:
        DataError: a picture changed since it was checked, or the VAE makes values of it that are not finite.
        DiskError: there is no room for them, or they cannot be written.
    """
    jobs = {latent_key(item.picture, item.size, vae_digest): item for item in items}

    def encode(encoder: EncodePicture, item: Item) -> Tensor:
        latents = encoder(_fitted(item))
        if not latents.isfinite().all():
            what = "the VAE's latents of it are not finite"
            raise DataError(Problem(str(item.picture.path), what, "remove the picture, or use another VAE"))
        return latents

    def size(item: Item) -> int:
        return 4 * LATENT_CHANNELS * (item.size.width // LATENT_STRIDE) * (item.size.height // LATENT_STRIDE)

    return _fill(cache, jobs, load_encoder, encode, size, "pictures", tick)


def fill_prompts(
    cache: Cache,
    prompts: Iterable[str],
    encoder_digest: str,
    dtype: str,
    load_encoder: Callable[[], EncodePrompt],
    tick: Tick,
) -> Tally:
    """Encode every prompt that is not in the cache yet.

    Raises:
        WeightsError: the text encoder makes values that are not finite.
    """
    jobs = {prompt_key(prompt, encoder_digest, dtype): prompt for prompt in prompts}

    def encode(encoder: EncodePrompt, prompt: str) -> Tensor:
        embeds = encoder(prompt)
        if not embeds.isfinite().all():
            what = f"its embedding of {prompt[:40]!r} is not finite"
            raise WeightsError(Problem("text_encoder", what, "get the files of model.extras again"))
        return embeds

    return _fill(cache, jobs, load_encoder, encode, lambda prompt: PROMPT_BYTES, "prompts", tick)


def _fill(cache, jobs, load_encoder, encode, size, what: str, tick: Tick) -> Tally:
    tally = Tally()
    files.clear_debris(cache.folder)
    missing = {}
    for number, (key, job) in enumerate(jobs.items(), 1):
        if cache.read(key) is None:
            missing[key] = job
            tally.damaged += cache.has_file(key)
        else:
            tally.found += 1
        tick(f"checking cached {what}", number, len(jobs))
    files.require_space(cache.folder, sum(map(size, missing.values())), f"cached {what}")
    encoder = load_encoder() if missing else None
    for number, (key, job) in enumerate(missing.items(), 1):
        cache.write(key, encode(encoder, job).cpu())
        tally.encoded += 1
        tick(f"encoding {what}", number, len(missing))
    return tally


def _fitted(item: Item) -> Image.Image:
    path = item.picture.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read any more ({error.strerror})", "put it back")) from None
    if hashlib.sha256(content).hexdigest() != item.picture.digest:
        raise DataError(Problem(str(path), "changed while this command ran", "run it again"))
    return images.fit(images.load(path, content), item.size)


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()


def require(cache: Cache, key: str, what: str) -> Tensor:
    """The tensor under `key`, which was there when the run began.

    Raises:
        DataError: it is gone or damaged.
    """
    value = cache.read(key)
    if value is None:
        raise DataError(Problem(what, "its cache entry is gone or damaged", "run the same command again"))
    return value
