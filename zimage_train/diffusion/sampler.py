"""The sampler: Euler on the shifted grid of sigmas, step by step as diffusers' ZImagePipeline does it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train.diffusion import flow
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io.progress import StepProgress
from zimage_train.models.components import LATENT_CHANNELS, LATENT_STRIDE
from zimage_train.models.transformer import velocity
from zimage_train.typing import LatentBatch, PromptEmbeds


@torch.no_grad()
def sample_latents(
    model: ZImageTransformer2DModel,
    requests: Sequence[SamplingRequest],
    embeds: Mapping[str, PromptEmbeds],
    progress: StepProgress,
) -> LatentBatch:
    """Return latents (b, 16, h/8, w/8) in fp32 of `requests`, which may differ in prompts and seed only."""
    first = requests[0]
    sigmas = flow.sampling_sigmas(first.steps, first.shift)
    trajectory = sample_trajectory(model, requests, embeds, sigmas)
    latents = next(trajectory)[1]  # the noise
    for index, (_, after_step) in enumerate(trajectory, 1):
        latents = after_step
        progress(index, first.steps)
    return latents


@torch.no_grad()
def sample_trajectory(
    model: ZImageTransformer2DModel,
    requests: Sequence[SamplingRequest],
    embeds: Mapping[str, PromptEmbeds],
    sigmas: Sequence[float],
) -> Iterator[tuple[float, LatentBatch]]:
    """Yield each of `sigmas` with the latents (b, 16, h/8, w/8) at that noise level, from noise to image.

    `requests` may differ in prompts and seed only; `sigmas` take the place of the grid that they ask for.
    """
    device, first = model.device, requests[0]
    shape = (1, LATENT_CHANNELS, first.height // LATENT_STRIDE, first.width // LATENT_STRIDE)
    # Noise is drawn on the CPU, in fp32 and for each image by itself: so a GPU, a batch, ComfyUI, and a pipeline with
    # `torch.Generator("cpu")` all begin with the same numbers.
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    noise = torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])
    latents = noise.to(device)
    texts = [request.prompt for request in requests]
    # With guidance, prompts and negatives go through the model as a single batch, as in the pipeline.
    if first.guidance > 0:
        texts += [request.negative for request in requests]
    condition = [embeds[text].to(device, model.dtype) for text in texts]
    yield sigmas[0], latents
    for sigma, next_sigma in itertools.pairwise(sigmas):
        batch = latents.repeat(len(condition) // len(requests), 1, 1, 1)
        v = velocity(model, batch, torch.full((len(condition),), sigma), condition)
        if first.guidance > 0:
            v = flow.apply_guidance(v[: len(requests)], v[len(requests) :], first.guidance)
        # Latents stay in fp32 between steps, whatever the model computes in, as in the pipeline.
        latents = flow.euler(latents, v, sigma, next_sigma)
        yield next_sigma, latents
