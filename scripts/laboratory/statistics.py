"""Means with their intervals, and which of them are told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for 95 %, two-sided, by degrees of freedom."""

Interval = list[float]  # mean, low, high


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95 % interval by Student's t; a single value has no known width."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return [mean, mean, mean]
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = T_95[len(values) - 1] * spread / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def apart(first: Interval, other: Interval) -> bool:
    """Whether two intervals share nothing."""
    return first[2] < other[1] or other[2] < first[1]


def orders(table: Mapping[str, Interval]) -> list[tuple[str, str]]:
    """Every pair (lower, higher) whose intervals do not overlap."""
    pairs = combinations(sorted(table, key=lambda name: table[name][0]), 2)
    return [(low, high) for low, high in pairs if apart(table[low], table[high])]


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, ties sharing theirs."""
    a, b = ranks(xs), ranks(ys)
    mean = (len(a) + 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return covariance / spread if spread else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]
