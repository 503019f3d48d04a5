"""How much LoRAs that are used at once overlap: their directions, and the part of each that survives in the sum.

Everything is of the deltas with their weights, D_i, in fp64, module by module. A delta writes to its column space, a
subspace of the outputs of the module, and reads its row space, a subspace of the inputs. For a delta D_i and the other
deltas D_j of the module:

* cosine: <D_i, D_j> / (|D_i| |D_j|).
* principal angles between the spaces of two deltas (Bjorck and Golub 1973): the arc cosines of the singular values of
  Q_i' Q_j, with orthonormal bases Q. The smallest is 0 where they share a direction.
* survives: <D_i, sum> / |D_i|^2, the coefficient of D_i in the projection of the sum on it: 1 if the others leave it as
  it is, less if they cancel a part, more if they add to it.
* shared writes and reads: the part of |D_i|^2 in the space that the others write or read, |P D_i|^2 / |D_i|^2 with the
  projection P on the sum of their spaces. Of spaces without any relation it is rank / width.

Over several modules, numerators and denominators are summed before the division.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import arithmetic
from zimage_train.lora.deltas import Delta, Deltas, Factors

MAX_DIRECTIONS = 64
"""A delta of full rank, such as a LoKr, is taken by so many of its largest directions."""
TOLERANCE = 1e-6
"""A singular value below this fraction of the largest is rounding, and no direction."""


@dataclass(frozen=True)
class Spaces:
    """A delta U diag(S) V' with orthonormal U (out, rank) and V (in, rank), in fp64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(self.s.square().sum())


@dataclass(frozen=True)
class Sums:
    """The numerators and the denominator of the measures of a delta, in a module or summed over several."""

    energy: float = 0.0
    """|D_i|^2."""
    kept: float = 0.0
    """<D_i, sum>."""
    written: float = 0.0
    """|P D_i|^2 with P on the space that the others write."""
    read: float = 0.0
    """|D_i P|^2 with P on the space that the others read."""
    chance: float = 0.0
    """|D_i|^2 times the share of the outputs that the others would write if the spaces had no relation."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.energy + other.energy,
            self.kept + other.kept,
            self.written + other.written,
            self.read + other.read,
            self.chance + other.chance,
        )

    def shares(self) -> dict[str, float]:
        """Return the measures by name; those of a delta of zero are 0."""
        if self.energy == 0:
            return dict.fromkeys(("survives", "shared_writes", "shared_reads", "by_chance"), 0.0)
        return {
            "survives": self.kept / self.energy,
            "shared_writes": self.written / self.energy,
            "shared_reads": self.read / self.energy,
            "by_chance": self.chance / self.energy,
        }


@dataclass(frozen=True)
class PairOverlap:
    """Two deltas of a module."""

    inner: float
    output_angle: float
    """The smallest principal angle between their column spaces, in degrees."""
    input_angle: float
    """The smallest principal angle between their row spaces, in degrees."""


@dataclass(frozen=True)
class ModuleOverlap:
    """The deltas of a module, of those LoRAs that change it."""

    sums: Mapping[int, Sums]
    """Index of the LoRA -> its measures."""
    pairs: Mapping[tuple[int, int], PairOverlap]


def spaces_of(delta: Delta, module: str) -> Spaces:
    """Return the singular value decomposition of a delta, without directions that are rounding alone."""
    factors = delta
    if not isinstance(factors, Factors):
        factors, _, _ = arithmetic.factorize(delta.delta(), MAX_DIRECTIONS, 1.0, module)
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, s, vh = torch.linalg.svd(factors.scale * r_b @ r_a.T)
    kept = int((s > TOLERANCE * s[0]).sum())
    return Spaces(q_b @ u[:, :kept], s[:kept], q_a @ vh[:kept].T)


def joint_basis(bases: Sequence[Tensor]) -> Tensor:
    """Return an orthonormal basis of the sum of the spaces that `bases` span."""
    if len(bases) == 1:
        return bases[0]
    u, s, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return u[:, s > TOLERANCE * s[0]] if s.numel() else u


def smallest_angle(first: Tensor, second: Tensor) -> float:
    """Return the smallest principal angle between the spaces of two orthonormal bases, in degrees; 90 for no space."""
    if first.shape[1] == 0 or second.shape[1] == 0:
        return 90.0
    # By sines where the angle is small, since the arc cosine loses half of the digits there.
    cosines = torch.linalg.svdvals(first.T @ second)
    cosine = min(float(cosines[0]), 1.0)
    if cosine < 0.9:
        return math.degrees(math.acos(cosine))
    narrow, wide = (first, second) if first.shape[1] <= second.shape[1] else (second, first)
    sines = torch.linalg.svdvals(narrow - wide @ (wide.T @ narrow))
    return math.degrees(math.asin(min(float(sines[-1]), 1.0)))


def module_overlap(deltas: Mapping[int, Delta], module: str) -> ModuleOverlap:
    """Return the measures of the deltas of a module, by the indices of their LoRAs.

    Raises:
        WeightsError: they change weights of different shapes.
    """
    if len({delta.shape for delta in deltas.values()}) > 1:
        message = "the files change weights of different shapes"
        raise WeightsError(Problem(module, message, "LoRAs of different models cannot be combined", "other-shape"))
    spaces = {index: spaces_of(delta, module) for index, delta in deltas.items()}
    inner: dict[tuple[int, int], float] = {}
    pairs: dict[tuple[int, int], PairOverlap] = {}
    for i, first in spaces.items():
        for j, second in spaces.items():
            if i >= j:
                continue
            outputs, inputs = first.u.T @ second.u, first.v.T @ second.v
            inner[i, j] = inner[j, i] = float((first.s[:, None] * outputs * second.s * inputs).sum())
            pairs[i, j] = PairOverlap(inner[i, j], smallest_angle(first.u, second.u), smallest_angle(first.v, second.v))
    sums: dict[int, Sums] = {}
    for i, own in spaces.items():
        others = [space for j, space in spaces.items() if j != i]
        kept = own.energy + math.fsum(inner[i, j] for j in spaces if j != i)
        if not others:
            sums[i] = Sums(own.energy, kept)
            continue
        writes, reads = joint_basis([one.u for one in others]), joint_basis([one.v for one in others])
        sums[i] = Sums(
            own.energy,
            kept,
            float((writes.T @ (own.u * own.s)).square().sum()),
            float((reads.T @ (own.v * own.s)).square().sum()),
            own.energy * writes.shape[1] / own.u.shape[0],
        )
    return ModuleOverlap(sums, pairs)


def overlaps(loras: Sequence[Deltas]) -> dict[str, ModuleOverlap]:
    """Return the measures of every module that any of `loras`, which have their weights, changes."""
    found: dict[str, ModuleOverlap] = {}
    for module in dict.fromkeys(itertools.chain.from_iterable(loras)):
        deltas = {index: lora[module] for index, lora in enumerate(loras) if module in lora}
        found[module] = module_overlap(deltas, module)
    return found


def total_sums(found: Mapping[str, ModuleOverlap], index: int) -> Sums:
    """Return the measures of the LoRA `index` over the modules of `found`."""
    return sum((overlap.sums[index] for overlap in found.values() if index in overlap.sums), Sums())


def total_cosine(found: Mapping[str, ModuleOverlap], i: int, j: int) -> float:
    """Return the cosine of two LoRAs over the modules of `found`."""
    inner = math.fsum(overlap.pairs[i, j].inner for overlap in found.values() if (i, j) in overlap.pairs)
    norms = total_sums(found, i).energy * total_sums(found, j).energy
    return inner / math.sqrt(norms) if norms > 0 else 0.0
