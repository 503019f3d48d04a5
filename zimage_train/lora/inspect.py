"""What a LoRA file is made of: layout, ranks, scales, and how much each module changes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import keys, lora_file, targets, verify
from zimage_train.lora.lora_file import Factors


@dataclass(frozen=True)
class LoraSummary:
    """A LoRA file, described."""

    layout: str
    dtypes: Counter[str]
    ranks: Counter[int]
    scales: Counter[float]
    """alpha / rank of each module."""
    groups: dict[str, int]
    energy: dict[str, float]
    """Module -> Frobenius norm of its change."""
    metadata: dict[str, str]


def summarize_lora(path: Path) -> LoraSummary:
    """Describe the LoRA at `path`.

    Raises:
        WeightsError: it is none that this trainer reads; says what it is instead.
    """
    lora = lora_file.read_lora(path)
    header = read_header(path)
    return LoraSummary(
        layout=keys.layout_of(header.tensors),
        dtypes=Counter(info.dtype for key, info in header.tensors.items() if not key.endswith(".alpha")),
        ranks=Counter(factors.rank for factors in lora.values()),
        scales=Counter(round(factors.scale, 6) for factors in lora.values()),
        groups=targets.count_by_group(lora),
        energy={module: norm(factors) for module, factors in lora.items()},
        metadata=header.metadata,
    )


def norm(factors: Factors) -> float:
    """The Frobenius norm of scale * B @ A, through the rank alone, in fp64."""
    nothing = Factors(factors.a[:0], factors.b[:, :0], 1.0)
    return verify.difference(factors, nothing)


def product(one: Factors, other: Factors) -> float:
    """The Frobenius inner product of two changes, through the ranks alone, in fp64."""
    b = one.b.double().T @ other.b.double()
    a = one.a.double() @ other.a.double().T
    return one.scale * other.scale * float((b * a).sum())
