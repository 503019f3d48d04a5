"""Sums, means and rank reduction of LoRAs, computed on the deltas scale * B @ A rather than on A and B separately.

A sum is exact by concatenation: A = cat(A_i) and B = cat(w_i scale_i B_i), so the delta is linear in the weights w_i.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import headers
from zimage_train.lora.deltas import Delta, Deltas, DeltaSum, Factors, Lora
from zimage_train.rng import keyed_generator
from zimage_train.typing import Weight

EXACT_BELOW = 512
"""Dense deltas whose smaller side is below this are decomposed by a full SVD."""
OVERSAMPLING, POWER_ITERATIONS = 16, 4


def sum_deltas(adapters: Iterable[tuple[Deltas, float]]) -> Deltas:
    """Return the exact sum of adapters, each times its weight; a weight of 0 leaves the adapter out.

    The LoRAs of a module become one LoRA, as `sum_loras` forms it; LoKrs are kept beside it.

    Raises:
        WeightsError: two of them change a module with different shapes.
    """
    parts: dict[str, list[Delta]] = {}
    for deltas, weight in adapters:
        for module, delta in deltas.items():
            for part in delta.parts if isinstance(delta, DeltaSum) else (delta,):
                if weight != 0:
                    parts.setdefault(module, []).append(part.times(weight))
    total: Deltas = {}
    for module, found in parts.items():
        _require_same_shape(module, found)
        loras = [part for part in found if isinstance(part, Factors)]
        others = [part for part in found if not isinstance(part, Factors)]
        terms = [*([_concatenate(loras)] if loras else []), *others]
        total[module] = terms[0] if len(terms) == 1 else DeltaSum(tuple(terms))
    return total


def sum_loras(loras: Sequence[tuple[Lora, Mapping[str, float]]]) -> Lora:
    """Return the exact sum of plain LoRAs, with a weight per module of each; a weight of 0 leaves the module out.

    Raises:
        WeightsError: two of them change a module with different shapes.
    """
    modules = dict.fromkeys(module for lora, _ in loras for module in lora)
    stacked: Lora = {}
    for module in modules:
        parts: list[Factors] = []
        for lora, weights in loras:
            if module in lora and weights[module] != 0:
                parts.append(lora[module].times(weights[module]))
        if parts:
            _require_same_shape(module, parts)
            stacked[module] = _concatenate(parts)
    return stacked


def _require_same_shape(module: str, parts: Iterable[Delta]) -> None:
    shapes = {part.shape for part in parts}
    if any(not headers.fits(shape, max(shapes)) for shape in shapes):
        message = f"the files change weights of shape {' and '.join(str(list(shape)) for shape in sorted(shapes))}"
        raise WeightsError(Problem(module, message, "LoRAs of different models cannot be combined", "other-shape"))


def _concatenate(parts: Sequence[Factors]) -> Factors:
    """Return the sum of LoRAs of a module: A stacked, and B side by side."""
    # The scale goes into B alone: applied to A as well it would count squared, and its sign would be lost.
    a = torch.cat([factors.a.float() for factors in parts], dim=0)
    b = torch.cat([factors.b.float() * factors.scale for factors in parts], dim=1)
    return Factors(a, b, 1.0)


def mean_of_factors(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """Return the LoRA with factors sum_i w_i A_i and sum_i w_i scale_i B_i, as an EMA taken during training has them.

    Only valid for saves of one run, whose factors stay close; the mean of unrelated factors has no meaning.

    Raises:
        WeightsError: their modules or ranks differ.
    """
    first = loras[0]
    first_shapes = _factor_shapes(first)
    for other in loras[1:]:
        shapes = _factor_shapes(other)
        differing = sorted(
            module for module in first_shapes.keys() | shapes.keys() if first_shapes.get(module) != shapes.get(module)
        )
        if differing:
            raise WeightsError(
                Problem(differing[0], "differs in rank or shape between them", "give saves of one run", "other-rank")
            )
    mean: Lora = {}
    for module in first:
        pairs = [(lora[module], weight) for lora, weight in zip(loras, weights, strict=True)]
        a = torch.stack([factors.a.double() * weight for factors, weight in pairs]).sum(0)
        b = torch.stack([factors.b.double() * (weight * factors.scale) for factors, weight in pairs]).sum(0)
        mean[module] = Factors(a.float(), b.float(), 1.0)
    return mean


def _factor_shapes(lora: Lora) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {module: (factors.a.shape, factors.b.shape) for module, factors in lora.items()}


def ema_weights(steps: Sequence[int], decay: float | None, sigma_rel: float | None) -> list[float]:
    """Return the weight of each save in an average over a run, for saves at rising `steps`; they sum to 1.

    Each save stands for the steps since the save before, the first for all steps up to it. With `decay` d per step its
    weight is d^(T - t_i) - d^(T - t_(i-1)), normalised. With `sigma_rel`, the relative width of a power law, it is
    t_i^(p+1) - t_(i-1)^(p+1) (EDM2, arXiv 2312.02696, section 3.1).
    """
    edges, last = [0, *steps], steps[-1]
    if sigma_rel is not None:
        power = _power_of(sigma_rel) + 1.0
        cumulative = [(step / last) ** power for step in edges]
    else:
        assert decay is not None
        cumulative = [decay ** (last - step) for step in edges]
    shares = [after - before for before, after in itertools.pairwise(cumulative)]
    # The power law sums to 1 already. The exponential lacks d^T, the share of the initial weights, which were not
    # saved.
    return [share / sum(shares) for share in shares]


def _power_of(sigma_rel: float) -> float:
    """Return the p for which (p+1)^(1/2) (p+2)^-1 (p+3)^(-1/2) equals `sigma_rel` (EDM2, appendix C.1)."""
    return float(np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2]).real.max())


def reduce_rank(factors: Factors, rank: int | None, energy: float, name: str = "") -> tuple[Factors, float, float]:
    """Return the best approximation of a delta with a lower rank, its squared norm, and that of the original.

    Args:
        rank: the rank to keep; None takes the lowest that keeps `energy` of the squared norm.

    Raises:
        WeightsError: a factor is not finite; `name` is the module that the message names.
    """
    _require_finite(factors.b, name)
    # The dense (out, in) matrix is never formed. With B = Q_b R_b and A' = Q_a R_a, the delta is Q_b (R_b R_a') Q_a',
    # and as both Q are orthonormal, it has the singular values of the core R_b R_a', which is only (rank, rank). In
    # fp64, so that rounding does not hide small singular values.
    q_b, r_b = torch.linalg.qr(factors.b.double() * factors.scale)
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = _rank_to_keep(s, rank, energy)
    root = s[:kept].sqrt()  # to both factors, so that they have the same scale
    b, a = (q_b @ u[:, :kept]) * root, (q_a @ vh[:kept].T * root).T
    return Factors(a.float(), b.float(), 1.0), float(s[:kept].square().sum()), float(s.square().sum())


def factorize(delta: Weight, rank: int | None, energy: float, name: str) -> tuple[Factors, float, float]:
    """Return low-rank factors of a dense delta (out, in), their squared norm, and that of the delta.

    Large matrices are decomposed through a random projection with power iterations (Halko, Martinsson and Tropp,
    arXiv 0909.4061), drawn as a function of `name` alone.

    Args:
        rank: the rank to keep; None takes the lowest that keeps `energy` of the squared norm.

    Raises:
        WeightsError: the delta is not finite.
    """
    _require_finite(delta, name)
    total = float(delta.double().square().sum())
    full_width = min(delta.shape)
    width = full_width if full_width < EXACT_BELOW else (rank or 64) + OVERSAMPLING
    # The rank that keeps `energy` is not known in advance: the projection is widened until it holds that much.
    while width < full_width:
        u, s, vh = _randomized_svd(delta.float(), width, name)
        if rank is not None or float(s.double().square().sum()) >= energy * total:
            break
        width *= 2
    else:
        u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
    kept = _rank_to_keep(s, rank, energy, total)
    root = s[:kept].sqrt()
    factors = Factors(root[:, None] * vh[:kept], u[:, :kept] * root, 1.0)
    return factors, float(s[:kept].double().square().sum()), total


def _require_finite(tensor: Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise WeightsError(
            Problem(name, "its change is beyond the range of fp32", "are the ratios right?", "not-finite")
        )


def _randomized_svd(delta: Tensor, width: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V' of the `width` largest singular values, approximately."""
    start = torch.randn(delta.shape[1], width, generator=keyed_generator(0, "projection", name)).to(delta.device)
    basis, _ = torch.linalg.qr(delta @ start)
    # Each iteration multiplies by delta delta', which widens the gaps between singular values. The QR in between keeps
    # the columns from all turning into the first singular vector.
    for _ in range(POWER_ITERATIONS):
        other, _ = torch.linalg.qr(delta.T @ basis)
        basis, _ = torch.linalg.qr(delta @ other)
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ u, s, vh


def _rank_to_keep(s: Tensor, rank: int | None, energy: float, total: float | None = None) -> int:
    """Return how many of the singular values `s` to keep, at least one.

    Args:
        total: the squared norm of the whole matrix, where `s` are only its largest singular values.
    """
    squares = s.double().square()
    if rank is None:
        known = float(squares.sum())
        outside = 0.0 if total is None else total - known  # what the projection has missed
        allowed = (known if total is None else total) * (1.0 - energy)
        # lost[i] is the squared norm that keeping the first i singular values would lose.
        lost = outside + squares.flip(0).cumsum(0).flip(0)
        rank = int((lost > allowed).sum())
    return max(1, min(rank, len(s)))
