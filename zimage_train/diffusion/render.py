"""Rendering of images with the model in memory: previews of a run, and the images of `sample`."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from PIL import Image
from torch import Tensor

from zimage_train.diffusion.frozen import FrozenTransformer, original_weights
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.diffusion.sampler import sample_latents
from zimage_train.io.progress import StepProgress
from zimage_train.models import vae
from zimage_train.typing import LatentBatch


def render_images(
    frozen: FrozenTransformer,
    vae_path: Path,
    requests: Sequence[SamplingRequest],
    embeds: Mapping[str, Tensor],
    progress: StepProgress,
    max_batch: int = 1,
) -> list[Image.Image]:
    """Return an image for each of `requests`, drawn without the training adapter but with the LoRA that is attached.

    The model comes back with the same weights and in the same mode.
    """
    with eval_mode(frozen.model), original_weights(frozen):
        latents = sample_all(frozen.model, requests, embeds, progress, max_batch)
    return decode_all(frozen.model, vae_path, latents)


@contextlib.contextmanager
def eval_mode(model: ZImageTransformer2DModel) -> Iterator[None]:
    """Within the block the model is in eval mode; after it in the mode that it was in before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def sample_all(
    model: ZImageTransformer2DModel,
    requests: Sequence[SamplingRequest],
    embeds: Mapping[str, Tensor],
    progress: StepProgress,
    max_batch: int = 1,
) -> list[LatentBatch]:
    """Return the latents (1, 16, h/8, w/8) of each of `requests`, sampled with the model as it is now.

    Up to `max_batch` requests that differ only in prompts and seed go through the model as a batch. `progress` counts
    the steps of all batches.
    """
    batches = split_into_batches(requests, max_batch)
    total = sum(batch[0].steps for batch in batches)
    latents: list[LatentBatch] = []
    done = 0

    def step(index: int, steps: int) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for batch in batches:
        latents.extend(sample_latents(model, batch, embeds, step).split(1))
    return latents


def decode_all(model: ZImageTransformer2DModel, vae_path: Path, latents: Sequence[LatentBatch]) -> list[Image.Image]:
    """Return the images of `latents`, decoded on the device and in the dtype of `model`.

    The VAE is loaded for this call only: a run needs the memory for training between previews.
    """
    if not latents:
        return []
    decoder = vae.load_vae(vae_path, model.device, model.dtype)
    images = [vae.decode_latents(decoder, single)[0] for single in latents]
    del decoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return images


def split_into_batches(requests: Sequence[SamplingRequest], max_batch: int) -> list[list[SamplingRequest]]:
    """Split `requests`, in their order, into batches of up to `max_batch` that differ only in prompts and seed."""

    def shared_settings(request: SamplingRequest) -> tuple[float, ...]:
        return request.width, request.height, request.steps, request.guidance, request.shift

    batches = []
    for _, neighbours in itertools.groupby(requests, shared_settings):
        group = list(neighbours)
        for start in range(0, len(group), max_batch):
            batches.append(group[start : start + max_batch])
    return batches
