"""TIES and DARE: merging of LoRAs on their dense deltas, so that conflicting LoRAs interfere less.

TIES (arXiv 2306.01708) keeps the largest values of each delta, elects a sign per element, and takes the mean of those
that agree with it. DARE (arXiv 2311.03099) drops random values and scales up the others. The formulas are peft's.
"""

from collections.abc import Sequence

import torch

from zimage_train.rng import keyed_int
from zimage_train.typing import Weight

METHODS = ("ties", "dare_ties", "dare_linear")


def blend_deltas(
    method: str, deltas: Sequence[Weight], weights: Sequence[float], density: float, seed: int, name: str
) -> Weight:
    """Return the deltas of a module merged by `method`, as a dense (out, in) matrix.

    Args:
        density: the fraction of values of each delta that is kept.
        name: the module; DARE's draws are a function of `seed` and `name` alone.
    """
    from peft.utils import merge_utils

    factors = torch.tensor(weights)
    if method == "ties":
        trimmed = torch.stack([_keep_largest(delta, density) for delta in deltas])
        signs = merge_utils.calculate_majority_sign_mask(trimmed, "total")
        return merge_utils.disjoint_merge(trimmed * factors.view(-1, 1, 1), signs)
    # peft draws from torch's global generator; the fork restores it afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_int(seed, "dare", name))
        merge = merge_utils.dare_ties if method == "dare_ties" else merge_utils.dare_linear
        return merge(list(deltas), factors, density)


def _keep_largest(delta: Weight, density: float) -> Weight:
    """Return `delta` with all but the fraction `density` of largest magnitude set to zero."""
    magnitudes = delta.abs().flatten()
    dropped = magnitudes.numel() - max(int(density * magnitudes.numel()), 1)
    if dropped == 0:
        return delta
    # Selecting the threshold takes a quarter of the time of a sort.
    return delta * (delta.abs() > magnitudes.kthvalue(dropped).values)
