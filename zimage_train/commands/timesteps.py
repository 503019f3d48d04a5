"""The `timesteps` command: show the distribution of sigma and the loss weights that a config trains with."""

from typing import Any

import torch

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import flow
from zimage_train.rng import keyed_generator

NUM_DRAWS = 100_000
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NUM_BINS = 20
CHART_WIDTH = 40


def describe_timesteps(config: Config) -> dict[str, Any]:
    """Return mean and quantiles of `sample_sigmas`, and the loss weights as pairs of sigma and weight."""
    sigma = sample_sigmas(config)
    points = torch.arange(1001, dtype=torch.float64) / 1000
    factors = flow.loss_weight(points, config.timesteps.type)
    quantiles = torch.quantile(sigma, torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "sigma_mean": float(sigma.mean()),
        "sigma_quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "weights": [[float(point), float(factor)] for point, factor in zip(points, factors, strict=True)],
    }


def sample_sigmas(config: Config) -> torch.Tensor:
    """Draw sigmas with the function and the settings of a training, but another random stream; (100000,) fp64."""
    steps = config.timesteps
    u = torch.rand(NUM_DRAWS, generator=keyed_generator(config.seed, "timesteps"), dtype=torch.float64)
    return flow.quantile_sigma(u, steps.type, steps.bias, VARIANTS[config.model.variant].shift, steps.min, steps.max)


def density_chart(config: Config) -> list[str]:
    """Return a histogram as lines of text: for each twentieth of sigma, the share of samples and mean loss weight."""
    sigma = sample_sigmas(config)
    weight = flow.loss_weight(sigma, config.timesteps.type)
    bins = (sigma * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    shares = [float((bins == index).double().mean()) for index in range(NUM_BINS)]
    largest = max(shares)
    lines = [
        f"timesteps {config.timesteps.type}, bias {config.timesteps.bias}: mean sigma {float(sigma.mean()):.3f}",
        "sigma        share   loss weight",
    ]
    for index in reversed(range(NUM_BINS)):
        weights_in_bin = weight[bins == index]
        mean = f"{float(weights_in_bin.mean()):.3f}" if len(weights_in_bin) else "-"
        bar = "#" * round(CHART_WIDTH * shares[index] / largest)
        lines.append(f"{index / NUM_BINS:.2f}-{(index + 1) / NUM_BINS:.2f}  {shares[index]:6.1%}   {mean:>6}  {bar}")
    return lines
