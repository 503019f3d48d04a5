"""The equations, against independent float64 arithmetic and the numbers that others publish."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_train.diffusion import flow
from zimage_train.diffusion.flow import WEIGHTED_KNOTS

TURBO_SIGMAS = [1.0, 0.9545454545, 0.9, 0.8333333333, 0.75, 0.6428571429, 0.5, 0.3]
unit = st.floats(0.0, 1.0)


def test_interpolation_ends():
    """Interpolation ends at the image and at the noise."""
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(2)), noise)


def test_interpolation_sigma_per_sample():
    """Interpolation uses each sample's own sigma."""
    x0, noise = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    assert flow.interpolate(x0, noise, torch.tensor([0.25, 0.75])).flatten().tolist() == [0.25, 0.75]


def test_velocity_is_the_derivative():
    """The velocity is the derivative of the path."""
    x0, noise = torch.randn(1, 2, 2, 2).double(), torch.randn(1, 2, 2, 2).double()
    low, high = torch.tensor([0.4, 0.4 + 1e-6], dtype=torch.float64).split(1)
    slope = (flow.interpolate(x0, noise, high) - flow.interpolate(x0, noise, low)) / 1e-6
    assert torch.allclose(slope, flow.target_velocity(x0, noise), atol=1e-6)


def test_euler_recovers_the_image():
    """Euler steps with the true velocity recover the image."""
    x0, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    x, sigmas = noise, flow.sampling_sigmas(8, 3.0)
    for sigma, after in itertools.pairwise(sigmas):
        x = flow.euler(x, flow.target_velocity(x0, noise), sigma, after)
    assert torch.allclose(x, x0, atol=1e-5)


def test_turbo_grid():
    """Turbo's 8-step grid is the grid that it was distilled on; a grid of nine steps is another grid."""
    assert flow.sampling_sigmas(8, 3.0) == pytest.approx([*TURBO_SIGMAS, 0.0], abs=1e-9)
    assert flow.sampling_sigmas(9, 3.0)[1] == pytest.approx(0.96)


def test_turbo_grid_of_the_stock_scheduler():
    """The stock scheduler has the same eight sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    assert scheduler.sigmas.tolist() == pytest.approx([*TURBO_SIGMAS, 0.0], abs=1e-6)


@given(unit, st.floats(1.0, 10.0))
def test_shift_and_unshift(sigma: float, factor: float):
    """`unshift` undoes `shift`, and both keep the ends."""
    there = float(flow.shift(torch.tensor(sigma, dtype=torch.float64), factor))
    assert flow.unshift(there, factor) == pytest.approx(sigma, abs=1e-9)
    assert there >= sigma - 1e-12
    assert flow.unshift(0.0, factor) == 0.0 and flow.unshift(1.0, factor) == pytest.approx(1.0)


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
    sigma = flow.quantile_sigma(u, type_, bias, 3.0, 0.0, 1.0)
    quantiles = sigma.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)).tolist()
    assert [float(sigma.mean()), *quantiles] == pytest.approx(DECILES[type_, bias], abs=0.02)


def test_weighted_is_drawn_uniformly():
    u = torch.rand(1000, dtype=torch.float64)
    assert torch.equal(
        flow.quantile_sigma(u, "weighted", "balanced", 3.0, 0, 1),
        flow.quantile_sigma(u, "linear", "balanced", 3.0, 0, 1),
    )


@given(
    unit,
    st.sampled_from(["linear", "sigmoid", "uniform_shift", "weighted"]),
    st.sampled_from(["balanced", "high_noise", "low_noise"]),
    st.floats(0.0, 0.9),
    st.floats(0.05, 0.1),
)
def test_sigma_stays_within_its_limits(u: float, type_: str, bias: str, low: float, width: float):
    sigma = float(flow.quantile_sigma(torch.tensor(u, dtype=torch.float64), type_, bias, 3.0, low, low + width))
    assert low <= sigma <= low + width


def test_sigma_limits_cut_the_density():
    """Limits cut the density, and do not pile it up at the ends."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cut = flow.quantile_sigma(u, "sigmoid", "balanced", 3.0, 0.2, 0.6)
    free = flow.quantile_sigma(u, "sigmoid", "balanced", 3.0, 0.0, 1.0)
    inside = free[(free >= 0.2) & (free <= 0.6)]
    points = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    assert cut.quantile(points).tolist() == pytest.approx(inside.quantile(points).tolist(), abs=0.01)


def knot_weight(sigma: float) -> float:
    """The table read by hand, in float64, without torch."""
    index = min(max(1000 * (1 - sigma), 0), 999)
    for (x0, y0), (x1, y1) in itertools.pairwise(WEIGHTED_KNOTS):
        if x0 <= index <= x1:
            return y0 + (y1 - y0) * (index - x0) / (x1 - x0)
    raise AssertionError(index)


def test_loss_weights_table():
    """Loss weights are the table's values at its knots, and interpolated between them."""
    draw = random.Random(3)
    sigmas = [0.0, 1.0, 0.876, 0.003, *(draw.random() for _ in range(500))]
    weights = flow.loss_weight(torch.tensor(sigmas, dtype=torch.float64), "weighted")
    assert weights.tolist() == pytest.approx([knot_weight(sigma) for sigma in sigmas], abs=1e-6)
    assert weights.dtype == torch.float32


def test_loss_weights_statistics():
    """Loss weights have the published mean, minimum and maximum."""
    sigma = torch.tensor([(1000 - i) / 1000 for i in range(1000)], dtype=torch.float64)
    weights = flow.loss_weight(sigma, "weighted")
    assert len(WEIGHTED_KNOTS) == 126
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(weights.max()) == pytest.approx(1.5227, abs=0.01)
    assert float(weights.min()) == pytest.approx(0.4448, abs=1e-4)
    assert weights.argmin() == 997


def test_other_types_are_not_weighted():
    assert flow.loss_weight(torch.rand(5), "sigmoid").tolist() == [1.0] * 5


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_differential_guidance_gradient(scale: float):
    """Differential guidance multiplies the gradient by its scale."""
    prediction = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    (plain,) = torch.autograd.grad((prediction - target).square().mean(), prediction)
    moved = flow.differential_target(prediction, target, scale)
    (guided,) = torch.autograd.grad((prediction - moved).square().mean(), prediction)
    assert torch.allclose(guided, scale * plain, rtol=1e-12)


def test_guidance_convention():
    """Guidance follows the convention of diffusers."""
    assert float(flow.apply_guidance(torch.tensor(2.0), torch.tensor(1.0), 3.0)) == 5.0
    assert math.isclose(float(flow.apply_guidance(torch.tensor(2.0), torch.tensor(1.0), 0.0)), 2.0)
