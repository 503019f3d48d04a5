"""Sums, means and lower ranks of LoRAs, always of the changes scale * B @ A and never of A and B apart.

A sum is exact by concatenation: A = cat(A_i), B = cat(w_i scale_i B_i), linear in the weights w_i.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora.lora_file import Factors, Lora
from zimage_train.rng import keyed_generator
from zimage_train.typing import Weight

EXACT_BELOW = 512
"""Dense changes with a smaller side than this are decomposed in full."""
OVERSAMPLING, POWER_ITERATIONS = 16, 4


def stack_loras(loras: Iterable[tuple[Lora, float]]) -> Lora:
    """Several weighted LoRAs as one, exactly; a weight of 0 leaves nothing behind.

    Raises:
        WeightsError: two of them change modules of different shapes.
    """
    return sum_loras([(lora, dict.fromkeys(lora, weight)) for lora, weight in loras])


def sum_loras(loras: Sequence[tuple[Lora, Mapping[str, float]]]) -> Lora:
    """As `stack`, with a weight for each module of each LoRA."""
    stacked: Lora = {}
    for module in dict.fromkeys(module for lora, _ in loras for module in lora):
        parts = [(lora[module], weights[module]) for lora, weights in loras if module in lora and weights[module] != 0]
        sizes = {frobenius_norm(factors) for factors, _ in parts}
        if len(sizes) > 1:
            shapes = " and ".join(str(list(one)) for one in sorted(sizes))
            todo = "LoRAs of different models cannot be put together"
            raise WeightsError(Problem(module, f"the files change weights of shape {shapes}", todo))
        if parts:
            a = torch.cat([factors.a.float() for factors, _ in parts], dim=0)
            b = torch.cat([factors.b.float() * (factors.scale * weight) for factors, weight in parts], dim=1)
            stacked[module] = Factors(a, b, 1.0)
    return stacked


def frobenius_norm(factors: Factors) -> tuple[int, int]:
    """(out, in) of the weight that is changed."""
    return factors.b.shape[0], factors.a.shape[1]


def mean_of_factors(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """sum_i w_i A_i and sum_i w_i scale_i B_i: the mean of one run's saves, as an average taken while training is.

    Only LoRAs that grew out of one another may be treated so; of others the factors have nothing to do with each other.

    Raises:
        WeightsError: they have other modules or ranks.
    """
    first = loras[0]
    for other in loras[1:]:
        one, two = ({name: (f.a.shape, f.b.shape) for name, f in lora.items()} for lora in (first, other))
        different = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
        if different:
            raise WeightsError(Problem(different[0], "differs in rank or shape between them", "give saves of one run"))
    mean: Lora = {}
    for module in first:
        pairs = [(lora[module], weight) for lora, weight in zip(loras, weights, strict=True)]
        a = torch.stack([factors.a.double() * weight for factors, weight in pairs]).sum(0)
        b = torch.stack([factors.b.double() * (weight * factors.scale) for factors, weight in pairs]).sum(0)
        mean[module] = Factors(a.float(), b.float(), 1.0)
    return mean


def ema_weights(steps: Sequence[int], decay: float | None, sigma_rel: float | None) -> list[float]:
    """How much of an average each of a run's saves at rising `steps` is, the first standing for all before it.

    With `decay` d a step, a save stands for the steps since the one before it: d^(T - t_i) - d^(T - t_(i-1)). With
    `sigma_rel`, the relative width of a power law, t_i^(p+1) - t_(i-1)^(p+1) (EDM2, arXiv 2312.02696, section 3.1).
    """
    edges, last = [0, *steps], steps[-1]
    if sigma_rel is not None:
        power = _power_of(sigma_rel) + 1.0
        reached = [(step / last) ** power for step in edges]
    else:
        assert decay is not None
        reached = [decay ** (last - step) for step in edges]
    shares = [after - before for before, after in itertools.pairwise(reached)]
    return [share / sum(shares) for share in shares]


def _power_of(sigma_rel: float) -> float:
    """The p for which (p+1)^(1/2) (p+2)^-1 (p+3)^(-1/2) is `sigma_rel`, by halving; it falls as p rises."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) > sigma_rel:
            low = middle
        else:
            high = middle
    return low


def reduce_rank(factors: Factors, rank: int | None, energy: float, name: str = "") -> tuple[Factors, float, float]:
    """The best approximation of a change by a lower rank, its squared norm, and that of what was there.

    `rank` None takes the lowest that keeps `energy` of the squared norm. Without a dense matrix: QR of both factors,
    then the SVD of the small core between them, in fp64.
    """
    _require_finite(factors.b, name)
    q_b, r_b = torch.linalg.qr(factors.b.double() * factors.scale)
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = _rank(s, rank, energy)
    root = s[:kept].sqrt()
    b, a = (q_b @ u[:, :kept]) * root, (q_a @ vh[:kept].T * root).T
    return Factors(a.float(), b.float(), 1.0), float(s[:kept].square().sum()), float(s.square().sum())


def factorize(change: Weight, rank: int | None, energy: float, name: str) -> tuple[Factors, float, float]:
    """As `reduced`, of a dense change (out, in).

    Large ones go through a random projection, drawn by `name`, with power iterations (Halko, Martinsson and Tropp,
    arXiv 0909.4061); for `rank` None it is widened until it holds `energy`.
    """
    _require_finite(change, name)
    total = float(change.double().square().sum())
    smallest = min(change.shape)
    width = smallest if smallest < EXACT_BELOW else min(smallest, (rank or 64) + OVERSAMPLING)
    while True:
        if width >= smallest:
            u, s, vh = torch.linalg.svd(change.float(), full_matrices=False)
        else:
            u, s, vh = _projected(change.float(), width, name)
        if rank is not None or width >= smallest or float(s.double().square().sum()) >= energy * total:
            break
        width = min(smallest, 2 * width)
    kept = _rank(s, rank, energy, total)
    root = s[:kept].sqrt()
    factors = Factors(root[:, None] * vh[:kept], u[:, :kept] * root, 1.0)
    return factors, float(s[:kept].double().square().sum()), total


def _require_finite(tensor: Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise WeightsError(Problem(name, "its change is beyond what fp32 can hold", "are the ratios right?"))


def _projected(change: Tensor, width: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.randn(change.shape[1], width, generator=keyed_generator(0, "projection", name)).to(change.device)
    basis, _ = torch.linalg.qr(change @ start)
    for _ in range(POWER_ITERATIONS):
        other, _ = torch.linalg.qr(change.T @ basis)
        basis, _ = torch.linalg.qr(change @ other)
    u, s, vh = torch.linalg.svd(basis.T @ change, full_matrices=False)
    return basis @ u, s, vh


def _rank(s: Tensor, rank: int | None, energy: float, total: float | None = None) -> int:
    """How many of the singular values `s` to keep; at least one."""
    squares = s.double().square()
    if rank is None:
        missing = (total if total is not None else float(squares.sum())) * (1.0 - energy)
        tail = squares.flip(0).cumsum(0).flip(0)  # what is lost by keeping fewer
        lost = (total - float(squares.sum()) if total is not None else 0.0) + tail
        rank = int((lost > missing).sum())
    return max(1, min(rank, len(s)))
