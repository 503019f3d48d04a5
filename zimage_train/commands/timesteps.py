"""The `timesteps` command: the density of sigma and the loss weights that a config trains on."""

from typing import Any

import torch

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import flow
from zimage_train.rng import keyed_generator

DRAWS = 100_000
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BARS = 20


def describe_timesteps(config: Config) -> dict[str, Any]:
    """`sigma_mean`, `sigma_quantiles` of 100,000 draws as a run makes them, and `weights`: [sigma, loss factor]."""
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
    """100,000 sigmas by the same function, settings and seed family as a run's; (n,) fp64."""
    steps = config.timesteps
    u = torch.rand(DRAWS, generator=keyed_generator(config.seed, "timesteps"), dtype=torch.float64)
    return flow.quantile_sigma(u, steps.type, steps.bias, VARIANTS[config.model.variant].shift, steps.min, steps.max)


def density_chart(config: Config) -> list[str]:
    """A histogram for the terminal: share of samples and mean loss weight in each twentieth of sigma."""
    sigma = sample_sigmas(config)
    weight = flow.loss_weight(sigma, config.timesteps.type)
    bins = (sigma * BARS).long().clamp(max=BARS - 1)
    shares = [float((bins == index).double().mean()) for index in range(BARS)]
    largest = max(shares)
    lines = [
        f"timesteps {config.timesteps.type}, bias {config.timesteps.bias}: mean sigma {float(sigma.mean()):.3f}",
        "sigma        share   loss weight",
    ]
    for index in reversed(range(BARS)):
        chosen = weight[bins == index]
        mean = f"{float(chosen.mean()):.3f}" if len(chosen) else "-"
        bar = "#" * round(40 * shares[index] / largest)
        lines.append(f"{index / BARS:.2f}-{(index + 1) / BARS:.2f}  {shares[index]:6.1%}   {mean:>6}  {bar}")
    return lines
