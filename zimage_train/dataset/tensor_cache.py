"""Latents and prompt embeddings on disk, under keys made of their inputs, and checked when they are read.

A key is a digest of the inputs: the bytes of the image, its size and the VAE, or the prompt and the text encoder. So
after a change only the entries that depend on the changed image, caption or encoder are encoded again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_train.dataset import masks
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.dataset.scan import ImageRecord
from zimage_train.errors import DataError, Problem, WeightsError
from zimage_train.io import tensorfile

FORMAT = 1
"""Incremented whenever images or prompts are prepared differently; part of every key, so old entries are not found."""


@dataclass(frozen=True)
class TensorCache:
    """Entries under a folder, shared by all runs."""

    folder: Path

    def read(self, key: str) -> Tensor | None:
        """Return the tensor under `key`, or None if it is missing, damaged or was stored under another key."""
        try:
            tensors, metadata = tensorfile.load_with_digest(self._path(key))
        except WeightsError:
            return None
        return tensors.get("value") if metadata.get("key") == key else None

    def has_file(self, key: str) -> bool:
        """Return whether there is an entry for `key`, which may be damaged."""
        return self._path(key).exists()

    def write(self, key: str, value: Tensor) -> None:
        """Store `value` under `key`.

        Raises:
            DiskError: it cannot be written.
        """
        tensorfile.save_with_digest(self._path(key), {"value": value}, {"key": key})

    def _path(self, key: str) -> Path:
        # Two digits as a folder: some file systems become slow with many thousand files in a folder.
        kind, digest = key.split("/")
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"


def latent_key(image: ImageRecord, size: Bucket, flip: bool, vae_digest: str) -> str:
    """Return the key of an image's latents: its bytes, its size, whether it is mirrored, the VAE."""
    # Added for mirrored images only, so that the others keep the keys that they had before `flip` existed.
    mirrored = ("flip",) if flip else ()
    return f"latents/{_digest('latents', image.digest, size.width, size.height, vae_digest, *mirrored)}"


def prompt_key(prompt: str, encoder_digest: str, dtype: str) -> str:
    """Return the key of a prompt's embeddings: the prompt, the text encoder with its template, the precision."""
    return f"prompts/{_digest('prompts', prompt, encoder_digest, dtype)}"


def generated_key(request: str, *parts: str) -> str:
    """Return the key of latents that the model generates: the request, and `parts` that identify method and model."""
    # `own` is an old name of generated images. It stays, as existing entries would not be found under another.
    return f"own/{_digest('own', request, *parts)}"


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()


@dataclass(frozen=True)
class CachedDataset:
    """The cached tensors of a run: latents, prompt embeddings, and masks on the grid of the latents."""

    cache: TensorCache
    vae_digest: str
    text_digest: str
    dtype: str
    generated_key: Callable[[TrainItem], str] | None = None
    """The cache key of an item's generated latents, for methods that train on these in place of images."""
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def latents(self, item: TrainItem) -> Tensor:
        """Return the latents that `item` is trained on: (16, h/8, w/8), or a trajectory of such for imitation."""
        if self.generated_key is None:
            return self.image_latents(item)
        return self._read(self.generated_key(item), str(item.image.path))

    def image_latents(self, item: TrainItem) -> Tensor:
        """Return the latents (16, h/8, w/8) of the image of `item`."""
        return self._read(latent_key(item.image, item.size, item.flip, self.vae_digest), str(item.image.path))

    def embeds(self, prompt: str) -> Tensor:
        """Return the embeddings (tokens, features) of `prompt`."""
        return self._read(prompt_key(prompt, self.text_digest, self.dtype), f"prompt {prompt[:40]!r}")

    def mask(self, item: TrainItem) -> Tensor | None:
        """Return the mask (1, h/8, w/8) of `item` in [0, 1], or None if it has none."""
        image = item.image
        if image.mask is None:
            return None
        key = (image.digest, image.mask.digest, item.size, item.flip)
        if key not in self._masks:
            # Kept as bytes, a quarter of the memory of fp32 and without loss: the values are whole numbers over 255.
            mask = masks.mask_on_latents(image.mask, item.size, item.flip, image.digest)
            self._masks[key] = (torch.from_numpy(mask) * 255.0).round().to(torch.uint8)
        return self._masks[key].unsqueeze(0).float() / 255.0

    def _read(self, key: str, source: str) -> Tensor:
        """Return the tensor under `key`, which was cached when the run began; `source` is named in the error.

        Raises:
            DataError: it is gone or damaged.
        """
        value = self.cache.read(key)
        if value is None:
            message = "its cache entry is gone or damaged"
            raise DataError(Problem(source, message, "run the same command again", "cache-entry-gone"))
        return value
