"""Which programs load a LoRA file as it is, by what was measured with the programs themselves (torch-free).

The measurements: each diffusers from 0.36 to 0.42.1 (docs/bench/lora_readers.json), ComfyUI 0.29, peft 0.21, and AI
Toolkit, musubi-tuner and DiffSynth-Studio of summer 2026, with LoRAs whose ranks and alphas were equal or differed.
"""

from dataclasses import dataclass

BLOCKS = ("layers.", "noise_refiner.", "context_refiner.")
PATCH_LAYERS = ("all_x_embedder.", "all_final_layer.")
"""Modules whose native names diffusers does not know."""


@dataclass(frozen=True)
class LoraTraits:
    """What decides which program reads a file."""

    kinds: frozenset[str]
    alpha_is_rank: bool
    """Whether every scale is 1."""
    has_alpha_tensors: bool
    scale_in: frozenset[str]
    """Where scales stand: in `tensors`, in the `header`, in the `config` beside the file; empty if nowhere."""
    is_uniform: bool
    """Whether all modules have the same rank."""
    modules: frozenset[str]


def readers_of(layout: str, traits: LoraTraits) -> list[str]:
    """Return the programs that load every module of a file with its change, with the versions that do.

    `layout` is a key of `formats.LAYOUTS`; for any other, nothing is known.
    """
    readers: list[str] = []
    if layout == "peft":
        return ["peft, from its folder"] if traits.scale_in == {"config"} else []
    place = "header" if layout == "diffusers" and not traits.has_alpha_tensors else "tensors"
    if not traits.alpha_is_rank and traits.scale_in != {place}:
        return []  # the scale stands where programs do not look for it in this layout
    if _comfyui_reads(layout, traits):
        readers.append("ComfyUI")
    if since := _diffusers_since(layout, traits):
        readers.append(f"diffusers {since} and newer")
    is_plain = traits.kinds == {"LoRA"}
    is_aitoolkits = layout == "comfyui" or (layout == "diffusers" and not traits.has_alpha_tensors)
    if is_aitoolkits and traits.alpha_is_rank and is_plain:
        readers.append("AI Toolkit")
    if layout == "musubi" and all(module.startswith(BLOCKS) for module in traits.modules):
        readers.append("musubi-tuner")
    if layout in ("comfyui", "diffsynth") and is_plain:
        readers.append("DiffSynth-Studio")
    return readers


def _comfyui_reads(layout: str, traits: LoraTraits) -> bool:
    if layout == "musubi":
        return False
    # It takes alpha from tensors only, and peft's magnitudes not at all.
    has_its_scale = traits.alpha_is_rank or traits.has_alpha_tensors
    return layout != "diffusers" or (has_its_scale and traits.kinds == {"LoRA"})


def _diffusers_since(layout: str, traits: LoraTraits) -> str | None:
    """Return the oldest version of diffusers that loads the whole file right, or None if none does."""
    if layout == "diffusers" and traits.has_alpha_tensors:
        return None  # it takes the file for another layout, and raises
    if traits.kinds == {"LoKr"}:
        return "0.42" if layout == "comfyui" else None
    if "DoRA" in traits.kinds and traits.kinds <= {"LoRA", "DoRA"}:
        return "0.42" if layout == "diffusers" else None
    if traits.kinds != {"LoRA"}:
        return None
    if layout == "kohya":
        return None if any(module.startswith(PATCH_LAYERS) for module in traits.modules) else "0.41"
    if layout == "diffusers" and not traits.alpha_is_rank:
        return "0.36"  # ranks and alphas of all modules stand in the header
    if not traits.is_uniform:
        return "0.40"  # older ones take the rank of one module for all of them
    if layout == "musubi":
        return "0.39"
    if layout == "diffsynth" or (layout == "comfyui" and not traits.has_alpha_tensors):
        return "0.38"  # 0.37 raises where there is no alpha
    return "0.36" if traits.alpha_is_rank else "0.37"
