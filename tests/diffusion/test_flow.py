"""The equations, against independent float64 arithmetic and the numbers that others publish."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.diffusion import flow

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


def test_student_sigmas_in_teacher_grid():
    """The student's sigmas are inserted into the teacher's grid."""
    through = flow.sampling_sigmas(8, 3.0)
    grid = flow.sampling_sigmas_through(50, 3.0, through)
    assert grid[0] == 1.0 and grid[-1] == 0.0 and all(a > b for a, b in itertools.pairwise(grid))
    assert set(through) <= set(grid)
    own = [3 * (1 - i / 50) / (1 + 2 * (1 - i / 50)) for i in range(50)]
    assert all(min(abs(sigma - one) for one in grid) < 1e-9 for sigma in own)
    assert len(grid) == 51 + 9 - 3  # 1, 0.75 and 0 are in both
    assert flow.sampling_sigmas_through(8, 3.0, through) == through


@settings(deadline=None)
@given(st.floats(0.0, 1.0), st.integers(0, 2**32))
def test_pair_has_its_mixture_and_velocity(sigma: float, seed: int):
    """A pair has the mixture and the velocity that it was made from."""
    draw = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    x0, noise = flow.pair_from_velocity(x, v, sigma)
    assert torch.allclose((1 - sigma) * x0 + sigma * noise, x, atol=1e-12)
    assert torch.allclose(noise - x0, v, atol=1e-12)


def test_inserted_sigmas_appear_once():
    """A grid keeps its own sigmas beside the inserted, and none of them twice."""
    grid = flow.sampling_sigmas_through(4, 1.0, [0.6, 0.5 + 5e-10])
    assert grid == [1.0, 0.75, 0.6, 0.5 + 5e-10, 0.25, 0.0]
    assert flow.sampling_sigmas_through(4, 1.0, [0.51])[2:4] == [0.51, 0.5]


GUIDED = [(1.5, 0.25, 4.0, 6.5, 5.0, 5.25), (-2.0, 1.0, 0.5, -3.5, -1.5, -0.5)]
"""positive, negative, scale, and by hand: pos + g (pos - neg), g (pos - neg), neg + g (pos - neg)."""


@pytest.mark.parametrize("positive, negative, scale, guided, moved, pushed", GUIDED)
def test_guidance_by_hand(positive, negative, scale, guided, moved, pushed):
    """Guidance, the move of a slider and the contrastive target equal what a hand calculation gives."""
    pair = torch.tensor(positive), torch.tensor(negative)
    assert float(flow.apply_guidance(*pair, scale)) == guided
    assert float(flow.slider_shift(*pair, scale)) == moved
    assert float(flow.contrastive_target(pair[1], pair[0], scale)) == pushed
