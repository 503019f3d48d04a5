"""TIES and DARE: LoRAs put together by their dense changes, so that those in each other's way harm each other less.

TIES (arXiv 2306.01708) keeps the largest values of each, elects a sign for each place, and takes the mean of those that
agree. DARE (arXiv 2311.03099) drops values at random and scales up the rest. The formulas are peft's.
"""

from collections.abc import Sequence

import torch

from zimage_train.rng import keyed_int
from zimage_train.typing import Weight

METHODS = ("ties", "dare_ties", "dare_linear")


def blend_changes(
    method: str, changes: Sequence[Weight], weights: Sequence[float], density: float, seed: int, name: str
) -> Weight:
    """The changes of one module as one, by `method`; DARE's draws are functions of `seed` and `name` alone."""
    from peft.utils import merge_utils

    factors = torch.tensor(weights)
    if method == "ties":
        trimmed = torch.stack([_largest(change, density) for change in changes])
        signs = merge_utils.calculate_majority_sign_mask(trimmed, "total")
        return merge_utils.disjoint_merge(trimmed * factors.view(-1, 1, 1), signs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_int(seed, "dare", name))
        dare = merge_utils.dare_ties if method == "dare_ties" else merge_utils.dare_linear
        return dare(list(changes), factors, density)


def _largest(change: Weight, density: float) -> Weight:
    """The share `density` of its values that are largest, and zeros; by selection, which takes a quarter of a sort."""
    sizes = change.abs().flatten()
    dropped = sizes.numel() - max(int(density * sizes.numel()), 1)
    return change * (change.abs() > sizes.kthvalue(dropped).values) if dropped else change
