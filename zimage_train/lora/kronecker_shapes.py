"""Shapes of the matrices of a LoKr, and what it costs (torch-free).

Reference: LyCORIS, lycoris/functional/general.py (factorization) and lycoris/modules/lokr.py, as AI Toolkit and peft
have it too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zimage_train.config.lora import LoraSettings


def divide(size: int, factor: int | None) -> tuple[int, int]:
    """Return `size` as a product of two, of which the first is `factor` if it divides.

    Otherwise the first is the largest divisor up to `factor` that is not above the second; for None, the two are as
    close as divisors can be.
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor is None else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


@dataclass(frozen=True)
class KroneckerShape:
    """W1 (l, m) and W2 (k, n) of the LoKr of a weight (l k, m n)."""

    w1: tuple[int, int]
    w2: tuple[int, int]
    rank: int | None
    """Rank of W2, which is then stored as a product of two; None: it is stored whole."""

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Name -> shape of each matrix that is trained."""
        if self.rank is None:
            return {"w1": self.w1, "w2": self.w2}
        return {"w1": self.w1, "w2_a": (self.w2[0], self.rank), "w2_b": (self.rank, self.w2[1])}

    @property
    def numel(self) -> int:
        return sum(rows * columns for rows, columns in self.parts.values())

    @property
    def products(self) -> int:
        """Return the multiplications that its forward takes for a row of the input."""
        (outer, inner), (rows, columns) = self.w1, self.w2
        return outer * inner * columns + outer * columns * rows

    @property
    def between(self) -> int:
        """Return the numbers that its two products have between them, for a row of the input."""
        return self.w1[0] * self.w2[1]


def kronecker_shape(weight: tuple[int, int], factor: int | None, rank: int | None) -> KroneckerShape:
    """Return the shape of the LoKr of a weight (out, in).

    Args:
        factor: as `divide` takes it, for both sides.
        rank: of W2, which is stored whole if that is not larger: from half of its longer side on.
    """
    (outer, rows), (inner, columns) = divide(weight[0], factor), divide(weight[1], factor)
    is_whole = rank is None or 2 * rank >= max(rows, columns)
    return KroneckerShape((outer, inner), (rows, columns), None if is_whole else rank)


def shapes_of(
    settings: LoraSettings, linears: dict[str, tuple[int, int]], modules: Iterable[str]
) -> dict[str, KroneckerShape]:
    """Return module -> shape of the LoKr that `settings` describe."""
    return {module: kronecker_shape(linears[module], settings.factor_number, settings.rank) for module in modules}
