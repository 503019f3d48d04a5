"""The layouts of LoRA files for Z-Image, and lossless conversion between them.

Each layout has a place for alpha, so no factor is scaled, and none is rounded again. The exceptions are q, k and v
with different alpha / rank, since a fused module has a single alpha.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import format_metadata, keys, qkv
from zimage_train.lora.format_metadata import FormatMetadata
from zimage_train.lora.keys import MAGNITUDE
from zimage_train.lora.lora_file import Changes, kind_of
from zimage_train.lora.metadata import STALE
from zimage_train.lora.qkv import CannotFuseError, Change


@dataclass(frozen=True)
class Layout:
    """The names that a layout gives to the parts of a change, and the kinds of changes that it can hold."""

    reader: str
    """The tools that read it as it is."""
    prefix: str
    suffixes: tuple[str, str]
    """Suffixes of A and B."""
    kinds: tuple[str, ...]
    is_underscored: bool = False
    is_native: bool = False
    """Whether modules have the names of ComfyUI's own model, with q, k and v fused."""
    alpha: str = "tensor"
    """Where alpha is stored: in a `tensor`, in a tensor `unless 1` (alpha / rank is 1), or in the `header`."""
    magnitude: str = "dora_scale"


LAYOUTS: dict[str, Layout] = {
    "comfyui": Layout(
        "ComfyUI, and diffusers since 0.36; DoRA and LoHa: ComfyUI only",
        "diffusion_model.",
        ("lora_A.weight", "lora_B.weight"),
        ("LoRA", "DoRA", "LoKr", "LoHa"),
    ),
    "diffusers": Layout(
        "diffusers and peft; ComfyUI too, if every alpha is its rank",
        "transformer.",
        ("lora_A.weight", "lora_B.weight"),
        ("LoRA", "DoRA"),
        alpha="header",
        magnitude="lora_magnitude_vector",
    ),
    "kohya": Layout(
        "ComfyUI, and tools that know ComfyUI's own names: q, k and v are fused",
        "lora_unet_",
        ("lora_down.weight", "lora_up.weight"),
        ("LoRA", "DoRA", "LoKr", "LoHa"),
        is_underscored=True,
        is_native=True,
    ),
    "musubi": Layout(
        "musubi-tuner, and diffusers; not ComfyUI",
        "lora_unet_",
        ("lora_down.weight", "lora_up.weight"),
        ("LoRA", "LoKr", "LoHa"),
        is_underscored=True,
    ),
    "diffsynth": Layout(
        "DiffSynth-Studio, and ComfyUI",
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
    if layout.alpha == "header":
        header = _alpha_header(path, by_module)
        if header:
            kept[format_metadata.ALPHA_KEY] = header
    # A file without alpha and a file whose alpha is the rank mean the same. Where the layout forces the other form, the
    # metadata remembers the original, so that converting back gives the same file.
    had_alpha = any("alpha" in change for change in changes.values())
    has_alpha = format_metadata.ALPHA_KEY in kept or any(key.endswith(".alpha") for key in tensors)
    original = FormatMetadata(had_alpha if had_alpha != has_alpha else None, ranks)
    return tensors, {**kept, **format_metadata.write_format_metadata(original)}


def _require_kinds(path: Path, changes: Changes, target: str) -> None:
    kinds = {module: str(kind_of(change)) for module, change in changes.items()}
    unsupported = {module: kind for module, kind in kinds.items() if kind not in LAYOUTS[target].kinds}
    if not unsupported and target == "diffusers":
        # peft normalises over inputs, and so has a magnitude per output only.
        for module, change in changes.items():
            if MAGNITUDE in change and change[MAGNITUDE].dim() > 1:
                unsupported[module] = "DoRA with a magnitude for each input"
    if unsupported:
        module, kind = min(unsupported.items())
        able = [name for name, layout in LAYOUTS.items() if kinds[module] in layout.kinds and name != target]
        message = f"{module} is a {kind}, which the layout {target} cannot hold"
        raise WeightsError(Problem(str(path), message, f"--to {' or --to '.join(able)}", "unsupported-layout"))


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
                raise WeightsError(
                    Problem(f"{path}: {module}", message, "--to comfyui, or --to musubi", "unsupported-layout")
                ) from None
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
    if layout.alpha == "header" or (layout.alpha == "unless 1" and qkv.scale_of(change) == 1.0):
        return {}
    # Where alpha is missing, every tool takes the rank, so writing that changes nothing. A LoKr without alpha has a
    # scale of 1 instead, whatever its rank.
    if kind_of(change) == "LoKr":
        return {f"{name}.alpha": change["alpha"]} if "alpha" in change else {}
    return {f"{name}.alpha": change.get("alpha", torch.tensor(float(qkv.rank_of(change))))}


def _alpha_header(path: Path, changes: Changes) -> str | None:
    """Return the header text with alphas for diffusers, or None if each alpha is the rank and there is no DoRA."""
    is_dora = any(MAGNITUDE in change for change in changes.values())
    ranks = {module: qkv.rank_of(change) for module, change in changes.items()}
    alphas = {module: float(change.get("alpha", torch.tensor(ranks[module]))) for module, change in changes.items()}
    if not is_dora and all(alphas[module] == ranks[module] for module in changes):
        return None
    for module, alpha in alphas.items():
        if not 0 < alpha < format_metadata.LARGEST_ALPHA:
            message = f"{module} has an alpha of {alpha:g}, which the layout diffusers cannot store"
            raise WeightsError(
                Problem(
                    str(path), message, "--to comfyui, or lora weight to give it another strength", "unsupported-layout"
                )
            )
    return format_metadata.alphas_to_metadata(ranks, alphas, is_dora)
