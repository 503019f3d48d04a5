"""How far a LoRA takes Turbo from its own eight steps: its velocity where Turbo itself would be, against Turbo's.

Needs neither images nor a judge. Turbo's velocity at each of its sigmas is not that of flow matching but the mean
over its whole step: out of pure noise it heads for one image, where flow matching heads for the mean of all that the
prompt allows. That is what training by flow matching takes from it, so its first steps tell most.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train.diffusion import flow
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.diffusion.sampler import sample_trajectory
from zimage_train.io.progress import StepProgress
from zimage_train.lora import swap
from zimage_train.models.transformer import velocity
from zimage_train.typing import LatentBatch, PromptEmbeds

DECIDING = 3
"""Turbo's first steps, at sigmas of 0.9 and above, which are counted. What a LoRA is trained for changes the later ones
as much: on the miniature they do not tell a LoRA that has drifted from one that has not (docs/lab.md)."""


@dataclass(frozen=True)
class Trajectory:
    """Turbo's own way from noise to an image."""

    prompt: str
    sigmas: list[float]
    """From 1 to 0: one more than there are steps."""
    latents: list[LatentBatch]
    """(1, 16, h/8, w/8) at each of `sigmas`."""

    def steps(self) -> list[tuple[float, LatentBatch, LatentBatch]]:
        """Each step's sigma, the latents there and the velocity that Turbo had; Euler's step gives it back."""
        pairs = itertools.pairwise(zip(self.sigmas, self.latents, strict=True))
        return [(sigma, here, (there - here) / (after - sigma)) for (sigma, here), (after, there) in pairs]


def record_trajectories(
    model: ZImageTransformer2DModel,
    recipes: Sequence[SamplingRequest],
    embeds: Mapping[str, PromptEmbeds],
    tick: StepProgress,
) -> list[Trajectory]:
    """Where `model`, which is to be Turbo without a LoRA, goes for each of `recipes`."""
    found: list[Trajectory] = []
    for done, recipe in enumerate(recipes, 1):
        sigmas = flow.sampling_sigmas(recipe.steps, recipe.shift)
        found.append(
            Trajectory(
                recipe.prompt, sigmas, [latents for _, latents in sample_trajectory(model, [recipe], embeds, sigmas)]
            )
        )
        tick(done, len(recipes))
    return found


@torch.no_grad()
def deviations(
    model: ZImageTransformer2DModel,
    walked: Sequence[Trajectory],
    embeds: Mapping[str, PromptEmbeds],
    tick: StepProgress,
) -> list[float]:
    """At each of Turbo's sigmas, how far the velocity of `model` is from Turbo's, as a share of Turbo's.

    The root of the mean over walks of |v - v_turbo|^2 / |v_turbo|^2: 0 is Turbo itself.
    """
    squares = [[0.0] * len(walked) for _ in range(len(walked[0].sigmas) - 1)]
    for number, walk in enumerate(walked):
        condition = embeds[walk.prompt].to(model.device, model.dtype)
        for step, (sigma, latents, wanted) in enumerate(walk.steps()):
            found = velocity(model, latents, torch.full((1,), sigma), [condition])
            squares[step][number] = float((found - wanted).double().square().sum() / wanted.double().square().sum())
        tick(number + 1, len(walked))
    return [math.sqrt(sum(row) / len(row)) for row in squares]


def overall_deviation(each: Sequence[float]) -> float:
    """One number of the deviations at all sigmas: the root mean square of those at the first `DECIDING`."""
    first = each[:DECIDING]
    return math.sqrt(sum(one**2 for one in first) / len(first))


class DriftMeter:
    """Reads again and again how far one model has drifted; Turbo's own way is found at the first time and kept."""

    def __init__(self, recipes: Sequence[SamplingRequest], embeds: Mapping[str, PromptEmbeds]) -> None:
        self._recipes, self._embeds = recipes, embeds
        self._walked: list[Trajectory] = []

    def measure(self, model: ZImageTransformer2DModel, tick: StepProgress) -> float:
        """The overall deviation of `model` with the LoRA that is on it, whose weights must be Turbo's own."""
        if not self._walked:
            with swap.replaced_lora(model, {}):
                self._walked = record_trajectories(model, self._recipes, self._embeds, tick)
        return overall_deviation(deviations(model, self._walked, self._embeds, tick))
