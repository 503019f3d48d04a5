"""Latents and prompt embeddings on disk, found by what went into them, checked when read.

A key is a digest of content: the image's bytes, its size and the VAE; the prompt and the text encoder. So a changed
image, caption or encoder is encoded again and nothing else is.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.scan import ImageRecord
from zimage_train.errors import DataError, Problem, WeightsError
from zimage_train.io import tensorfile

FORMAT = 1
"""Raised when the way images or prompts are prepared changes, so that old entries are not found."""


@dataclass(frozen=True)
class TensorCache:
    """Entries under one folder, shared by all runs."""

    folder: Path

    def read(self, key: str) -> Tensor | None:
        """The tensor stored under `key`, or None when it is missing, damaged or stored under another key."""
        try:
            tensors, metadata = tensorfile.load_with_digest(self._path(key))
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
        tensorfile.save_with_digest(self._path(key), {"value": value}, {"key": key})

    def _path(self, key: str) -> Path:
        kind, digest = key.split("/")
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"


def latent_key(image: ImageRecord, size: Bucket, flip: bool, vae_digest: str) -> str:
    """The key of an image's latents: its bytes, its size, whether it is mirrored, the VAE."""
    mirrored = ("flip",) if flip else ()
    return f"latents/{_digest('latents', image.digest, size.width, size.height, vae_digest, *mirrored)}"


def prompt_key(prompt: str, encoder_digest: str, dtype: str) -> str:
    """The key of a prompt's embeddings: the prompt, the text encoder with its template, the precision."""
    return f"prompts/{_digest('prompts', prompt, encoder_digest, dtype)}"


def generated_key(recipe: str, *parts: str) -> str:
    """The key of what the model itself draws by `recipe`: that and all that the model is."""
    return f"own/{_digest('own', recipe, *parts)}"


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()


def read_required(cache: TensorCache, key: str, what: str) -> Tensor:
    """The tensor under `key`, which was there when the run began.

    Raises:
        DataError: it is gone or damaged.
    """
    value = cache.read(key)
    if value is None:
        raise DataError(Problem(what, "its cache entry is gone or damaged", "run the same command again"))
    return value
