"""TIES and DARE: LoRAs put together by their dense changes, so that those in each other's way harm each other less.

TIES (arXiv 2306.01708) keeps the largest values of each, elects a sign for each place, and takes the mean of those that
agree. DARE (arXiv 2311.03099) drops values at random and scales up the rest. The formulas are peft's.
"""

from collections.abc import Sequence

import torch

from zimage_train.seeding import number
from zimage_train.tensors import Dense

METHODS = ("ties", "dare_ties", "dare_linear")


def blend(
    method: str, changes: Sequence[Dense], weights: Sequence[float], density: float, seed: int, name: str
) -> Dense:
    """The changes of one module as one, by `method`; DARE's draws are functions of `seed` and `name` alone."""
    from peft.utils import merge_utils

    methods = {"ties": merge_utils.ties, "dare_ties": merge_utils.dare_ties, "dare_linear": merge_utils.dare_linear}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number(seed, "dare", name))
        return methods[method](list(changes), torch.tensor(weights), density)
