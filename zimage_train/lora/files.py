"""LoRA files: any layout in, one layout out.

The layout written is the only one that every diffusers since 0.36 and ComfyUI read alike:
`diffusion_model.<module>.lora_A/lora_B.weight`, and `.alpha` equal to the rank with the scale folded into B.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage_train import tensorfile
from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import headers, names
from zimage_train.tensors import Dense, Down, Up


@dataclass(frozen=True)
class Factors:
    """The change of one module: delta = scale * B @ A, with A (rank, in) and B (out, rank)."""

    a: Down
    b: Up
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Dense:
        """The dense change (out, in) in fp32."""
        return self.scale * (self.b.float() @ self.a.float())


Lora = dict[str, Factors]
LARGEST_ALPHA = 1e6


def read(path: Path) -> Lora:
    """Read a LoRA file of any known layout with separate q, k and v.

    Raises:
        WeightsError: unreadable, not finite, or holds keys that are no LoRA of a Z-Image transformer.
    """
    modules = headers.read_sizes(path)
    tensors, metadata = tensorfile.load(path)
    parts: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
    for key, tensor in tensors.items():
        if (parsed := names.parse_key(key)) is not None:
            if not tensor.is_floating_point() and parsed[1] != "alpha":
                kind = str(tensor.dtype).removeprefix("torch.")
                raise WeightsError(Problem(f"{path}: {key}", f"holds {kind}, no weights", "get the file again"))
            if not tensor.float().isfinite().all():
                raise WeightsError(Problem(f"{path}: {key}", "holds values that are not finite", "get the file again"))
            parts[parsed[0]][parsed[1]] = tensor
    if "lora_adapter_metadata" in metadata and not any("alpha" in found for found in parts.values()):
        parts = _with_metadata_alpha(path, parts, metadata["lora_adapter_metadata"])
    return {module: _factors(found) for module, found in parts.items()}


def _factors(found: dict[str, Tensor]) -> Factors:
    rank = found["A"].shape[0]
    alpha = float(found["alpha"]) if "alpha" in found else float(rank)
    return Factors(found["A"], found["B"], alpha / rank)


def _with_metadata_alpha(path: Path, parts: dict[str, dict[str, Tensor]], text: str) -> dict[str, dict[str, Tensor]]:
    """diffusers' `save_lora_weights` keeps alpha in the header only; without it the strength would be wrong."""
    try:
        found = json.loads(text)
        alpha, patterns = found.get("transformer.lora_alpha"), found.get("transformer.alpha_pattern")
    except (ValueError, AttributeError, RecursionError):
        return parts
    if patterns:
        what = "its metadata gives single modules an alpha of their own, which this version does not read"
        raise WeightsError(Problem(str(path), what, "save it with one alpha, or with .alpha tensors"))
    if alpha is None:
        return parts
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < LARGEST_ALPHA:
        what = f"its metadata says that alpha is {str(alpha)[:20]}"
        raise WeightsError(Problem(str(path), what, "save it with the alpha that it was trained with"))
    return {module: found | {"alpha": torch.tensor(float(alpha))} for module, found in parts.items()}


def require_modules(path: Path, lora: Mapping[str, Factors], linears: headers.Sizes) -> None:
    """Require that all of `lora`, read from `path`, fits the model.

    Raises:
        WeightsError: as `headers.require_match`.
    """
    headers.require_match(path, {module: (f.b.shape[0], f.a.shape[1]) for module, f in lora.items()}, linears)


def export(path: Path, lora: Mapping[str, Factors], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write `lora` in the layout of this module.

    Raises:
        WeightsError: a value is not finite; such a file is never written.
        DiskError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, factors in lora.items():
        prefix = f"diffusion_model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = factors.a.detach().to(tensorfile.DTYPES[dtype])
        tensors[f"{prefix}.lora_B.weight"] = (factors.b.detach().float() * factors.scale).to(tensorfile.DTYPES[dtype])
        tensors[f"{prefix}.alpha"] = torch.tensor(float(factors.rank))
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise WeightsError(
            Problem(str(path), f"{len(bad)} tensors are not finite, such as {bad[0]}", "nothing written")
        )
    tensorfile.save(path, tensors, metadata)
