"""The sampler: Euler on the shifted grid, as diffusers' ZImagePipeline does it, step for step."""

import itertools
from collections.abc import Callable

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train import flow
from zimage_train.model.extras import LATENT_CHANNELS, LATENT_STRIDE
from zimage_train.model.transformer import velocity
from zimage_train.sampling.recipe import Recipe
from zimage_train.tensors import Embeds, Images


@torch.no_grad()
def denoise(
    model: ZImageTransformer2DModel,
    recipe: Recipe,
    embeds: Embeds,
    negative_embeds: Embeds | None,
    tick: Callable[[int, int], None],
) -> Images:
    """Latents (1, 16, h/8, w/8) in fp32 of one picture.

    The noise comes from a CPU generator, so that a stock pipeline with `torch.Generator("cpu")` draws the same. With
    guidance, prompt and negative go through the model as one batch, also as there.
    """
    device = model.device
    shape = (1, LATENT_CHANNELS, recipe.height // LATENT_STRIDE, recipe.width // LATENT_STRIDE)
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(recipe.seed), dtype=torch.float32)
    latents = noise.to(device)
    condition = [embeds.to(device, model.dtype)]
    if recipe.guidance > 0 and negative_embeds is not None:
        condition.append(negative_embeds.to(device, model.dtype))
    sigmas = flow.sampling_sigmas(recipe.steps, recipe.shift)
    for index, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas), 1):
        batch = latents.repeat(len(condition), 1, 1, 1)
        output = velocity(model, batch, torch.full((len(condition),), sigma), condition)
        v = output if len(condition) == 1 else flow.guided(output[:1], output[1:], recipe.guidance)
        latents = flow.euler(latents, v, sigma, next_sigma)
        tick(index, recipe.steps)
    return latents
