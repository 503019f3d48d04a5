"""LoRAs of any layout and kind for tests, written without the package's own writers."""

import hashlib
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_train.lora.deltas import Factors, Lora
from zimage_train.lora.targets import group_of
from zimage_train.models.arch import TransformerShape

TINY = TransformerShape(dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, cap_feat_dim=64, axes_dims=(8, 12, 12))
Q = "layers.0.attention.to_q"


def random_lora(
    rank: int = 4, scale: float = 1.0, seed: int = 0, targets: tuple[str, ...] = ("attention", "feed_forward")
) -> Lora:
    """Factors that differ in every module, so that a mix-up of q, k and v cannot pass."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Factors(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw), scale)
        for name, (outputs, inputs) in TINY.linears.items()
        if group_of(name) in targets
    }


def write(path: Path, lora: Lora, spelling: str = "diffusion_model.{m}.lora_{p}.weight", alpha: bool = True) -> Path:
    """`lora` under keys of this spelling, its scale in `.alpha`."""
    tensors = {spelling.format(m=m, p=p): t.contiguous() for m, f in lora.items() for p, t in (("A", f.a), ("B", f.b))}
    if alpha:
        stem = spelling.split("{m}")[0] + "{m}.alpha"
        tensors |= {stem.format(m=m): torch.tensor(f.scale * f.rank) for m, f in lora.items()}
    save_file(tensors, path)
    return path


def data_digest(path: Path) -> str:
    """SHA-256 of all that follows the header."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def dense(lora: Lora, module: str) -> Tensor:
    """scale * B @ A in float64, by plain sums over the rank; zero where there is none."""
    if module not in lora:
        return torch.zeros(TINY.linears[module], dtype=torch.float64)
    one = lora[module]
    return one.scale * torch.einsum("or,ri->oi", one.b.double(), one.a.double())


def relative(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other||."""
    return float((one - other).norm() / max(float(other.norm()), math.ulp(0)))
