"""The layouts that LoRA files of Z-Image come in, written so that the way there and back changes no bit.

Nothing is scaled: each layout has a place for alpha, so that no factor has to be rounded again. There is one exception:
q, k and v that differ in alpha / rank have room for one where they are fused.
"""

from collections.abc import Mapping
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
    """How a layout spells a change, and which kinds it can hold."""

    reader: str
    """Who reads it as it is."""
    prefix: str
    suffixes: tuple[str, str]
    """Of A and B."""
    kinds: tuple[str, ...]
    is_underscored: bool = False
    is_native: bool = False
    """With the names of ComfyUI's own model, q, k and v fused."""
    alpha: str = "tensor"
    """Where it stands: in a `tensor`; in one `unless 1`, for those who know no alpha; or in the `header`."""
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
    """The tensors and the metadata of `changes`, which were read from `path`, in the layout `target`.

    Raises:
        WeightsError: says what the layout cannot hold, and which one can.
    """
    layout = LAYOUTS[target]
    _require_kinds(path, changes, target)
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    named, ranks = _fused(path, changes, target) if layout.is_native else (changes, {})
    tensors: dict[str, Tensor] = {}
    for module, change in named.items():
        native = keys.native_name(module) if layout.is_native else module
        name = layout.prefix + (keys.underscored(native) if layout.is_underscored else native)
        factors = {part: tensor for part, tensor in change.items() if part != "alpha"}
        tensors |= {f"{name}.{_suffix(part, layout)}": _stored(part, one, layout) for part, one in factors.items()}
        tensors |= _alpha(name, change, layout)
    if layout.alpha == "header" and (header := _header(path, named)):
        kept[format_metadata.ALPHA_KEY] = header
    had_alpha = any("alpha" in change for change in changes.values())
    says_alpha = format_metadata.ALPHA_KEY in kept or any(key.endswith(".alpha") for key in tensors)
    return tensors, kept | {
        **format_metadata.write_format_metadata(FormatMetadata(had_alpha if had_alpha != says_alpha else None, ranks))
    }


def _require_kinds(path: Path, changes: Changes, target: str) -> None:
    kinds = {module: str(kind_of(change)) for module, change in changes.items()}
    lost = {module: kind for module, kind in kinds.items() if kind not in LAYOUTS[target].kinds}
    is_by_input = [m for m, c in changes.items() if MAGNITUDE in c and c[MAGNITUDE].dim() > 1]
    if not lost and is_by_input and target == "diffusers":
        lost = dict.fromkeys(is_by_input, "DoRA with a magnitude for each input")
    if lost:
        module, kind = min(lost.items())
        able = [name for name, layout in LAYOUTS.items() if kinds[module] in layout.kinds and name != target]
        what = f"{module} is a {kind}, for which the layout {target} has no place"
        raise WeightsError(Problem(str(path), what, f"--to {' or --to '.join(able)}"))


def _fused(path: Path, changes: Changes, target: str) -> tuple[Changes, dict[str, list[int]]]:
    """`changes` with q, k and v of each block as one; and the ranks of those whose factors would not tell."""
    found: Changes = {}
    ranks: dict[str, list[int]] = {}
    for module, change in changes.items():
        whole = keys.fused_name(module)
        if whole is None:
            found[module] = change
        elif whole not in found:
            split = keys.split_qkv_names(whole)
            assert split is not None
            three = [changes.get(name) for name in split]
            try:
                found[whole] = qkv.fuse_qkv(three)
                again = qkv.split_qkv(found[whole])
            except CannotFuseError as error:
                what = f"{error}; the layout {target} knows only the three together"
                raise WeightsError(Problem(f"{path}: {module}", what, "--to comfyui, or --to musubi")) from None
            widths = [qkv.rank_of(one) if one else 0 for one in three]
            if widths != [qkv.rank_of(one) if one else 0 for one in again]:
                ranks[whole] = widths
    return found, ranks


def _suffix(part: str, layout: Layout) -> str:
    return {"A": layout.suffixes[0], "B": layout.suffixes[1], MAGNITUDE: layout.magnitude}.get(part, part)


def _stored(part: str, tensor: Tensor, layout: Layout) -> Tensor:
    if part == MAGNITUDE and layout.magnitude == "dora_scale" and tensor.dim() == 1:
        return tensor.reshape(-1, 1)
    return tensor


def _alpha(name: str, change: Change, layout: Layout) -> dict[str, Tensor]:
    """The tensor of alpha, which every tool takes for the rank where it is missing; a LoKr has its own rules for it."""
    if layout.alpha == "header" or (layout.alpha == "unless 1" and qkv.scale_of(change) == 1.0):
        return {}
    if kind_of(change) == "LoKr":
        return {f"{name}.alpha": change["alpha"]} if "alpha" in change else {}
    return {f"{name}.alpha": change.get("alpha", torch.tensor(float(qkv.rank_of(change))))}


def _header(path: Path, changes: Changes) -> str | None:
    """What diffusers has to be told, if there is anything: any alpha that is not its rank, and that it is a DoRA."""
    is_dora = any(MAGNITUDE in change for change in changes.values())
    ranks = {module: qkv.rank_of(change) for module, change in changes.items()}
    found = {module: float(change.get("alpha", torch.tensor(ranks[module]))) for module, change in changes.items()}
    if not is_dora and all(found[module] == ranks[module] for module in changes):
        return None
    if wrong := [module for module, alpha in found.items() if not 0 < alpha < format_metadata.LARGEST_ALPHA]:
        what = f"{wrong[0]} has an alpha of {found[wrong[0]]:g}, which the layout diffusers cannot say"
        raise WeightsError(Problem(str(path), what, "--to comfyui, or lora weight to give it another strength"))
    return format_metadata.alphas_to_metadata(ranks, found, is_dora)
