"""Pictures of a run on its way: true Turbo, that is without the adapter, with the LoRA as it is now."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zimage_train.assemble import Frozen, original
from zimage_train.model import vae
from zimage_train.sampling.recipe import Recipe
from zimage_train.sampling.turbo import denoise

Tick = Callable[[int, int], None]


def render(
    frozen: Frozen,
    extras: Path,
    recipes: list[Recipe],
    embeds: Mapping[str, Tensor],
    tick: Tick,
    also: Path | None = None,
) -> list[Image.Image]:
    """One picture a recipe, on the model at `also` if given. The model comes back with the same weights and mode."""
    if not recipes:
        return []
    model = frozen.model
    was_training = model.training
    total = sum(recipe.steps for recipe in recipes)
    done = 0

    def step(index: int, steps: int) -> None:
        nonlocal done
        done += 1
        tick(done, total)

    model.eval()
    try:
        with original(frozen, also):
            latents = [
                denoise(model, r, embeds[r.prompt], embeds.get(r.negative) if r.guidance > 0 else None, step)
                for r in recipes
            ]
    finally:
        model.train(was_training)
    decoder = vae.load(extras, model.device, model.dtype)
    images = [vae.decode(decoder, one)[0] for one in latents]
    del decoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return images
