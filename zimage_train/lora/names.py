"""Module groups of the transformer, and the key layouts in which LoRA files name them (torch-free)."""

import re
from collections.abc import Iterable

from zimage_train.errors import ConfigError, Problem

_ATTENTION = r"attention\.(?:to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"feed_forward\.w[123]"

GROUPS = {
    "attention": re.compile(rf"layers\.\d+\.{_ATTENTION}"),
    "feed_forward": re.compile(rf"layers\.\d+\.{_FEED_FORWARD}"),
    "adaln": re.compile(r"layers\.\d+\.adaLN_modulation\.0"),
    "refiners": re.compile(rf"(?:noise|context)_refiner\.\d+\.(?:{_ATTENTION}|{_FEED_FORWARD})"),
}
"""Groups of linear modules by full name; refiners are those of both refiners, without adaLN."""

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}


def group_of(module: str) -> str:
    """The group of a module, or `other`."""
    return next((name for name, pattern in GROUPS.items() if pattern.fullmatch(module)), "other")


def count_by_group(modules: Iterable[str]) -> dict[str, int]:
    """How many of `modules` belong to each group; groups without any are left out."""
    counts: dict[str, int] = {}
    for module in modules:
        counts[group_of(module)] = counts.get(group_of(module), 0) + 1
    return counts


def select(targets: list[str] | str, linears: Iterable[str]) -> list[str]:
    """The linear modules that `targets` names: groups, or one regular expression of whole names.

    Raises:
        ConfigError: nothing matches.
    """
    patterns = [re.compile(targets)] if isinstance(targets, str) else [GROUPS[name] for name in targets]
    names = list(linears)
    chosen = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
    if not chosen:
        what = f"{targets!r} matches none of the {len(names)} linear modules"
        todo = "names look like layers.0.attention.to_q; the whole name must match"
        if isinstance(targets, str) and targets in GROUPS:
            todo = f"text is a regular expression; the group is a list: [{targets}]"
        raise ConfigError(Problem("lora.targets", what, todo))
    return chosen


def parse_key(key: str) -> tuple[str, str] | None:
    """(module, part) of a key of a LoRA file, part being A, B or alpha; None for a key of another kind."""
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            module = key.removesuffix(suffix)
            for prefix in PREFIXES:
                module = module.removeprefix(prefix)
            return module, part
    return None


COMPONENTS = ("to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3", "adaLN")
"""The linear modules of a block, in the order in which data meets them."""


def block_and_component(module: str) -> tuple[str, str]:
    """(`layers.0`, `to_q`) of `layers.0.attention.to_q`; of a module outside the blocks its own name twice over."""
    match = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)", module)
    if match is None:
        return module, "other"
    return match[1], next((part for part in COMPONENTS if part in match[2]), match[2])


def block_order(block: str) -> tuple[str, int]:
    """A key that sorts `layers.2` before `layers.10`."""
    name, _, number = block.rpartition(".")
    return (name, int(number)) if number.isdecimal() else (block, 0)


def layout_of(keys: Iterable[str]) -> str:
    """The layout that a LoRA's keys have, by who writes it."""
    keys = sorted(keys)
    first = keys[0]
    parts = "lora_down/lora_up" if any(".lora_down." in key for key in keys) else "lora_A/lora_B"
    if first.startswith("lora_unet_"):
        return f"kohya (lora_unet_*.{parts})"
    if ".default." in first:
        return f"DiffSynth ({parts}.default)"
    prefix = next((prefix for prefix in PREFIXES if first.startswith(prefix)), "")
    kinds = {
        "diffusion_model.": "ComfyUI and AI Toolkit",
        "transformer.": "diffusers",
        "base_model.model.": "peft",
        "": "bare",
    }
    return f"{kinds[prefix]} ({prefix}*.{parts})"


def comfyui_targets(linears: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """LoRA module name -> (weight in ComfyUI's own Z-Image model, third of a fused weight or None).

    Transcribes what ComfyUI's `model_lora_keys_unet` accepts for Lumina2 models under the `diffusion_model.` prefix
    (q, k and v are rows of one fused weight there).
    """
    targets: dict[str, tuple[str, int | None]] = {}
    for name in linears:
        native, third = name, None
        for index, part in enumerate(("to_q", "to_k", "to_v")):
            if name.endswith(f".attention.{part}"):
                native, third = name.removesuffix(part) + "qkv", index
        native = native.replace(".attention.to_out.0", ".attention.out")
        native = native.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        targets[f"diffusion_model.{name}"] = (f"diffusion_model.{native}.weight", third)
    return targets
