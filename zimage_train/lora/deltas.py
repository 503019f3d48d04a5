"""The changes that adapters make to weights, one class for each kind of adapter, and sums of these."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from zimage_train.lora.keys import ANY_INPUTS
from zimage_train.typing import LoraA, LoraB, Weight


class Delta(ABC):
    """The change of an adapter to the weight (out, in) of a module, which for most kinds does not depend on it."""

    kind: ClassVar[str]
    """The name of the kind of adapter."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight that it changes; in is `ANY_INPUTS` for kinds that do not know it."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """The number of values of all its factors."""

    @abstractmethod
    def delta(self) -> Weight:
        """Return the dense delta (out, in) in fp32."""

    def change(self, weight: Weight) -> Weight:
        """Return the change to `weight`; other than `delta`, it exists for every kind."""
        return self.delta()

    @abstractmethod
    def times(self, weight: float) -> "Delta":
        """Return `weight` times the delta; its factors share memory with this one's where they can."""

    @abstractmethod
    def stored(self, dtype: torch.dtype) -> "Delta":
        """Return it as a file of `dtype` stores it: the scale folded in, the factors rounded."""

    def inner(self, other: "Delta") -> float:
        """Return the Frobenius inner product with another delta of the same shape, in fp64."""
        return float((self.delta().double() * other.delta().double().to(self.delta().device)).sum())

    def norm(self) -> float:
        """Return the Frobenius norm, computed in fp64."""
        return max(self.inner(self), 0.0) ** 0.5

    def distance(self, other: "Delta") -> float:
        """Return the Frobenius norm of the difference, computed in fp64."""
        # The three terms cancel for equal deltas, and may then come out slightly negative.
        return max(self.inner(self) - 2.0 * self.inner(other) + other.inner(other), 0.0) ** 0.5


def relative_error(expected: Delta, actual: Delta) -> float:
    """Return ||delta - delta'|| / ||delta|| (Frobenius); ||delta'|| if the expected delta is zero."""
    norm, error = expected.norm(), expected.distance(actual)
    return error / norm if norm > 0 else error


@dataclass(frozen=True)
class Factors(Delta):
    """The LoRA factors of a module: delta = scale * B @ A, with A (rank, in) and B (out, rank)."""

    kind = "LoRA"
    a: LoraA
    b: LoraB
    scale: float

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def numel(self) -> int:
        return self.a.numel() + self.b.numel()

    def delta(self) -> Weight:
        return self.scale * (self.b.float() @ self.a.float())

    def times(self, weight: float) -> "Factors":
        return Factors(self.a, self.b, self.scale * weight)

    def stored(self, dtype: torch.dtype) -> "Factors":
        # Folded in fp32, so that B is rounded only once. Alpha then equals the rank, and readers that ignore alpha load
        # the same delta as those that apply it.
        b = self.b.detach().float() * self.scale
        return Factors(self.a.detach().to(dtype), b.to(dtype), 1.0)

    def inner(self, other: Delta) -> float:
        if not isinstance(other, Factors):
            return super().inner(other)
        # <B A, D C> = trace(A' B' D C) = sum((B' D) * (A C')), without the dense matrices.
        b = self.b.double().T @ other.b.double().to(self.b.device)
        a = self.a.double() @ other.a.double().to(self.a.device).T
        return self.scale * other.scale * float((b * a).sum())

    def distance(self, other: Delta) -> float:
        if not isinstance(other, Factors):
            return super().distance(other)
        # The difference is again low-rank: [B, -B'] @ [A; A']. Its squared norm is sum((B' B) * (A A')).
        device = self.b.device
        b = torch.cat([self.b.double() * self.scale, -other.b.double().to(device) * other.scale], dim=1)
        a = torch.cat([self.a.double(), other.a.double().to(device)], dim=0)
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())


@dataclass(frozen=True)
class Kronecker(Delta):
    """The LoKr of a module: delta = scale * kron(W1, W2), with W1 (l, m) and W2 (k, n) for a weight (l k, m n).

    Each is stored whole, as a tuple of one matrix, or as two whose product it is.

    Reference: LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/lokr.py
    """

    kind = "LoKr"
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """W1 and W2 in fp32."""
        return _product(self.w1), _product(self.w2)

    @property
    def shape(self) -> tuple[int, int]:
        outputs = self.w1[0].shape[0] * self.w2[0].shape[0]
        return outputs, self.w1[-1].shape[1] * self.w2[-1].shape[1]

    @property
    def numel(self) -> int:
        return sum(matrix.numel() for matrix in (*self.w1, *self.w2))

    @property
    def rank(self) -> int:
        """The rank of W2, or else of W1, if it is a product; 0 if both are whole, and alpha has no effect."""
        if len(self.w2) == 2:
            return self.w2[1].shape[0]
        return self.w1[1].shape[0] if len(self.w1) == 2 else 0

    def delta(self) -> Weight:
        return self.scale * torch.kron(*self.whole)

    def times(self, weight: float) -> "Kronecker":
        return Kronecker(self.w1, self.w2, self.scale * weight)

    def stored(self, dtype: torch.dtype) -> "Kronecker":
        # Into the first matrix, as diffusers does, and in fp32, so that it is rounded only once.
        first = self.w1[0].detach().float() * self.scale
        w1 = [matrix.detach().to(dtype) for matrix in (first, *self.w1[1:])]
        w2 = [matrix.detach().to(dtype) for matrix in self.w2]
        return Kronecker(tuple(w1), tuple(w2))

    def inner(self, other: Delta) -> float:
        if not isinstance(other, Kronecker):
            return super().inner(other)
        pairs = list(zip(self.whole, other.whole, strict=True))
        if any(ours.shape != theirs.shape for ours, theirs in pairs):
            return super().inner(other)
        # <A x B, C x D> = <A, C> <B, D>
        result = self.scale * other.scale
        for ours, theirs in pairs:
            result *= float((ours.double() * theirs.double().to(ours.device)).sum())
        return result


@dataclass(frozen=True)
class Hadamard(Delta):
    """The LoHa of a module: delta = scale * (B1 @ A1) * (B2 @ A2), the products multiplied element by element.

    Reference: LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/loha.py
    """

    kind = "LoHa"
    w1: tuple[Tensor, Tensor]
    """B1 (out, rank) and A1 (rank, in)."""
    w2: tuple[Tensor, Tensor]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of columns of B1 and of B2; the rank of the delta is up to its square."""
        return self.w1[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0], self.w1[1].shape[1]

    @property
    def numel(self) -> int:
        return sum(matrix.numel() for matrix in (*self.w1, *self.w2))

    def delta(self) -> Weight:
        return self.scale * (_product(self.w1) * _product(self.w2))

    def times(self, weight: float) -> "Hadamard":
        return Hadamard(self.w1, self.w2, self.scale * weight)

    def stored(self, dtype: torch.dtype) -> "Hadamard":
        # In fp32 into one of the four, so that it is rounded only once.
        b1 = self.w1[0].detach().float() * self.scale
        a1, b2, a2 = (matrix.detach().to(dtype) for matrix in (self.w1[1], *self.w2))
        return Hadamard((b1.to(dtype), a1), (b2, a2))


@dataclass(frozen=True)
class Dora(Delta):
    """The DoRA of a module: W becomes magnitude / ||W|| (W + B A), row by row, and no delta exists without W.

    ||W|| are the norms of the rows of W, as ComfyUI computes it, where peft and the paper have those of W + B A. The
    same weights can be reached with either.
    """

    kind = "DoRA"
    factors: Factors
    magnitude: Tensor
    """(out,)."""
    strength: float = 1.0
    """Factor on the change, as ComfyUI multiplies it."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    @property
    def numel(self) -> int:
        return self.factors.numel + self.magnitude.numel()

    def delta(self) -> Weight:
        raise NotImplementedError("a DoRA's change depends on the weight")

    def gain(self, weight: Weight) -> Tensor:
        """Return the factors (out, 1) on the rows of `weight`."""
        return (self.magnitude.float() / row_norms(weight)).unsqueeze(1)

    def change(self, weight: Weight) -> Weight:
        gain = self.gain(weight)
        return self.strength * ((gain - 1.0) * weight.float() + gain * self.factors.delta())

    def times(self, weight: float) -> "Dora":
        return Dora(self.factors, self.magnitude, self.strength * weight)

    def stored(self, dtype: torch.dtype) -> "Dora":
        # In bf16 the magnitude would be off by more than it changes.
        return Dora(self.factors.stored(dtype), self.magnitude.detach().float(), self.strength)

    def norm(self) -> float:
        return self.factors.norm()

    def distance(self, other: Delta) -> float:
        assert isinstance(other, Dora)
        apart = self.magnitude.double() - other.magnitude.double().to(self.magnitude.device)
        return float(torch.hypot(torch.tensor(self.factors.distance(other.factors)).double(), apart.norm().cpu()))


@dataclass(frozen=True)
class Rotation(Delta):
    """The OFT of a module: each group of rows of W is multiplied by R', and no delta exists without W.

    R = (I + Q)(I - Q)^-1 is orthogonal, with Q = blocks - blocks' (Cayley).

    Reference: LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/diag_oft.py
    """

    kind = "OFT"
    blocks: Tensor
    """(groups, rows, rows): any matrices, whose skew-symmetric part counts."""
    strength: float = 1.0
    """As ComfyUI has it, which multiplies the change by its square."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0] * self.blocks.shape[1], ANY_INPUTS

    @property
    def numel(self) -> int:
        return self.blocks.numel()

    def delta(self) -> Weight:
        raise NotImplementedError("an OFT's change depends on the weight")

    @property
    def turns(self) -> Tensor:
        """The orthogonal matrices R minus the identity, times the factor on the change."""
        return self.strength**2 * cayley(self.blocks - self.blocks.mT).float()

    def change(self, weight: Weight) -> Weight:
        turns = self.turns
        rows = weight.float().unflatten(0, turns.shape[:2])
        return (turns.to(rows.device).mT @ rows).flatten(0, 1)

    def times(self, weight: float) -> "Rotation":
        return Rotation(self.blocks, self.strength * weight)

    def stored(self, dtype: torch.dtype) -> "Rotation":
        return Rotation(self.blocks.detach().to(dtype), self.strength)

    def norm(self) -> float:
        return float(self.turns.double().norm())

    def distance(self, other: Delta) -> float:
        assert isinstance(other, Rotation)
        turns = self.turns.double()
        return float((turns - other.turns.double().to(turns.device)).norm())


def cayley(skew: Tensor) -> Tensor:
    """Return R - I of the orthogonal R = (I + Q)(I - Q)^-1 for skew-symmetric Q (..., rows, rows), at least in fp32.

    As 2 Q (I - Q)^-1, which loses no digits where Q is small.
    """
    skew = skew.to(torch.promote_types(skew.dtype, torch.float32))
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # I - Q is always invertible, so its check, for which a GPU would have to be waited for, is left out.
    return torch.linalg.solve_ex(identity - skew, 2.0 * skew, left=False)[0]


def row_norms(weight: Weight) -> Tensor:
    """Return the norms of the rows of a weight, (out,) in fp32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


@dataclass(frozen=True)
class DeltaSum(Delta):
    """The sum of several deltas of a module that have no common form."""

    kind = "sum"
    parts: tuple[Delta, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return max(part.shape for part in self.parts)

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def delta(self) -> Weight:
        return torch.stack([part.delta() for part in self.parts]).sum(0)

    def change(self, weight: Weight) -> Weight:
        return torch.stack([part.change(weight) for part in self.parts]).sum(0)

    def times(self, weight: float) -> "DeltaSum":
        return DeltaSum(tuple(part.times(weight) for part in self.parts))

    def stored(self, dtype: torch.dtype) -> "DeltaSum":
        return DeltaSum(tuple(part.stored(dtype) for part in self.parts))


def _product(matrices: Sequence[Tensor]) -> Tensor:
    """Return the matrix, or the product of two, in fp32."""
    return matrices[0].float() if len(matrices) == 1 else matrices[0].float() @ matrices[1].float()


Lora = dict[str, Factors]
"""Module -> its factors, of a plain LoRA."""
Deltas = dict[str, Delta]
"""Module -> its delta, of any adapter that adds to weights."""
