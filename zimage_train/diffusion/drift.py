"""Drift: how far a LoRA moves Turbo's velocity away from its own at Turbo's eight steps.

It needs neither images nor a judge. Turbo's velocity at each of its sigmas is not that of flow matching, but the mean
over its whole step: from pure noise it heads for one image, where flow matching heads for the mean of all images that
the prompt allows. Training by flow matching removes just that, so the first steps tell most.
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

DECIDING_STEPS = 3
"""Number of Turbo's first steps, those at sigma 0.9 and above, that count.

The later steps are changed as much by what a LoRA is trained for: on the miniature they do not separate a LoRA that has
drifted from a model that has not (docs/lab.md).
"""


@dataclass(frozen=True)
class Trajectory:
    """Turbo's own path from noise to an image."""

    prompt: str
    sigmas: list[float]
    """From 1 downwards, a value more than there are steps; to 0 if they lead to an image."""
    latents: list[LatentBatch]
    """(1, 16, h/8, w/8) at each of `sigmas`."""

    def steps(self) -> list[tuple[float, LatentBatch, LatentBatch]]:
        """Return (sigma, latents, velocity) for each step; the velocity follows from the two ends of the Euler step."""
        steps = []
        points = zip(self.sigmas, self.latents, strict=True)
        for (sigma, latents), (next_sigma, next_latents) in itertools.pairwise(points):
            steps.append((sigma, latents, (next_latents - latents) / (next_sigma - sigma)))
        return steps


def record_trajectories(
    model: ZImageTransformer2DModel,
    requests: Sequence[SamplingRequest],
    embeds: Mapping[str, PromptEmbeds],
    progress: StepProgress,
    max_steps: int | None = None,
) -> list[Trajectory]:
    """Sample `requests` with `model`, which must be Turbo without a LoRA, and return the trajectories.

    With `max_steps` they end after so many steps, before the image is done.
    """
    trajectories: list[Trajectory] = []
    for done, request in enumerate(requests, 1):
        sigmas = flow.sampling_sigmas(request.steps, request.shift)
        if max_steps is not None:
            sigmas = sigmas[: max_steps + 1]
        latents = [point for _, point in sample_trajectory(model, [request], embeds, sigmas)]
        trajectories.append(Trajectory(request.prompt, sigmas, latents))
        progress(done, len(requests))
    return trajectories


@torch.no_grad()
def deviations(
    model: ZImageTransformer2DModel,
    trajectories: Sequence[Trajectory],
    embeds: Mapping[str, PromptEmbeds],
    progress: StepProgress,
) -> list[float]:
    """Return, for each of Turbo's sigmas, the relative distance of the velocity of `model` from Turbo's.

    It is the root of the mean over trajectories of |v - v_turbo|^2 / |v_turbo|^2; 0 is Turbo itself. `model` is asked
    at Turbo's latents, not at its own: there both velocities answer the same question, and errors do not add up.
    """
    squares = [[0.0] * len(trajectories) for _ in range(len(trajectories[0].sigmas) - 1)]
    for number, trajectory in enumerate(trajectories):
        condition = embeds[trajectory.prompt].to(model.device, model.dtype)
        for step, (sigma, latents, expected) in enumerate(trajectory.steps()):
            predicted = velocity(model, latents, torch.full((1,), sigma), [condition])
            # fp64, since the sum runs over some 10^5 squares and an undrifted model must come out as 0.
            error = (predicted - expected).double().square().sum()
            squares[step][number] = float(error / expected.double().square().sum())
        progress(number + 1, len(trajectories))
    return [math.sqrt(sum(row) / len(row)) for row in squares]


def overall_deviation(deviations: Sequence[float]) -> float:
    """Return the root mean square of the deviations at the first `DECIDING_STEPS` steps."""
    first = deviations[:DECIDING_STEPS]
    return math.sqrt(sum(deviation**2 for deviation in first) / len(first))


class DriftMeter:
    """Measures repeatedly how far a model has drifted, at the steps that decide; Turbo's own are recorded once."""

    def __init__(self, requests: Sequence[SamplingRequest], embeds: Mapping[str, PromptEmbeds]) -> None:
        self._requests, self._embeds = requests, embeds
        self._trajectories: list[Trajectory] = []

    def measure(self, model: ZImageTransformer2DModel, progress: StepProgress) -> float:
        """Return the overall deviation of `model` with its LoRA; the weights under it must be Turbo's own."""
        if not self._trajectories:
            # The LoRA is taken off, not set to strength 0: a LoRA that adds zero still changes the order of sums.
            with swap.replaced_lora(model, {}):
                self._trajectories = record_trajectories(
                    model, self._requests, self._embeds, lambda done, total: None, DECIDING_STEPS
                )
        return overall_deviation(deviations(model, self._trajectories, self._embeds, progress))
