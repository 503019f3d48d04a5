"""The `timesteps` command: show the distribution of sigma and the loss weights that configs train with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import target_sides
from zimage_train.diffusion import densities
from zimage_train.diffusion.loss_weights import loss_weight
from zimage_train.report import density_plot
from zimage_train.report.density_plot import Curves
from zimage_train.rng import keyed_generator

NUM_DRAWS = 100_000
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NUM_BINS = 20
CHART_WIDTH = 40
PLOT_BINS = 100
NUM_EVEN = 200_000
"""Places at which the picture reads the density, evenly, so that its curves have no noise of draws."""


def describe_timesteps(config: Config) -> dict[str, Any]:
    """Return mean and quantiles of `sample_sigmas`, and the loss weights as pairs of sigma and weight."""
    sigma = sample_sigmas(config)
    points = torch.arange(1001, dtype=torch.float64) / 1000
    factors = loss_weight(points, config.timesteps)
    quantiles = torch.quantile(sigma, torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "sigma_mean": float(sigma.mean()),
        "sigma_quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "weights": [[float(point), float(factor)] for point, factor in zip(points, factors, strict=True)],
    }


def sample_sigmas(config: Config) -> torch.Tensor:
    """Draw sigmas with the function and the settings of a training, but another random stream; (100000,) fp64."""
    u = torch.rand(NUM_DRAWS, generator=keyed_generator(config.seed, "timesteps"), dtype=torch.float64)
    return _sigmas(config, u)


def _sigmas(config: Config, u: torch.Tensor) -> torch.Tensor:
    """Return the sigmas of uniform numbers, which are dealt to the sizes of the images if these have own shifts."""
    sides = _sides(config)
    sigmas = torch.empty_like(u)
    for number, side in enumerate(sides):
        density = densities.density_of(config, round(side**2))
        sigmas[number :: len(sides)] = density.quantile(u[number :: len(sides)])
    return sigmas


def _sides(config: Config) -> list[float]:
    """Return the resolutions with a density of their own, px; just one if the size of an image does not matter."""
    sides: dict[float, None] = {}
    for entry in config.data:
        sides |= dict.fromkeys(target_sides(entry))
    return sorted(sides)[: None if config.timesteps.shift in ("flux", "qwen") else 1]


def density_chart(config: Config) -> list[str]:
    """Return a histogram as lines of text: for each twentieth of sigma, the share of samples and mean loss weight."""
    sigma = sample_sigmas(config)
    weight = loss_weight(sigma, config.timesteps)
    bins = (sigma * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    shares = [float((bins == index).double().mean()) for index in range(NUM_BINS)]
    largest = max(shares)
    type_, _, rest = config.timesteps.summary.partition(", ")
    lines = [
        f"timesteps {type_}, bias {rest}: mean sigma {float(sigma.mean()):.3f}",
        *_shift_lines(config),
        "sigma        share   loss weight",
    ]
    for index in reversed(range(NUM_BINS)):
        weights_in_bin = weight[bins == index]
        mean = f"{float(weights_in_bin.mean()):.3f}" if len(weights_in_bin) else "-"
        bar = "#" * round(CHART_WIDTH * shares[index] / largest)
        lines.append(f"{index / NUM_BINS:.2f}-{(index + 1) / NUM_BINS:.2f}  {shares[index]:6.1%}   {mean:>6}  {bar}")
    return lines


def _shift_lines(config: Config) -> list[str]:
    """Return the factor of the shift for each resolution, in a line; nothing without a shift of its own."""
    if config.timesteps.shift is None:
        return []
    factors = [(side, densities.density_of(config, round(side**2)).factor) for side in _sides(config)]
    if len(factors) == 1 and config.timesteps.shift not in ("flux", "qwen"):
        return [f"shifted by {factors[0][1]:g} after it is drawn"]
    return ["shifted by " + ", ".join(f"{factor:.2f} at {side:g} px" for side, factor in factors) + ", as many of each"]


def plot_densities(named: Sequence[tuple[str, Config]], output: Path) -> list[str]:
    """Write a picture of the densities of configs over each other, and return the line to print.

    Raises:
        DiskError: the file cannot be written.
    """
    density_plot.save_density_plot(output, [curves_of(config, name) for name, config in named])
    return [f"wrote {output}"]


def curves_of(config: Config, name: str) -> Curves:
    """Return the density of sigma in bins, and the density times the loss weight, which is what a training learns."""
    sigma = _sigmas(config, (torch.arange(NUM_EVEN, dtype=torch.float64) + 0.5) / NUM_EVEN)
    weight = loss_weight(sigma, config.timesteps).double()
    bins = (sigma * PLOT_BINS).long().clamp(max=PLOT_BINS - 1)
    scale = PLOT_BINS / NUM_EVEN  # so that the area below a curve of shares is 1
    density = torch.bincount(bins, minlength=PLOT_BINS).double() * scale
    weighted = torch.bincount(bins, weights=weight, minlength=PLOT_BINS) * scale
    return Curves(f"{name}: {config.timesteps.summary}", density.tolist(), weighted.tolist())
