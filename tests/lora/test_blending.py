"""TIES and DARE, against the papers' steps as plain loops."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from zimage_train.lora import blending

draw = torch.Generator().manual_seed(2)
DELTAS = [torch.randn(6, 5, generator=draw) for _ in range(3)]
WEIGHTS = [1.0, 0.5, 2.0]


def merged(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The election of signs and the mean of those that agree, as TIES has them, an element at a time."""
    expected = torch.zeros(6, 5)
    for i in range(6):
        for j in range(5):
            column = [float(one[i, j]) for one in deltas]
            sign = 1.0 if sum(column) >= 0 else -1.0
            agreeing = [w * v for w, v in zip(weights, column, strict=True) if v * sign > 0]
            expected[i, j] = sum(agreeing) / max(len(agreeing), 1)
    return expected


def trimmed(delta: Tensor, kept: int) -> Tensor:
    """`delta` with its largest values."""
    limit = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(delta.abs() >= limit, delta, torch.zeros(()))


@pytest.mark.parametrize(("density", "kept"), [(0.001, 1), (0.05, 1), (0.4, 12), (29 / 30, 29), (1.0, 30)])
def test_ties_by_plain_loops(density: float, kept: int):
    """TIES keeps the largest values, elects signs and averages the values that agree."""
    found = blending.blend_deltas("ties", DELTAS, WEIGHTS, density, 0, "x")
    assert torch.allclose(found, merged([trimmed(delta, kept) for delta in DELTAS], WEIGHTS))
    alone = blending.blend_deltas("ties", DELTAS[:1], [1.0], density, 0, "x")
    assert torch.equal(alone, trimmed(DELTAS[0], kept)) and int(alone.count_nonzero()) == kept


@pytest.mark.parametrize("density", [0.01, 0.3, 0.999])
def test_ties_is_that_of_peft(density: float):
    from peft.utils.merge_utils import ties

    deltas = [torch.randn(40, 30, generator=draw) for _ in range(3)]
    ours = blending.blend_deltas("ties", deltas, [0.8, 0.5, 1.0], density, 0, "x")
    assert torch.allclose(ours, ties(deltas, torch.tensor([0.8, 0.5, 1.0]), density))


def test_dare_without_drops():
    """Where DARE drops nothing, it is the weighted sum, and with TIES the election of signs."""
    all_kept = 1.0 - 1e-12  # of 1 itself peft warns
    linear = blending.blend_deltas("dare_linear", DELTAS, WEIGHTS, all_kept, 0, "x")
    weighted = [weight * delta.double() for weight, delta in zip(WEIGHTS, DELTAS, strict=True)]
    assert torch.allclose(linear.double(), torch.stack(weighted).sum(0))
    elected = blending.blend_deltas("dare_ties", DELTAS, WEIGHTS, all_kept, 0, "x")
    assert torch.allclose(elected, merged(DELTAS, WEIGHTS))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_seeds_and_mean(method: str):
    """DARE draws by seed and module, keeps the mean, and leaves the global generator alone."""
    delta = torch.ones(300, 300)
    one = blending.blend_deltas(method, [delta], [0.5], 0.25, 1, "x")
    assert set(one.unique().tolist()) == {0.0, 2.0} and float(one.mean()) == pytest.approx(0.5, rel=0.03)
    state = torch.get_rng_state()
    assert torch.equal(blending.blend_deltas(method, [delta], [0.5], 0.25, 1, "x"), one)
    assert torch.equal(torch.get_rng_state(), state)
    for seed, name in ((2, "x"), (1, "y")):
        assert not torch.equal(blending.blend_deltas(method, [delta], [0.5], 0.25, seed, name), one)
