"""LoRA files: any layout in, one layout out, and the proof that others read it as it was trained.

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
from zimage_train.lora import names
from zimage_train.model.headers import read_header

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Factors:
    """The change of one module: delta = scale * B @ A, with A (rank, in) and B (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """The dense change (out, in) in fp32."""
        return self.scale * (self.b.float() @ self.a.float())


Lora = dict[str, Factors]


def read(path: Path) -> Lora:
    """Read a LoRA file of any known layout with separate q, k and v.

    Raises:
        WeightsError: unreadable, or holds keys that are no LoRA of a Z-Image transformer.
    """
    tensors, metadata = tensorfile.load(path)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        parsed = names.parse_key(key)
        if parsed is None:
            unknown.append(key)
        else:
            parts.setdefault(parsed[0], {})[parsed[1]] = tensor
    broken = [module for module, found in parts.items() if not _fits(found)]
    if unknown or broken or not parts:
        raise WeightsError(Problem(str(path), _complaint(unknown, broken), _advice(unknown)))
    if "lora_adapter_metadata" in metadata and not any("alpha" in found for found in parts.values()):
        parts = _with_metadata_alpha(path, parts, metadata["lora_adapter_metadata"])
    return {module: _factors(found) for module, found in parts.items()}


def _fits(found: dict[str, Tensor]) -> bool:
    a, b = found.get("A"), found.get("B")
    return a is not None and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]


def _factors(found: dict[str, Tensor]) -> Factors:
    rank = found["A"].shape[0]
    alpha = float(found["alpha"]) if "alpha" in found else float(rank)
    return Factors(found["A"], found["B"], alpha / rank)


def _with_metadata_alpha(path: Path, parts: dict[str, dict[str, Tensor]], text: str) -> dict[str, dict[str, Tensor]]:
    """diffusers' `save_lora_weights` keeps alpha in the header only; without it the strength would be wrong."""
    try:
        alpha = json.loads(text).get("transformer.lora_alpha")
    except (ValueError, AttributeError):
        alpha = None
    if not isinstance(alpha, int | float):
        return parts
    return {module: found | {"alpha": torch.tensor(float(alpha))} for module, found in parts.items()}


def _complaint(unknown: list[str], broken: list[str]) -> str:
    if unknown:
        return f"has {len(unknown)} keys that are not of a Z-Image LoRA, such as {sorted(unknown)[0]}"
    if broken:
        return f"has {len(broken)} modules whose A and B are missing or do not fit, such as {sorted(broken)[0]}"
    return "holds no LoRA"


def _advice(unknown: list[str]) -> str:
    if any("lora_unet_" in key or "qkv" in key or "lokr" in key for key in unknown):
        return "convert it to the diffusers layout first"
    return "is it a LoRA of Z-Image?"


def require_modules(path: Path, lora: Mapping[str, Factors], linears: Mapping[str, tuple[int, int]]) -> None:
    """Require that every module of `lora` is a linear of the model with the right shape.

    Raises:
        WeightsError: names what matches nothing; a LoRA that is applied in part would be worse than none.
    """
    shapes = {module: (f.b.shape[0], f.a.shape[1]) for module, f in lora.items()}
    _require(path, shapes, linears)


def require_header(path: Path, linears: Mapping[str, tuple[int, int]]) -> int:
    """Like `require_modules`, from the header alone; returns the number of modules.

    Raises:
        WeightsError: as `require_modules`.
    """
    shapes: dict[str, list[int]] = {}
    for key, info in read_header(path).tensors.items():
        parsed = names.parse_key(key)
        if parsed is None:
            raise WeightsError(Problem(str(path), _complaint([key], []), _advice([key])))
        side = {"A": 1, "B": 0}.get(parsed[1])
        if side is not None and len(info.shape) == 2:
            shapes.setdefault(parsed[0], [0, 0])[side] = info.shape[side]
    _require(path, {module: (out, in_) for module, (out, in_) in shapes.items()}, linears)
    return len(shapes)


def _require(path: Path, found: Mapping[str, tuple[int, int]], linears: Mapping[str, tuple[int, int]]) -> None:
    matched = [module for module, shape in found.items() if linears.get(module) == shape]
    lost = sorted(found.keys() - set(matched))
    if lost or not matched:
        first = lost[0] if lost else "none"
        known = linears.get(first)
        why = "the model has no such module" if known is None else f"{found[first]} there, {known} in the model"
        what = f"matched {len(matched)}/{len(found)} modules; not matched: {first} ({why})"
        raise WeightsError(Problem(str(path), what, "it belongs to another model; nothing was merged"))


def export(path: Path, lora: Mapping[str, Factors], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write `lora` in the layout of this module.

    Raises:
        WeightsError: a value is not finite; such a file is never written.
        DiskError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, factors in lora.items():
        prefix = f"diffusion_model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = factors.a.detach().to(DTYPES[dtype])
        tensors[f"{prefix}.lora_B.weight"] = (factors.b.detach().float() * factors.scale).to(DTYPES[dtype])
        tensors[f"{prefix}.alpha"] = torch.tensor(float(factors.rank))
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise WeightsError(
            Problem(str(path), f"{len(bad)} tensors are not finite, such as {bad[0]}", "nothing written")
        )
    tensorfile.save(path, tensors, metadata)


def distance(one: Factors, other: Factors) -> float:
    """||delta - delta'|| / ||delta|| (Frobenius), through the ranks alone, in fp64."""
    b = torch.cat([one.b.double() * one.scale, -other.b.double().to(one.b.device) * other.scale], dim=1)
    a = torch.cat([one.a.double(), other.a.double().to(one.a.device)], dim=0)
    difference = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt()
    norm = (((one.b.double().T @ one.b.double()) * (one.a.double() @ one.a.double().T)).sum()).sqrt() * one.scale
    return float(difference / norm) if norm > 0 else float(difference)


TOLERANCE = {"bf16": 2**-7, "fp32": 1e-6}
"""Largest relative error of a module's delta that rounding to the file's type can explain."""


def verify(path: Path, trained: Mapping[str, Factors], dtype: str, linears: Mapping[str, tuple[int, int]]) -> float:
    """Read `path` back as diffusers and as ComfyUI would, and compare with what was trained.

    Returns the largest relative error of a module's delta.

    Raises:
        WeightsError: a loader would leave out a module, or load another change than the trained one.
    """
    readings = {"diffusers": _as_diffusers(path), "ComfyUI": _as_comfyui(path, linears)}
    worst = 0.0
    for loader, found in readings.items():
        if found.keys() != trained.keys():
            what = f"{loader} would load {len(found)} of {len(trained)} modules"
            raise WeightsError(Problem(str(path), what, "please report this"))
        for module, factors in trained.items():
            error = distance(factors, found[module])
            worst = max(worst, error)
            if error > TOLERANCE[dtype]:
                what = f"{loader} would load {module} with a relative error of {error:.1e}"
                raise WeightsError(Problem(str(path), what, "please report this"))
    return worst


def _as_diffusers(path: Path) -> Lora:
    """Through diffusers' own loader, which folds alpha into the factors."""
    from diffusers.loaders import ZImageLoraLoaderMixin

    state = ZImageLoraLoaderMixin.lora_state_dict(tensorfile.load(path)[0])
    a_suffix, b_suffix = ".lora_A.weight", ".lora_B.weight"
    modules = [key.removesuffix(a_suffix) for key in state if key.endswith(a_suffix)]
    return {
        module.removeprefix("transformer."): Factors(state[module + a_suffix], state[module + b_suffix], 1.0)
        for module in modules
    }


def _as_comfyui(path: Path, linears: Mapping[str, tuple[int, int]]) -> Lora:
    """As ComfyUI maps keys: the strength is alpha / rank, alpha only from a `.alpha` tensor."""
    tensors = tensorfile.load(path)[0]
    found: Lora = {}
    for name in names.comfyui_targets(linears):
        if f"{name}.lora_A.weight" in tensors and f"{name}.lora_B.weight" in tensors:
            a, b = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
            alpha = tensors.pop(f"{name}.alpha", torch.tensor(float(a.shape[0])))
            found[name.removeprefix("diffusion_model.")] = Factors(a, b, float(alpha) / a.shape[0])
    if tensors:
        what = f"ComfyUI would report {len(tensors)} keys as not loaded, such as {sorted(tensors)[0]}"
        raise WeightsError(Problem(str(path), what, "please report this"))
    return found
