"""The sampler: Euler on the shifted grid, as diffusers' ZImagePipeline does it, step for step."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train.diffusion import flow
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.models.components import LATENT_CHANNELS, LATENT_STRIDE
from zimage_train.models.transformer import velocity
from zimage_train.typing import LatentBatch, PromptEmbeds


@torch.no_grad()
def sample_latents(
    model: ZImageTransformer2DModel,
    recipes: Sequence[SamplingRequest],
    embeds: Mapping[str, PromptEmbeds],
    tick: Callable[[int, int], None],
) -> LatentBatch:
    """Latents (b, 16, h/8, w/8) in fp32 of images that differ in prompts and seed alone.

    The noise comes from a CPU generator, so that a stock pipeline with `torch.Generator("cpu")` draws the same. With
    guidance, prompts and negatives go through the model as one batch, also as there.
    """
    first = recipes[0]
    sigmas = flow.sampling_sigmas(first.steps, first.shift)
    walk = sample_trajectory(model, recipes, embeds, sigmas)
    latents = next(walk)[1]
    for index, (_, after) in enumerate(walk, 1):
        latents = after
        tick(index, first.steps)
    return latents


@torch.no_grad()
def sample_trajectory(
    model: ZImageTransformer2DModel,
    recipes: Sequence[SamplingRequest],
    embeds: Mapping[str, PromptEmbeds],
    sigmas: Sequence[float],
) -> Iterator[tuple[float, LatentBatch]]:
    """What `denoise` goes through: each of `sigmas` with the latents (b, 16, h/8, w/8) there, from noise to image."""
    device, first = model.device, recipes[0]
    shape = (1, LATENT_CHANNELS, first.height // LATENT_STRIDE, first.width // LATENT_STRIDE)
    generators = [torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes]
    noise = torch.cat([torch.randn(shape, generator=one, dtype=torch.float32) for one in generators])
    latents = noise.to(device)
    texts = [recipe.prompt for recipe in recipes]
    if first.guidance > 0:
        texts += [recipe.negative for recipe in recipes]
    condition = [embeds[text].to(device, model.dtype) for text in texts]
    yield sigmas[0], latents
    for sigma, next_sigma in itertools.pairwise(sigmas):
        batch = latents.repeat(len(condition) // len(recipes), 1, 1, 1)
        v = velocity(model, batch, torch.full((len(condition),), sigma), condition)
        if first.guidance > 0:
            v = flow.apply_guidance(v[: len(recipes)], v[len(recipes) :], first.guidance)
        latents = flow.euler(latents, v, sigma, next_sigma)
        yield next_sigma, latents
