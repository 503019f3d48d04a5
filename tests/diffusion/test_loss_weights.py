"""Loss weights against plain float64 arithmetic and the numbers that others publish."""

import itertools
import math
import random

import pytest
import torch

from zimage_train.config.timesteps import TimestepSettings
from zimage_train.diffusion.loss_weights import WEIGHTED_KNOTS, loss_weight


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
    weights = loss_weight(torch.tensor(sigmas, dtype=torch.float64), TimestepSettings())
    assert weights.tolist() == pytest.approx([knot_weight(sigma) for sigma in sigmas], abs=1e-6)
    assert weights.dtype == torch.float32


def test_loss_weights_statistics():
    """Loss weights have the published mean, minimum and maximum."""
    sigma = torch.tensor([(1000 - i) / 1000 for i in range(1000)], dtype=torch.float64)
    weights = loss_weight(sigma, TimestepSettings())
    assert len(WEIGHTED_KNOTS) == 126
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(weights.max()) == pytest.approx(1.5227, abs=0.01)
    assert float(weights.min()) == pytest.approx(0.4448, abs=1e-4)
    assert weights.argmin() == 997


def test_other_types_are_not_weighted():
    assert loss_weight(torch.rand(5), TimestepSettings(type="sigmoid")).tolist() == [1.0] * 5


def test_bell_of_diffsynth():
    """The bell is DiffSynth's and AI Toolkit's, calculated as there: over steps, less its minimum, of mean 1."""
    values = [math.exp(-2 * ((step - 50_000) / 100_000) ** 2) for step in range(100_000)]
    least = min(values)
    mean = sum(value - least for value in values) / len(values)
    sigmas = [0.0, 0.03, 0.25, 0.5, 0.56, 0.75, 1.0]
    expected = [(math.exp(-2 * (sigma - 0.5) ** 2) - least) / mean for sigma in sigmas]
    settings = TimestepSettings(type="linear", weight="bell")
    weights = loss_weight(torch.tensor(sigmas, dtype=torch.float64), settings).tolist()
    assert weights == pytest.approx(expected, abs=1e-5)
    assert weights[0] == weights[-1] == 0.0 and weights[3] == pytest.approx(1.5796, abs=1e-4)
    # DiffSynth divides by the mean over its own, shifted sigmas, which is a factor for all of them.
    assert [1.137 * weights[index] for index in (1, 2, 4, 5)] == pytest.approx([0.16, 1.26, 1.76, 1.26], abs=0.01)


def test_table_of_weights():
    """A table is interpolated linearly and constant beyond its ends."""
    settings = TimestepSettings(type="sigmoid", weight=[[0.2, 3.0], [0.4, 1.0], [0.9, 2.0]])
    sigmas = torch.tensor([0.0, 0.2, 0.25, 0.4, 0.65, 0.9, 1.0], dtype=torch.float64)
    assert loss_weight(sigmas, settings).tolist() == pytest.approx([3.0, 3.0, 2.5, 1.0, 1.5, 2.0, 2.0])


def test_weight_of_its_own():
    """linear with AI Toolkit's table has the weights of weighted, to the bit."""
    sigmas = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = loss_weight(sigmas, TimestepSettings(type="linear", weight="aitoolkit"))
    assert torch.equal(own, loss_weight(sigmas, TimestepSettings(type="weighted")))
