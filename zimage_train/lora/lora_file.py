"""LoRA files: any layout in, one layout out.

The layout written is the only one that every diffusers since 0.36 and ComfyUI read alike:
`diffusion_model.<module>.lora_A/lora_B.weight`, and `.alpha` equal to the rank with the scale folded into B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import tensorfile
from zimage_train.lora import format_metadata, headers, keys, qkv
from zimage_train.lora.keys import MAGNITUDE
from zimage_train.lora.qkv import Change
from zimage_train.typing import LoraA, LoraB, Weight


@dataclass(frozen=True)
class Factors:
    """The change of one module: delta = scale * B @ A, with A (rank, in) and B (out, rank)."""

    a: LoraA
    b: LoraB
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Weight:
        """The dense change (out, in) in fp32."""
        return self.scale * (self.b.float() @ self.a.float())


Lora = dict[str, Factors]


Changes = dict[str, Change]
"""Module -> what changes it, of any kind; fused ones are split, and alpha is a single fp32 number."""


def read_changes(path: Path) -> tuple[Changes, dict[str, str]]:
    """Read a LoRA, DoRA, LoKr or LoHa of any known layout, and its metadata.

    Raises:
        WeightsError: unreadable, not finite, or holds keys that are no change of a Z-Image transformer.
    """
    parts = headers.read_parts(path)
    tensors, metadata = tensorfile.load(path)
    memo = format_metadata.read_format_metadata(metadata.pop(format_metadata.CONVERTED_KEY, None))
    has_alpha = any("alpha" in found for found in parts.values())
    alpha_of = (
        None if has_alpha else format_metadata.alphas_from_metadata(path, metadata.get(format_metadata.ALPHA_KEY))
    )
    changes: Changes = {}
    for module, found in parts.items():
        change = {part: _require_finite_floats(path, key, tensors[key]) for part, key in found.items()}
        if "alpha" in change:
            change["alpha"] = change["alpha"].reshape(()).float()
        elif alpha_of is not None and "A" in change:
            change["alpha"] = torch.tensor(alpha_of(module, change["A"].shape[0]))
        if MAGNITUDE in change and change[MAGNITUDE].shape[-1] == 1:
            change[MAGNITUDE] = change[MAGNITUDE].reshape(-1)
        changes |= _split(path, module, change, memo.ranks.get(module))
    return _with_alpha(changes, memo.alpha), metadata


def _with_alpha(changes: Changes, wanted: bool | None) -> Changes:
    """`changes` with or without alphas that say nothing, as a memo says that they were before."""
    plain = {module: one for module, one in changes.items() if qkv.rank_of(one)}
    if wanted is None or any(qkv.scale_of(one) != 1.0 for one in plain.values()):
        return changes
    for one in plain.values():
        one.pop("alpha", None)
        if wanted:
            one["alpha"] = torch.tensor(float(qkv.rank_of(one)))
    return changes


def read_lora(path: Path) -> Lora:
    """Read a plain LoRA of any known layout.

    Raises:
        WeightsError: as `read_changes`, or it is of another kind.
    """
    changes, _ = read_changes(path)
    headers.require_plain_lora(path, {module: kind_of(change) for module, change in changes.items()})
    return {module: Factors(change["A"], change["B"], qkv.scale_of(change)) for module, change in changes.items()}


def kind_of(change: Change) -> str | None:
    """`LoRA`, `DoRA`, `LoKr` or `LoHa`."""
    return keys.kind_of({part: tuple(tensor.shape) for part, tensor in change.items()})


def _require_finite_floats(path: Path, key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise WeightsError(Problem(f"{path}: {key}", f"holds {kind}, no weights", "get the file again"))
    if not tensor.float().isfinite().all():
        todo = "get the file again, or take an earlier save if the run diverged"
        raise WeightsError(Problem(f"{path}: {key}", "holds values that are not finite", todo))
    return tensor.bfloat16() if tensor.dtype.itemsize == 1 else tensor  # which holds all that 8 bits can


def _split(path: Path, module: str, change: Change, ranks: list[int] | None) -> Changes:
    names = keys.split_qkv_names(module)
    if names is None:
        return {module: change}
    try:
        found = qkv.split_qkv(change, ranks)
    except qkv.CannotFuseError as error:
        todo = "ask its maker for one with to_q, to_k and to_v"
        raise WeightsError(Problem(f"{path}: {module}", str(error), todo)) from None
    return {name: one for name, one in zip(names, found, strict=True) if one is not None}


def require_modules(path: Path, lora: Mapping[str, Factors], linears: headers.Sizes) -> None:
    """Require that all of `lora`, read from `path`, fits the model.

    Raises:
        WeightsError: as `headers.require_match`.
    """
    headers.require_match(path, {module: (f.b.shape[0], f.a.shape[1]) for module, f in lora.items()}, linears)


def round_to_dtype(lora: Mapping[str, Factors], dtype: str) -> Lora:
    """`lora` as a file of this precision holds it: the scale in B, both factors rounded."""
    kind = tensorfile.TORCH_DTYPES[dtype]
    return {
        module: Factors(one.a.detach().to(kind), (one.b.detach().float() * one.scale).to(kind), 1.0)
        for module, one in lora.items()
    }


def narrowest_dtype(lora: Mapping[str, Factors]) -> str:
    """`bf16` where a file of it holds `lora` to the bit, otherwise `fp32`."""
    short = round_to_dtype(lora, "bf16")
    is_exact = all(
        torch.equal(short[module].a.float(), one.a.float())
        and torch.equal(short[module].b.float(), one.b.float() * one.scale)
        for module, one in lora.items()
    )
    return "bf16" if is_exact else "fp32"


def export_lora(path: Path, lora: Mapping[str, Factors], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write `lora` in the layout of this module.

    Raises:
        WeightsError: a value is not finite; such a file is never written.
        DiskError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, factors in round_to_dtype(lora, dtype).items():
        prefix = f"diffusion_model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = factors.a
        tensors[f"{prefix}.lora_B.weight"] = factors.b
        tensors[f"{prefix}.alpha"] = torch.tensor(float(factors.rank))
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise WeightsError(
            Problem(str(path), f"{len(bad)} tensors are not finite, such as {bad[0]}", "nothing written")
        )
    tensorfile.save(path, tensors, metadata)
