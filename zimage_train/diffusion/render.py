"""Pictures of a run on its way: true Turbo, that is without the adapter, with the LoRA as it is now."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zimage_train.diffusion.frozen import FrozenTransformer, original_weights
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.diffusion.sampler import sample_latents
from zimage_train.io.progress import StepProgress
from zimage_train.models import vae


def render_images(
    frozen: FrozenTransformer,
    extras: Path,
    recipes: list[SamplingRequest],
    embeds: Mapping[str, Tensor],
    tick: StepProgress,
    also: Path | None = None,
    at_once: int = 1,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One image a recipe, on the model at `also` if given. The model comes back with the same weights and mode.

    Up to `at_once` that follow each other and differ in prompts and seed alone go through the model together.
    `meanwhile` is called before the weights are the training ones again.
    """
    model = frozen.model
    was_training = model.training
    together = batches(recipes, at_once)
    total = sum(batch[0].steps for batch in together)
    done = 0

    def step(index: int, steps: int) -> None:
        nonlocal done
        done += 1
        tick(done, total)

    model.eval()
    try:
        with original_weights(frozen, also):
            latents = [one for batch in together for one in sample_latents(model, batch, embeds, step).split(1)]
            meanwhile()
    finally:
        model.train(was_training)
    if not latents:
        return []
    decoder = vae.load_vae(extras, model.device, model.dtype)
    images = [vae.decode_latents(decoder, one)[0] for one in latents]
    del decoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return images


def batches(recipes: Sequence[SamplingRequest], at_once: int) -> list[list[SamplingRequest]]:
    """Those that go through the model together: neighbours that differ in prompts and seed alone."""

    def alike(recipe: SamplingRequest) -> tuple[float, ...]:
        return recipe.width, recipe.height, recipe.steps, recipe.guidance, recipe.shift

    groups = [list(group) for _, group in itertools.groupby(recipes, alike)]
    return [group[start : start + at_once] for group in groups for start in range(0, len(group), at_once)]
