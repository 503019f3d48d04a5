"""How LoRA files spell the modules of Z-Image and the parts of a change, and what makes a change whole (torch-free).

A key is a prefix, a module and a suffix. Two things differ from file to file beside the prefix: whether dots in the
module became underscores, and whether it has diffusers' name or that of ComfyUI's own model, where q, k and v are rows
of one `attention.qkv`. Within this package a module has diffusers' name, or that of the fused one.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from zimage_train.models import native_keys
from zimage_train.models.native_keys import FUSED, THIRDS

FactorShape = tuple[int, ...]
FoundParts = Mapping[str, FactorShape]
"""Part -> shape, of one module."""

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes after which dots are underscores."""

LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
MAGNITUDE = "magnitude"
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_A": "A",
    ".lora_B": "B",
    ".alpha": "alpha",
    ".dora_scale": MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
    **{f".{part}": part for part in (*LOKR, *LOHA)},
}

_IN_A_BLOCK = (*THIRDS, FUSED, "attention.to_out.0", *(f"feed_forward.w{i}" for i in (1, 2, 3)), "adaLN_modulation.0")
_OUTSIDE = (
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
)
_OLD = {f"attention.to.{part}": f"attention.to_{part}" for part in "qkv"} | {"attention.to_out": "attention.to_out.0"}
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)[._](\d{1,4})[._](.+)")


def parse_key(key: str) -> tuple[str, str] | None:
    """(module, part) of a key of a LoRA file; None for a key that is of no linear module of Z-Image."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name, is_underscored = key.removesuffix(suffix), False
    for prefix in (*PREFIXES, *UNDERSCORED):
        is_underscored = is_underscored or (prefix in UNDERSCORED and name.startswith(prefix))
        name = name.removeprefix(prefix)
    module = _known(name, underscored if is_underscored else str)
    return None if module is None else (module, SUFFIXES[suffix])


def native_name(module: str) -> str:
    """What ComfyUI's own model calls `module`; q, k and v have none of their own there."""
    return native_keys.to_native(module)[0] if fused_name(module) is None else module


def underscored(module: str) -> str:
    """`module` as kohya's tools write it."""
    return module.replace(".", "_")


def split_qkv_names(module: str) -> tuple[str, str, str] | None:
    """The names of q, k and v in a fused module; None: it is not fused."""
    if not module.endswith(f".{FUSED}"):
        return None
    q, k, v = (module.removesuffix(FUSED) + part for part in THIRDS)
    return q, k, v


def fused_name(module: str) -> str | None:
    """The fused module that q, k or v is a third of; None: it is no such module."""
    part = next((part for part in THIRDS if module.endswith(f".{part}")), None)
    return None if part is None else module.removesuffix(part) + FUSED


def kind_of(found: FoundParts) -> str | None:
    """`LoRA`, `DoRA`, `LoKr` or `LoHa` by the parts of a module; None: they are not whole, or do not fit together."""
    alpha, names = found.get("alpha", ()), found.keys() - {"alpha"}
    if alpha not in ((), (1,)):
        return None
    if names == {"A", "B"} and _are_factors(found["B"], found["A"]):
        return "LoRA"
    if names == {"A", "B", MAGNITUDE} and _are_factors(found["B"], found["A"]):
        outputs, inputs = found["B"][0], found["A"][1]
        return "DoRA" if found[MAGNITUDE] in ((outputs,), (outputs, 1), (1, inputs)) else None
    if names == set(LOHA):
        pairs = [(found[f"hada_w{i}_a"], found[f"hada_w{i}_b"]) for i in (1, 2)]
        same_size = len({(a[:1], b) for a, b in pairs}) == 1
        return "LoHa" if same_size and all(_are_factors(a, b) for a, b in pairs) else None
    if names and names <= set(LOKR) and all(_side(found, side) for side in ("lokr_w1", "lokr_w2")):
        return "LoKr"
    return None


def size_of(found: FoundParts) -> tuple[int, int]:
    """(out, in) of the weight that a whole change is for."""
    if "B" in found:
        return found["B"][0], found["A"][1]
    if "hada_w1_a" in found:
        return found["hada_w1_a"][0], found["hada_w1_b"][1]
    first, second = _side(found, "lokr_w1"), _side(found, "lokr_w2")
    assert first is not None and second is not None
    return first[0] * second[0], first[1] * second[1]


def layout_of(keys: Iterable[str]) -> str:
    """The layout that a LoRA's keys have, by who writes it."""
    keys = sorted(keys)
    first = keys[0]
    marks = {"lora_down": "lora_down/lora_up", "lokr_": "lokr_w1/lokr_w2", "hada_": "hada_w1/hada_w2"}
    parts = next((said for mark, said in marks.items() if any(f".{mark}" in key for key in keys)), "lora_A/lora_B")
    if prefix := next((prefix for prefix in UNDERSCORED if first.startswith(prefix)), None):
        is_fused = any(underscored(FUSED) in key for key in keys)
        who = "kohya and ComfyUI, fused q, k, v" if is_fused else "kohya and musubi, separate q, k, v"
        return f"{who} ({prefix}*.{parts})"
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


def comfyui_targets(linears: Iterable[str]) -> dict[str, str]:
    """Name of a LoRA's module in a file -> module that it changes, in all spellings that ComfyUI takes.

    Transcribes `model_lora_keys_unet` for Lumina2 models, to which Z-Image belongs there: its own names with dots after
    `diffusion_model.` and with underscores after `lora_unet_`; diffusers' names after each of three prefixes, and with
    underscores after `lycoris_`. There q, k and v are written to their rows of the fused weight.
    """
    targets: dict[str, str] = {}
    for name in linears:
        native = native_name(fused_name(name) or name)
        module = fused_name(name) or name
        targets |= {f"diffusion_model.{native}": module, f"lora_unet_{underscored(native)}": module}
        targets |= {prefix + name: name for prefix in ("diffusion_model.", "transformer.", "")}
        targets[f"lycoris_{underscored(name)}"] = name
    return targets


def _are_factors(up: FactorShape, down: FactorShape) -> bool:
    return len(up) == len(down) == 2 and up[1] == down[0] > 0


def _side(found: FoundParts, side: str) -> FactorShape | None:
    """The shape of one factor of a Kronecker product, given as a matrix or as two that make it."""
    whole, a, b = found.get(side), found.get(f"{side}_a"), found.get(f"{side}_b")
    if whole is not None and a is None and b is None and len(whole) == 2:
        return whole
    if whole is None and a is not None and b is not None and _are_factors(a, b):
        return a[0], b[1]
    return None


def _known(name: str, spelled: Callable[[str], str]) -> str | None:
    """diffusers' name of a linear module in any of its spellings; None: Z-Image has none of that name."""
    match = _BLOCK.fullmatch(name)
    block, rest, known = (f"{match[1]}.{match[2]}.", match[3], _IN_A_BLOCK) if match else ("", name, _OUTSIDE)
    spellings = {spelled(one): module for module in known for one in (native_name(module), module)}
    spellings |= {spelled(old): module for old, module in _OLD.items()} if match else {}
    return block + spellings[rest] if rest in spellings else None
