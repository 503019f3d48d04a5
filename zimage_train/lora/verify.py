"""How diffusers and ComfyUI read a LoRA file, and the proof that both read what was meant."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError, ZImageTrainError, collect_errors
from zimage_train.io import tensorfile
from zimage_train.lora import format_metadata, headers, keys, qkv
from zimage_train.lora.lora_file import Factors, Lora
from zimage_train.lora.qkv import Change

COMFYUI_PARTS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
REPORT_HINT = "zimage-train lora convert FILE --to comfyui"
TOLERANCE = {"bf16": 2**-7, "fp32": 1e-6}
"""Largest relative error of a module's delta that rounding to the file's type can explain."""


def verify_export(path: Path, trained: Mapping[str, Factors], dtype: str, linears: headers.Sizes) -> float:
    """Read `path` back as diffusers and as ComfyUI would, and compare with what was trained.

    Returns the largest relative error of a module's delta.

    Raises:
        WeightsError: a loader would leave out a module, or load another change than the trained one.
    """
    worst = 0.0
    errors: list[ZImageTrainError] = []
    with collect_errors(errors):
        worst = _compare(path, "diffusers", as_diffusers(path), trained, dtype)
    with collect_errors(errors):
        worst = max(worst, _compare(path, "ComfyUI", as_comfyui(path, linears), trained, dtype))
    if errors:
        raise WeightsError(*(problem for error in errors for problem in error.problems))
    return worst


def _compare(path: Path, loader: str, found: Lora, trained: Mapping[str, Factors], dtype: str) -> float:
    todo = REPORT_HINT
    found = {module: one for module, one in found.items() if module in trained or one.b.any()}
    if found.keys() != trained.keys():
        what = f"{loader} would load {len(found.keys() & trained.keys())} of {len(trained)} modules"
        raise WeightsError(Problem(str(path), what, todo))
    errors = {module: distance(factors, found[module]) for module, factors in trained.items()}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > TOLERANCE[dtype]:
        what = f"{loader} would load {worst} with a relative error of {errors[worst]:.1e}"
        raise WeightsError(Problem(str(path), what, todo))
    return errors[worst]


def distance(one: Factors, other: Factors) -> float:
    """||delta - delta'|| / ||delta|| (Frobenius)."""
    norm = difference(one, Factors(one.a[:0], one.b[:, :0], 1.0))
    return difference(one, other) / norm if norm > 0 else difference(one, other)


def difference(one: Factors, other: Factors) -> float:
    """||delta - delta'|| (Frobenius), through the ranks alone, in fp64."""
    b = torch.cat([one.b.double() * one.scale, -other.b.double().to(one.b.device) * other.scale], dim=1)
    a = torch.cat([one.a.double(), other.a.double().to(one.a.device)], dim=0)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())


def as_diffusers(path: Path) -> Lora:
    """Through diffusers' own loader, which folds alpha into the factors.

    Raises:
        WeightsError: it refuses the file.
    """
    from diffusers.loaders import ZImageLoraLoaderMixin

    tensors, metadata = tensorfile.load(path)
    alpha_of = format_metadata.alphas_from_metadata(path, metadata.get(format_metadata.ALPHA_KEY))
    try:
        state = cast(dict[str, Tensor], ZImageLoraLoaderMixin.lora_state_dict(tensors))
    except Exception as error:  # noqa: BLE001  its conversions raise whatever an odd layout makes them run into
        what = f"diffusers would not load it ({str(error)[:100]})"
        raise WeightsError(Problem(str(path), what, REPORT_HINT)) from None
    a_suffix, b_suffix = ".lora_A.weight", ".lora_B.weight"
    modules = [key.removesuffix(a_suffix) for key in state if key.endswith(a_suffix)]
    found: Lora = {}
    for name in modules:
        module, a = name.removeprefix("transformer."), state[name + a_suffix]
        scale = alpha_of(module, a.shape[0]) / a.shape[0] if alpha_of else 1.0
        found[module] = Factors(a, state[name + b_suffix], scale)
    return found


def as_comfyui(path: Path, linears: headers.Sizes) -> Lora:
    """As ComfyUI maps keys: the strength is alpha / rank, alpha only from a `.alpha` tensor.

    A transcription of `load_lora` and of `model_lora_keys_unet`; see `keys.comfyui_targets`.

    Raises:
        WeightsError: it would leave out a tensor.
    """
    tensors = tensorfile.load(path)[0]
    found: Lora = {}
    for name, module in keys.comfyui_targets(linears).items():
        for a_suffix, b_suffix in COMFYUI_PARTS:
            if name + a_suffix in tensors and name + b_suffix in tensors:
                change = {"A": tensors.pop(name + a_suffix), "B": tensors.pop(name + b_suffix)}
                if f"{name}.alpha" in tensors:
                    change["alpha"] = tensors.pop(f"{name}.alpha")
                found |= _unfused(module, change)
    if tensors:
        what = f"ComfyUI would report {len(tensors)} keys as not loaded, such as {sorted(tensors)[0]}"
        raise WeightsError(Problem(str(path), what, REPORT_HINT))
    return found


def _unfused(module: str, change: Change) -> Lora:
    split = keys.split_qkv_names(module)
    if split is None:
        return {module: Factors(change["A"], change["B"], qkv.scale_of(change))}
    thirds = change["B"].chunk(3)
    return {name: Factors(change["A"], b, qkv.scale_of(change)) for name, b in zip(split, thirds, strict=True)}
