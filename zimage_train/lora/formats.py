"""The layouts of LoRA files for Z-Image, and lossless conversion between them.

Each layout has a place for alpha, so no factor is scaled, and none is rounded again. The exceptions are q, k and v
with different alpha / rank, since a fused module has a single alpha.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import adapter_config, format_metadata, keys, qkv
from zimage_train.lora.format_metadata import FormatMetadata
from zimage_train.lora.keys import MAGNITUDE
from zimage_train.lora.lora_file import Changes, kind_of
from zimage_train.lora.metadata import STALE
from zimage_train.lora.qkv import CannotFuseError, Change


@dataclass(frozen=True)
class Layout:
    """The names that a layout gives to the parts of a change, and the kinds of changes that it can hold."""

    prefix: str
    suffixes: tuple[str, str]
    """Suffixes of A and B."""
    kinds: tuple[str, ...]
    is_underscored: bool = False
    is_native: bool = False
    """Whether modules have the names of ComfyUI's own model, with q, k and v fused."""
    alpha: str = "tensor"
    """Where alpha is stored: in a `tensor`, in a tensor `unless 1` (alpha / rank is 1), in the `header`, or in the
    `config` beside the file."""
    magnitude: str = "dora_scale"


LAYOUTS: dict[str, Layout] = {
    "comfyui": Layout(
        "diffusion_model.",
        ("lora_A.weight", "lora_B.weight"),
        ("LoRA", "DoRA", "LoKr", "LoHa", "OFT"),
    ),
    "diffusers": Layout(
        "transformer.",
        ("lora_A.weight", "lora_B.weight"),
        ("LoRA", "DoRA"),
        alpha="header",
        magnitude="lora_magnitude_vector",
    ),
    "kohya": Layout(
        "lora_unet_",
        ("lora_down.weight", "lora_up.weight"),
        ("LoRA", "DoRA", "LoKr", "LoHa", "OFT"),
        is_underscored=True,
        is_native=True,
    ),
    "musubi": Layout(
        "lora_unet_",
        ("lora_down.weight", "lora_up.weight"),
        ("LoRA", "LoKr", "LoHa", "OFT"),
        is_underscored=True,
    ),
    "peft": Layout(
        "base_model.model.",
        ("lora_A.weight", "lora_B.weight"),
        ("LoRA", "DoRA"),
        alpha="config",
        magnitude="lora_magnitude_vector.weight",
    ),
    "diffsynth": Layout(
        "",
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("LoRA",),
        alpha="unless 1",
    ),
}


def to_layout(
    path: Path, changes: Changes, metadata: Mapping[str, str], target: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of `changes`, which were read from `path`, in the layout `target`.

    Raises:
        WeightsError: the layout cannot hold a change; the hint names layouts that can.
    """
    layout = LAYOUTS[target]
    _require_kinds(path, changes, target)
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    by_module, ranks = _fuse_all(path, changes, target) if layout.is_native else (changes, {})
    tensors: dict[str, Tensor] = {}
    for module, change in by_module.items():
        name = keys.native_name(module) if layout.is_native else module
        if layout.is_underscored:
            name = keys.underscored(name)
        name = layout.prefix + name
        for part, tensor in change.items():
            if part != "alpha":
                tensors[f"{name}.{_suffix(part, layout)}"] = _stored_tensor(part, tensor, layout)
        tensors |= _alpha_tensor(name, change, layout)
    config = _config_of(path, by_module, target) if layout.alpha in ("header", "config") else None
    if layout.alpha == "header" and config is not None:
        kept[adapter_config.HEADER_KEY] = adapter_config.header_text(config)
    # A file without alpha and a file whose alpha is the rank mean the same. Where the layout forces the other form, the
    # metadata remembers the original, so that converting back gives the same file.
    had_alpha = any("alpha" in change for change in changes.values())
    has_alpha = layout.alpha == "config" or config is not None or any(key.endswith(".alpha") for key in tensors)
    original = FormatMetadata(had_alpha if had_alpha != has_alpha else None, ranks)
    return tensors, {**kept, **format_metadata.write_format_metadata(original)}


def _require_kinds(path: Path, changes: Changes, target: str) -> None:
    unsupported = {module: what for module, change in changes.items() if (what := _not_held(change, target))}
    if unsupported:
        module, what = min(unsupported.items())
        message = f"{module} is a {what}, which the layout {target} cannot hold"
        raise WeightsError(Problem(str(path), message, _other_layouts(changes, target), "unsupported-layout"))


def _not_held(change: Change, layout: str) -> str | None:
    """Return what `change` is if the layout cannot hold it, or None if it can."""
    kind = str(kind_of(change))
    if kind not in LAYOUTS[layout].kinds:
        return kind
    # peft normalises over inputs, and so has a magnitude per output only.
    if layout in ("diffusers", "peft") and MAGNITUDE in change and change[MAGNITUDE].dim() > 1:
        return "DoRA with a magnitude for each input"
    return None


def _other_layouts(changes: Changes, target: str) -> str:
    """Return the hint that names the layouts that can hold all `changes`, with q, k and v apart."""
    able: list[str] = []
    for name, layout in LAYOUTS.items():
        if name != target and not layout.is_native and not any(_not_held(one, name) for one in changes.values()):
            able.append(name)
    return f"--to {' or --to '.join(able)}"


def _fuse_all(path: Path, changes: Changes, target: str) -> tuple[Changes, dict[str, list[int]]]:
    """Return `changes` with q, k and v of each block fused, and the ranks of those that their factors do not show."""
    fused: Changes = {}
    ranks: dict[str, list[int]] = {}
    for module, change in changes.items():
        fused_name = keys.fused_name(module)
        if fused_name is None:
            fused[module] = change
        elif fused_name not in fused:
            names = keys.split_qkv_names(fused_name)
            assert names is not None
            thirds = [changes.get(name) for name in names]
            try:
                fused[fused_name] = qkv.fuse_qkv(thirds)
                # Split again at once, to see whether a reader of the file would find the same ranks.
                restored = qkv.split_qkv(fused[fused_name])
            except CannotFuseError as error:
                message = f"{error}; the layout {target} has q, k and v as a single module"
                hint = _other_layouts(changes, target)
                raise WeightsError(Problem(f"{path}: {module}", message, hint, "unsupported-layout")) from None
            widths = _ranks_or_zero(thirds)
            if widths != _ranks_or_zero(restored):
                ranks[fused_name] = widths
    return fused, ranks


def _ranks_or_zero(changes: Sequence[Change | None]) -> list[int]:
    return [qkv.rank_of(change) if change else 0 for change in changes]


def _suffix(part: str, layout: Layout) -> str:
    return {"A": layout.suffixes[0], "B": layout.suffixes[1], MAGNITUDE: layout.magnitude}.get(part, part)


def _stored_tensor(part: str, tensor: Tensor, layout: Layout) -> Tensor:
    """Return `tensor` in the shape of the layout: kohya's dora_scale is (out, 1), and peft's magnitude (out,)."""
    if part == MAGNITUDE and layout.magnitude == "dora_scale" and tensor.dim() == 1:
        return tensor.reshape(-1, 1)
    return tensor


def _alpha_tensor(name: str, change: Change, layout: Layout) -> dict[str, Tensor]:
    """Return the alpha tensor by its key; empty if the layout stores none."""
    if layout.alpha in ("header", "config") or (layout.alpha == "unless 1" and qkv.scale_of(change) == 1.0):
        return {}
    # Where alpha is missing, every tool takes the rank, so writing that changes nothing. A LoKr without alpha has a
    # scale of 1 instead, whatever its rank, and that of an OFT is no scale.
    if kind_of(change) in ("LoKr", "OFT"):
        return {f"{name}.alpha": change["alpha"]} if "alpha" in change else {}
    return {f"{name}.alpha": change.get("alpha", torch.tensor(float(qkv.rank_of(change))))}


def peft_config(path: Path, changes: Changes) -> dict[str, Any]:
    """Return the adapter_config.json of `changes`, which were read from `path`.

    Raises:
        WeightsError: an alpha is too large, or not positive.
    """
    ranks = {module: qkv.rank_of(change) for module, change in changes.items()}
    config = _config_of(path, changes, "peft") or adapter_config.make_config(ranks, ranks, is_dora=False)
    return {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none", **config}


def _config_of(path: Path, changes: Changes, target: str) -> dict[str, Any] | None:
    """Return peft's description of the changes, or None if each alpha is the rank and there is no DoRA."""
    is_dora = any(MAGNITUDE in change for change in changes.values())
    ranks = {module: qkv.rank_of(change) for module, change in changes.items()}
    alphas = {module: float(change.get("alpha", torch.tensor(ranks[module]))) for module, change in changes.items()}
    if not is_dora and all(alphas[module] == ranks[module] for module in changes):
        return None
    for module, alpha in alphas.items():
        if not 0 < alpha < adapter_config.LARGEST_ALPHA:
            message = f"{module} has an alpha of {alpha:g}, which the layout {target} cannot store"
            raise WeightsError(
                Problem(
                    str(path), message, "--to comfyui, or lora weight to give it another strength", "unsupported-layout"
                )
            )
    return adapter_config.make_config(ranks, alphas, is_dora)
