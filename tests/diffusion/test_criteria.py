"""What is made of an error: each formula against arithmetic in float64 that is written down another way."""

import math

import pytest
import torch

from zimage_train.diffusion import criteria, flow
from zimage_train.diffusion.criteria import loss_of_error

ERRORS = [-3.0, -0.5, -0.2, -0.1, -1e-3, 0.0, 1e-6, 0.05, 0.1, 0.3, 2.0, 40.0]


def scalar_loss(error: float, type: str, delta: float) -> float:
    """One element by the textbook, with `math` alone."""
    if type == "mae":
        return math.fabs(error)
    if type == "huber":
        return 2 * (error * error / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2))
    if type == "pseudo_huber":
        return math.hypot(error, delta) - delta
    return math.pow(error, 2)


def scalar_slope(error: float, type: str, delta: float) -> float:
    slopes = {"mae": math.copysign(1.0, error), "mse": 2 * error, "huber": 2 * max(-delta, min(delta, error))}
    return slopes[type] if type in slopes else math.sin(math.atan(error / delta))


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("type", ["mse", "mae", "huber", "pseudo_huber"])
def test_loss_of_error(type: str, delta: float):
    """Value and slope are those of the formula, at small errors too."""
    error = torch.tensor(ERRORS, requires_grad=True)
    values = loss_of_error(error, type, delta)
    expected = [scalar_loss(float(one), type, delta) for one in error.detach().double()]
    assert values.double().tolist() == pytest.approx(expected, rel=2e-6, abs=1e-12)
    (slopes,) = torch.autograd.grad(values.sum(), error)
    for one, slope in zip(error.detach().double().tolist(), slopes.tolist(), strict=True):
        if abs(abs(one) - delta) > 1e-6 and one != 0:
            assert slope == pytest.approx(scalar_slope(one, type, delta), rel=1e-5), one


def test_wide_huber_is_mse():
    """A huber that no error leaves is the mean square to the bit, and so is its gradient."""
    error = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for type in ("mse", "huber"):
        leaf = error.clone().requires_grad_()
        value = loss_of_error(leaf, type, 100.0).mean()
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_guidance_divides_delta():
    """With it, huber and pseudo_huber have s times (huber) or once the gradient of delta / s."""
    prediction = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target, s = torch.zeros_like(prediction), 3.0

    def slope(type: str, delta: float, scale: float | None) -> torch.Tensor:
        leaf = prediction.clone().requires_grad_()
        aim = target if scale is None else flow.differential_target(leaf, target, scale)
        return torch.autograd.grad(loss_of_error(leaf - aim, type, delta).sum(), leaf)[0]

    assert torch.allclose(slope("huber", 1.5, s), s * slope("huber", 0.5, None), rtol=1e-12)
    assert torch.allclose(slope("pseudo_huber", 1.5, s), slope("pseudo_huber", 0.5, None), rtol=1e-12)
    assert torch.allclose(slope("mae", 0.0, s), slope("mae", 0.0, None), rtol=1e-12)
    assert torch.allclose(slope("mse", 0.0, s), s * slope("mse", 0.0, None), rtol=1e-12)


def haar_bands(image: torch.Tensor) -> list[torch.Tensor]:
    """The bands LL, LH, HL, HH of one level, by the filters (1, 1) / sqrt(2) and (1, -1) / sqrt(2)."""
    bands = []
    for rows in (1.0, -1.0):
        along = (image[..., 0::2, :] + rows * image[..., 1::2, :]) / math.sqrt(2)
        for columns in (1.0, -1.0):
            bands.append((along[..., 0::2] + columns * along[..., 1::2]) / math.sqrt(2))
    return bands


@pytest.mark.parametrize("factor", [0.0, 0.25, 3.0])
def test_details_are_haar_bands(factor: float):
    """The mean square is that of the Haar bands, of which the three fine ones have the factor."""
    error = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    coarse, *fine = (float(band.square().sum()) for band in haar_bands(error))
    assert coarse + sum(fine) == pytest.approx(float(error.square().sum()), rel=1e-12)
    found = criteria.weight_details(error, factor)
    assert float(found.square().sum()) == pytest.approx(coarse + factor * sum(fine), rel=1e-12)
    assert found.shape == error.shape and criteria.weight_details(error, 1.0) is error


def test_details_stay_in_their_places():
    """An error spreads over its block of 2 x 2 and no further."""
    error = torch.zeros(1, 1, 4, 6)
    error[0, 0, 1, 2] = 1.0
    spread = criteria.weight_details(error, 4.0)
    assert spread.nonzero()[:, 2:].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert float(spread[0, 0, 1, 2]) == pytest.approx(0.25 + 2 * 0.75)


@pytest.mark.parametrize(("gamma", "floor"), [(1.0, 0.1), (5.0, 0.0), (5.0, 0.3), (0.5, 0.05)])
def test_min_snr_weight(gamma: float, floor: float):
    """The weight is that of min(SNR, gamma) on the error of x0, over its maximum, and at least the floor."""
    sigmas = [index / 1000 for index in range(1, 1001)]

    def raw(sigma: float) -> float:
        return sigma**2 * min(((1 - sigma) / sigma) ** 2, gamma)

    most = max(raw(index / 100_000) for index in range(1, 100_001))
    expected = [max(floor, raw(sigma) / most) for sigma in sigmas]
    found = criteria.min_snr_weight(torch.tensor(sigmas), gamma, floor)
    assert found.tolist() == pytest.approx(expected, abs=2e-5)
    assert float(criteria.min_snr_weight(torch.zeros(1), gamma, floor)) == pytest.approx(floor)


def test_min_snr_floor_of_one_is_off():
    weights = criteria.min_snr_weight(torch.rand(10_000, generator=torch.Generator().manual_seed(3)), 5.0, 1.0)
    assert torch.equal(weights, torch.ones(10_000))


def test_guidance_scale_by_sigma():
    sigma = torch.tensor([0.0, 0.25, 1.0])
    assert criteria.contrastive_scale(sigma, 3.0).flatten().tolist() == [1.0, 1.5, 3.0]


def test_cfg_zero_is_the_nearest():
    """No other multiple of the prediction is nearer to the target, for each sample by itself."""
    draw = torch.Generator().manual_seed(4)
    u, target = (torch.randn(2, 16, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    target[1] = target[1] + 2.0 * u[1]
    found = criteria.along_target(u, target)
    for index in range(2):
        distances = []
        for number in range(-300, 301):
            distances.append(float((target[index] - number / 100 * u[index]).square().sum()))
        best = (min(range(601), key=distances.__getitem__) - 300) / 100
        assert float((found[index] / u[index]).mean()) == pytest.approx(best, abs=0.006)
        assert float(((target[index] - found[index]) * u[index]).sum()) == pytest.approx(0.0, abs=1e-5)
