"""Each density against its own formula in plain float64 arithmetic, and all draws of before against their values.

Draws are compared with the cumulative distribution function by the statistic of Kolmogorov and Smirnov: of n draws it
exceeds 1.95 / sqrt(n) once in a thousand times, and the seeds here are fixed.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_train.config.schema import Config
from zimage_train.config.timesteps import TimestepSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import densities, flow
from zimage_train.diffusion.densities import SigmaDensity

NUM_DRAWS = 40_000
TURBO = [0.3, 0.5, 9 / 14, 0.75, 5 / 6, 0.9, 21 / 22, 1.0]


def density(pixels: int = 1024 * 1024, variant: str = "turbo", **settings: Any) -> SigmaDensity:
    values = {"name": "a", "data": [{"folder": "p"}], "model": {"variant": variant}, "timesteps": settings}
    return densities.density_of(Config.model_validate(values), pixels)


def draws(count: int = NUM_DRAWS, **settings: Any) -> list[float]:
    u = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sorted(density(**settings).quantile(u).tolist())


def distance(sigmas: list[float], cdf: Any) -> float:
    """The largest difference of the empirical distribution of sorted `sigmas` from `cdf`."""
    n, worst = len(sigmas), 0.0
    for index, sigma in enumerate(sigmas):
        share = cdf(sigma)
        worst = max(worst, share - index / n, (index + 1) / n - share)
    return worst


def logit(sigma: float) -> float:
    return math.log(sigma / (1 - sigma))


def normal(sigma: float, mean: float = 0.0, scale: float = 1.0) -> float:
    """The share of a logit-normal density below sigma, from the error function alone."""
    return 0.5 * math.erfc((mean - logit(sigma)) / (scale * math.sqrt(2)))


def before_shift(sigma: float, s: float) -> float:
    """What s g / (1 + (s - 1) g) = sigma is solved by."""
    return sigma / (s + sigma - s * sigma)


def log_snr(sigma: float, mean: float, scale: float) -> float:
    """The share of sigmas whose log of ((1 - sigma) / sigma)^2 is above that of sigma."""
    return 0.5 * math.erfc((math.log(((1 - sigma) / sigma) ** 2) - mean) / (scale * math.sqrt(2)))


def bell(sigma: float) -> float:
    return sigma - math.sin(2 * math.pi * sigma) / (2 * math.pi)


CDFS: dict[str, tuple[dict[str, Any], Any]] = {
    "uniform": ({"type": "linear"}, lambda x: x),
    "sigmoid": ({"type": "sigmoid"}, normal),
    "sigmoid, mean, scale": ({"type": "sigmoid", "mean": -0.7, "scale": 1.6}, lambda x: normal(x, -0.7, 1.6)),
    "sigmoid, shift 3": ({"type": "sigmoid", "shift": 3.0}, lambda x: normal(before_shift(x, 3.0))),
    "sigmoid, shift 0.4": ({"type": "sigmoid", "shift": 0.4}, lambda x: normal(before_shift(x, 0.4))),
    "linear, shift 2": ({"type": "linear", "shift": 2.0}, lambda x: before_shift(x, 2.0)),
    "uniform_shift": ({"type": "uniform_shift"}, lambda x: before_shift(x, 3.0)),
    "uniform_shift of base": ({"type": "uniform_shift", "variant": "base"}, lambda x: before_shift(x, 6.0)),
    "uniform_shift, 3, base": (
        {"type": "uniform_shift", "variant": "base", "shift": 3.0},
        lambda x: before_shift(x, 3.0),
    ),
    "sigmoid, variant, base": (
        {"type": "sigmoid", "variant": "base", "shift": "variant"},
        lambda x: normal(before_shift(x, 6.0)),
    ),
    "sigmoid, flux, 512": (
        {"type": "sigmoid", "shift": "flux", "pixels": 512 * 512},
        lambda x: normal(before_shift(x, math.exp(0.63))),
    ),
    "sigmoid, qwen, 256": (
        {"type": "sigmoid", "shift": "qwen", "pixels": 256 * 256},
        lambda x: normal(before_shift(x, math.exp(0.5))),
    ),
    "logsnr": ({"type": "logsnr"}, lambda x: log_snr(x, 0.0, 1.0)),
    "logsnr, mean, scale": ({"type": "logsnr", "mean": 1.3, "scale": 2.5}, lambda x: log_snr(x, 1.3, 2.5)),
    "cosine_bell": ({"type": "cosine_bell"}, bell),
    "cosine_bell, shift": ({"type": "cosine_bell", "shift": 2.0}, lambda x: bell(before_shift(x, 2.0))),
}


@pytest.mark.parametrize("name", CDFS)
def test_draws_follow_the_formula(name: str):
    """Draws follow the cumulative distribution function, which is calculated here in another way."""
    settings, cdf = CDFS[name]
    assert distance(draws(**settings), cdf) < 1.95 / math.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("name", CDFS)
def test_limits_cut_the_formula(name: str):
    """Limits leave the shape of a density between them, and no heap at either."""
    settings, cdf = CDFS[name]
    low, high = cdf(0.35), cdf(0.8)
    cut = draws(**settings, min=0.35, max=0.8)
    assert distance(cut, lambda x: (cdf(x) - low) / (high - low)) < 1.95 / math.sqrt(NUM_DRAWS)
    assert cut[0] >= 0.35 and cut[-1] <= 0.8


def test_distance_tells_densities_apart():
    """The test above has power: it tells a shift of 2 from 2.1, and sigmoid first from uniform first."""
    bound = 1.95 / math.sqrt(NUM_DRAWS)
    shifted = draws(type="sigmoid", shift=2.0)
    assert distance(shifted, lambda x: normal(before_shift(x, 2.1))) > bound
    assert distance(shifted, lambda x: before_shift(x, 2.0)) > 10 * bound


PEERS = {  # quantiles at 5, 50 and 95 %, drawn by musubi-tuner's own code
    "shift 2": ({"type": "sigmoid", "shift": 2.0}, (0.278, 0.666, 0.912)),
    "shift 3": ({"type": "sigmoid", "shift": 3.0}, (0.369, 0.750, 0.939)),
    "sigmoid": ({"type": "sigmoid"}, (0.162, 0.500, 0.838)),
    "flux, 1024": ({"type": "sigmoid", "shift": "flux"}, (0.377, 0.761, 0.943)),
    "flux, 512": ({"type": "sigmoid", "shift": "flux", "pixels": 512 * 512}, (0.266, 0.653, 0.907)),
    "qwen, 1024": ({"type": "sigmoid", "shift": "qwen"}, (0.280, 0.666, 0.912)),
    "logsnr": ({"type": "logsnr"}, (0.306, 0.500, 0.695)),
    "DiffSynth": ({"type": "uniform_shift"}, (0.136, 0.750, 0.983)),
}


@pytest.mark.parametrize("name", PEERS)
def test_quantiles_of_other_trainers(name: str):
    """The densities of other trainers can be had, and are theirs."""
    settings, expected = PEERS[name]
    u = torch.tensor([0.95, 0.5, 0.05], dtype=torch.float64)  # counted from noise
    assert density(**settings).quantile(u).tolist() == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize(
    ("name", "pixels", "log_of_s"),
    [
        ("flux", 256 * 256, 0.5), ("flux", 1024 * 1024, 1.15), ("flux", 768 * 1280, 0.5 + 0.65 * 3584 / 3840),
        ("flux", 64 * 64, 0.5 - 0.65 * 240 / 3840), ("flux", 2048 * 2048, 0.5 + 0.65 * 16128 / 3840),
        ("qwen", 256 * 256, 0.5), ("qwen", 2048 * 1024, 0.9), ("qwen", 512 * 512, 0.5 + 0.4 * 768 / 7936),
    ],
)  # fmt: skip
def test_shift_by_size(name: str, pixels: int, log_of_s: float):
    """The shift of an image follows from its number of tokens, beyond both points of the line too."""
    settings = TimestepSettings.model_validate({"type": "sigmoid", "shift": name})
    assert settings.shift_factor(3.0, pixels) == pytest.approx(math.exp(log_of_s), rel=1e-12)


def test_turbo_grid_values():
    """turbo_grid draws the sigmas of Turbo's sampler, exactly and equally often."""
    drawn = draws(type="turbo_grid")
    assert sorted(set(drawn)) == sorted(flow.sampling_sigmas(8, 3.0)[:-1]) == pytest.approx(TURBO)
    for sigma in set(drawn):
        assert drawn.count(sigma) / NUM_DRAWS == pytest.approx(1 / 8, abs=5 / math.sqrt(NUM_DRAWS))


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_jitter(jitter: float):
    """With jitter each sigma becomes uniform around it, cut off at 1."""

    def cdf(x: float) -> float:
        shares = []
        for sigma in TURBO:
            low, high = max(0, sigma - jitter), min(1, sigma + jitter)
            shares.append(min(max((x - low) / (high - low), 0), 1))
        return sum(shares) / 8

    assert distance(draws(type="turbo_grid", jitter=jitter), cdf) < 1.95 / math.sqrt(NUM_DRAWS)


def test_fixed_sigmas_and_limits():
    """fixed draws its sigmas alone; limits leave some of turbo_grid; the bias draws the noisy ones more often."""
    assert set(draws(type="fixed", sigmas=[0.9, 0.2, 0.55])) == {0.9, 0.2, 0.55}
    assert set(draws(type="fixed", sigmas=[0.9])) == {0.9}
    assert sorted(set(draws(type="turbo_grid", min=0.6, max=0.9))) == pytest.approx([9 / 14, 0.75, 5 / 6, 0.9])
    assert draws(type="turbo_grid", min=0.6, max=0.9, jitter=0.1)[-1] <= 0.9
    biased = draws(type="fixed", sigmas=[0.9, 0.2], bias="high_noise")
    assert biased.count(0.9) / NUM_DRAWS == pytest.approx(0.5 ** (1 / 3), abs=5 / math.sqrt(NUM_DRAWS))


def test_ends_of_the_uniform_numbers():
    """The smallest and largest uniform numbers give sigmas within the limits, not nan or a sigma of another part."""
    u = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for settings, _ in CDFS.values():
        sigmas = density(**settings).quantile(u)
        assert torch.isfinite(sigmas).all() and sigmas[0] >= sigmas[2] and 0 <= sigmas[2] <= 0.02, settings
    assert density(type="turbo_grid").quantile(u).tolist() == [1.0, 1.0, 0.3]


def old_quantile(u: torch.Tensor, kind: str, bias: str, factor: float, low: float, high: float) -> torch.Tensor:
    """The draws of version 0.1.0 before it had shifts, means and scales."""
    bent = {"balanced": u, "high_noise": u**3, "low_noise": 1.0 - u**3}[bias]

    def cdf(x: float) -> float:
        if kind == "sigmoid":
            return float(torch.special.ndtr(torch.logit(torch.tensor(x, dtype=torch.float64))))
        return x / (factor - (factor - 1.0) * x) if kind == "uniform_shift" else x

    p = cdf(low) + (cdf(high) - cdf(low)) * (1.0 - bent)
    if kind == "sigmoid":
        p = torch.sigmoid(torch.special.ndtri(p))
    elif kind == "uniform_shift":
        p = factor * p / (1.0 + (factor - 1.0) * p)
    return p.clamp(low, high)


NEUTRAL = {"shift": None, "mean": 0.0, "scale": 1.0, "sigmas": None, "jitter": 0.0, "weight": None, "stratified": False}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", ["balanced", "high_noise", "low_noise"])
@pytest.mark.parametrize("kind", ["weighted", "linear", "sigmoid", "uniform_shift"])
def test_old_draws_are_kept(kind: str, bias: str, variant: str):
    """Configs of before draw the same bits, and so do all new settings at their neutral values."""
    u = torch.rand(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for low, high in ((0.0, 1.0), (0.2, 0.7), (0.0, 0.35)):
        old = old_quantile(u, kind, bias, VARIANTS[variant].shift, low, high)  # pyright: ignore[reportArgumentType]
        limits = {"type": kind, "bias": bias, "min": low, "max": high, "variant": variant}
        assert torch.equal(density(**limits).quantile(u), old)
        assert torch.equal(density(**limits, **NEUTRAL).quantile(u), old)
        if kind != "uniform_shift":
            assert torch.equal(density(**limits, shift=1.0).quantile(u), old)
        else:
            assert torch.equal(density(**limits, shift="variant").quantile(u), old)


def test_shift_of_a_uniform_density():
    """linear with the variant's shift is uniform_shift."""
    u = torch.rand(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(
        density(type="linear", shift="variant", min=0.1).quantile(u), density(type="uniform_shift", min=0.1).quantile(u)
    )


@given(st.integers(2, 60), st.integers(0, 10_000))
def test_parts_of_an_epoch(parts: int, epoch: int):
    """The draws of an epoch have one in each of n equal parts, up to a common turn."""
    draw = torch.rand(parts, generator=torch.Generator().manual_seed(epoch), dtype=torch.float64)
    u = [float(densities.stratified(draw[part], part, parts, epoch)) for part in range(parts)]
    assert all(0 <= one < 1 for one in u)
    turned = [(one - epoch * densities.GOLDEN_RATIO) % 1.0 for one in u]
    inside = [one * parts - part for part, one in enumerate(turned)]
    assert all(-1e-7 <= one <= 1 + 1e-7 for one in inside)


def test_one_image_over_epochs():
    """The draws of one image are more even over epochs than independent draws: every tenth has its tenth of them."""
    draw = torch.rand(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = [float(densities.stratified(draw[epoch], 40, 200, epoch)) for epoch in range(100)]
    counts = [sum(int(one * 10) == tenth for one in u) for tenth in range(10)]
    assert min(counts) >= 9 and max(counts) <= 11
    assert max(counts) < max(sum(int(one * 10) == tenth for one in draw.tolist()) for tenth in range(10))


DECILES = {  # measured on AI Toolkit's own sampling: mean, then the quantiles .10 .25 .50 .75 .90
    ("linear", "balanced"): (0.50, 0.10, 0.25, 0.50, 0.75, 0.90),
    ("linear", "high_noise"): (0.75, 0.27, 0.58, 0.88, 0.985, 0.999),
    ("linear", "low_noise"): (0.25, 0.001, 0.016, 0.125, 0.42, 0.73),
    ("sigmoid", "balanced"): (0.50, 0.22, 0.34, 0.50, 0.66, 0.79),
    ("sigmoid", "high_noise"): (0.70, 0.35, 0.55, 0.76, 0.90, 0.95),
    ("sigmoid", "low_noise"): (0.30, 0.05, 0.10, 0.24, 0.45, 0.64),
    ("uniform_shift", "balanced"): (0.68, 0.26, 0.51, 0.75, 0.90, 0.965),
    ("uniform_shift", "high_noise"): (0.85, 0.53, 0.80, 0.955, 0.995, 1.0),
    ("uniform_shift", "low_noise"): (0.38, 0.01, 0.05, 0.31, 0.69, 0.89),
}


@pytest.mark.parametrize(("type_", "bias"), DECILES)
def test_sigma_densities_of_ai_toolkit(type_: str, bias: str):
    """The densities of sigma are those of AI Toolkit."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = density(type=type_, bias=bias).quantile(u)
    quantiles = sigma.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)).tolist()
    assert [float(sigma.mean()), *quantiles] == pytest.approx(DECILES[type_, bias], abs=0.02)


def test_weighted_is_drawn_uniformly():
    u = torch.rand(1000, dtype=torch.float64)
    assert torch.equal(density(type="weighted").quantile(u), density(type="linear").quantile(u))


@given(
    st.floats(0.0, 1.0),
    st.sampled_from(["linear", "sigmoid", "uniform_shift", "weighted", "logsnr", "cosine_bell"]),
    st.sampled_from(["balanced", "high_noise", "low_noise"]),
    st.sampled_from([None, 0.3, 5.0, "flux", "qwen", "variant"]),
    st.floats(0.0, 0.9),
    st.floats(0.05, 0.1),
)
def test_sigma_stays_within_its_limits(u: float, type_: str, bias: str, shift: Any, low: float, width: float):
    scale = 4.0 if type_ == "logsnr" else 1.0  # or too little of it would be left near 0
    drawn = density(type=type_, bias=bias, shift=shift, scale=scale, min=low, max=low + width)
    assert low <= float(drawn.quantile(torch.tensor(u, dtype=torch.float64))) <= low + width
