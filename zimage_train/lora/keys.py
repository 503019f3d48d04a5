"""Parsing of the keys of LoRA files into module and part, and the kinds of changes that the parts form (torch-free).

A key consists of a prefix, a module and a suffix. Besides the prefix, files differ in two ways: dots in the module may
be underscores, and the module may have diffusers' name or that of ComfyUI's own model, where q, k and v are rows of one
`attention.qkv`. In this package a module has diffusers' name, or that of the fused `attention.qkv`.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from zimage_train.config.module_groups import BLOCK_MODULES
from zimage_train.models import native_keys
from zimage_train.models.native_keys import FUSED, THIRDS

FactorShape = tuple[int, ...]
PartShapes = Mapping[str, FactorShape]
"""Part -> shape, of a module."""

ANY_INPUTS = 0
"""Number of inputs of a module that a file does not show, as that of an OFT, which changes rows of any length."""

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes after which the dots of a module are written as underscores."""

LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
OFT = "oft_blocks"
MAGNITUDE = "magnitude"
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
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
    **{f".{part}": part for part in (*LOKR, *LOHA, OFT)},
}

_ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.([^.]+)(\.weight)$")
"""peft's name of the adapter between a part and its end: `default` in DiffSynth's files, `default_0` in others."""
_IN_A_BLOCK = (*BLOCK_MODULES, FUSED)
_OUTSIDE = (
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
)
# Spellings beside the two conventions that some files have.
_OLD = {f"attention.to.{part}": f"attention.to_{part}" for part in "qkv"} | {"attention.to_out": "attention.to_out.0"}
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)[._](\d{1,4})[._](.+)")


def parse_key(key: str) -> tuple[str, str] | None:
    """Return (module, part) of a LoRA file's key, or None if it belongs to no linear module of Z-Image.

    The name of the adapter, which peft puts into keys, has no meaning in a file.
    """
    key = _without_adapter_name(key)
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name, is_underscored = key.removesuffix(suffix), False
    # Several prefixes may follow each other, such as `base_model.model.transformer.`.
    for prefix in (*PREFIXES, *UNDERSCORED):
        if prefix in UNDERSCORED and name.startswith(prefix):
            is_underscored = True
        name = name.removeprefix(prefix)
    module = _find_module(name, underscored if is_underscored else str)
    return None if module is None else (module, SUFFIXES[suffix])


def modules_in_file(key: str) -> list[str]:
    """Return the module of a LoRA file's key as the file spells it, without suffix, and with ever fewer prefixes.

    peft knows it by the name within the model that it wrapped, which may be one that holds the transformer.
    """
    key = _without_adapter_name(key)
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")
    names = [key.removesuffix(suffix).removeprefix(PREFIXES[0])]
    for prefix in PREFIXES[1:]:
        names.append(names[-1].removeprefix(prefix))
    return list(dict.fromkeys(names))


def adapter_names(keys: Iterable[str]) -> list[str]:
    """Return the names of adapters in the keys of a file, sorted; none in most layouts."""
    return sorted({match[2] for match in map(_ADAPTER_NAME.search, keys) if match is not None})


def _without_adapter_name(key: str) -> str:
    return _ADAPTER_NAME.sub(r".\1\3", key)


def native_name(module: str) -> str:
    """Return the name of `module` in ComfyUI's own model; q, k and v have none there and are returned as they are."""
    return native_keys.to_native(module)[0] if fused_name(module) is None else module


def underscored(module: str) -> str:
    """Return `module` with underscores for dots, as kohya's tools write it."""
    return module.replace(".", "_")


def split_qkv_names(module: str) -> tuple[str, str, str] | None:
    """Return the names of q, k and v for a fused module, or None if it is not fused."""
    if not module.endswith(f".{FUSED}"):
        return None
    q, k, v = (module.removesuffix(FUSED) + part for part in THIRDS)
    return q, k, v


def fused_name(module: str) -> str | None:
    """Return the fused module that q, k or v is a third of, or None for another module."""
    part = next((part for part in THIRDS if module.endswith(f".{part}")), None)
    return None if part is None else module.removesuffix(part) + FUSED


def kind_of(shapes: PartShapes) -> str | None:
    """Return `LoRA`, `DoRA`, `LoKr`, `LoHa` or `OFT` for the parts of a module, or None if they do not fit together."""
    alpha, names = shapes.get("alpha", ()), shapes.keys() - {"alpha"}
    if alpha not in ((), (1,)):
        return None
    if names == {"A", "B"} and _are_factors(shapes["B"], shapes["A"]):
        return "LoRA"
    if names == {"A", "B", MAGNITUDE} and _are_factors(shapes["B"], shapes["A"]):
        outputs, inputs = shapes["B"][0], shapes["A"][1]
        return "DoRA" if shapes[MAGNITUDE] in ((outputs,), (outputs, 1), (1, inputs)) else None
    if names == set(LOHA):
        pairs = [(shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"]) for i in (1, 2)]
        have_same_size = len({(a[:1], b) for a, b in pairs}) == 1
        return "LoHa" if have_same_size and all(_are_factors(a, b) for a, b in pairs) else None
    if names and names <= set(LOKR) and all(_lokr_factor_shape(shapes, name) for name in ("lokr_w1", "lokr_w2")):
        return "LoKr"
    if names == {OFT}:
        blocks = shapes[OFT]
        return "OFT" if len(blocks) == 3 and blocks[1] == blocks[2] and min(blocks) > 0 else None
    return None


def size_of(shapes: PartShapes) -> tuple[int, int]:
    """Return (out, in) of the weight that a complete change belongs to; in may be `ANY_INPUTS`."""
    if OFT in shapes:
        return shapes[OFT][0] * shapes[OFT][1], ANY_INPUTS
    if "B" in shapes:
        return shapes["B"][0], shapes["A"][1]
    if "hada_w1_a" in shapes:
        return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
    first, second = _lokr_factor_shape(shapes, "lokr_w1"), _lokr_factor_shape(shapes, "lokr_w2")
    assert first is not None and second is not None
    return first[0] * second[0], first[1] * second[1]


def has_thirds(shapes: PartShapes) -> bool:
    """Return whether a complete change of a fused q, k, v weight can be divided into three of equal size."""
    return (shapes[OFT][0] if OFT in shapes else size_of(shapes)[0]) % 3 == 0


def layout_name(keys: Iterable[str]) -> str | None:
    """Return the layout of a LoRA's keys, as `formats.LAYOUTS` names it, or None for another."""
    keys = list(keys)
    first = min(keys, default="")
    if first.startswith("lora_unet_"):
        separate = underscored("attention.to_")
        return "musubi" if any(separate in key for key in keys) else "kohya"
    if adapter_names(keys) not in ([], ["default"]):
        return None  # no tool reads another name of an adapter but peft, which is told it
    is_other = any(part in key for key in keys for part in (".lora_down.", ".lora.down.", ".default."))
    is_other = is_other or any(key.endswith((".lora_A", ".lora_B")) for key in keys)
    by_prefix = {"diffusion_model.": "comfyui", "transformer.": "diffusers", "base_model.model.": "peft"}
    for prefix, name in by_prefix.items():
        if first.startswith(prefix):
            return None if is_other else name
    has_default = any(".default." in key for key in keys)
    return "diffsynth" if has_default and not first.startswith(UNDERSCORED) else None


LAYOUT_DESCRIPTIONS = {
    "comfyui": "ComfyUI's layout",
    "diffusers": "diffusers' layout",
    "kohya": "kohya's layout, fused q, k, v",
    "musubi": "musubi-tuner's layout, separate q, k, v",
    "diffsynth": "DiffSynth-Studio's layout",
    "peft": "peft's layout",
    None: "another layout",
}


def layout_of(keys: Iterable[str]) -> str:
    """Return a description of the layout of a LoRA's keys."""
    keys = sorted(keys)
    parts = "lora_A/lora_B"
    for start, description in (
        ("lora_down", "lora_down/lora_up"),
        ("lokr_", "lokr_w1/lokr_w2"),
        ("hada_", "hada_w1/hada_w2"),
        (OFT, OFT),
    ):
        if any(f".{start}" in key for key in keys):
            parts = description
            break
    name = layout_name(keys)
    prefix = next((prefix for prefix in (*UNDERSCORED, *PREFIXES) if keys[0].startswith(prefix)), "")
    default = "".join(f".{adapter}" for adapter in adapter_names(keys)[:1])
    star = "*" if prefix in UNDERSCORED or not prefix else ".*"
    return f"{LAYOUT_DESCRIPTIONS[name]} ({prefix.removesuffix('.')}{star}.{parts}{default})"


def comfyui_targets(linears: Iterable[str]) -> dict[str, str]:
    """Return name in a LoRA file -> module that it changes, for all names that ComfyUI accepts.

    Transcribed from ComfyUI's `model_lora_keys_unet` for Lumina2 models, which include Z-Image: native names with dots
    after `diffusion_model.` and with underscores after `lora_unet_`; diffusers' names after each of three prefixes, and
    with underscores after `lycoris_`. ComfyUI adds q, k and v to their rows of the fused weight.
    """
    targets: dict[str, str] = {}
    for name in linears:
        module = fused_name(name) or name
        native = native_name(module)
        targets[f"diffusion_model.{native}"] = module
        targets[f"lora_unet_{underscored(native)}"] = module
        # A name that is the same in both conventions is set twice, to the same module.
        for prefix in ("diffusion_model.", "transformer.", ""):
            targets[prefix + name] = name
        targets[f"lycoris_{underscored(name)}"] = name
    return targets


def _are_factors(up: FactorShape, down: FactorShape) -> bool:
    return len(up) == len(down) == 2 and up[1] == down[0] and min(*up, *down) > 0


def _lokr_factor_shape(shapes: PartShapes, name: str) -> FactorShape | None:
    """Return the shape of a factor of a Kronecker product, stored as a matrix or as a product of two, or None."""
    whole, a, b = shapes.get(name), shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    if whole is not None and a is None and b is None and len(whole) == 2 and min(whole) > 0:
        return whole
    if whole is None and a is not None and b is not None and _are_factors(a, b):
        return a[0], b[1]
    return None


def _find_module(name: str, spell: Callable[[str], str]) -> str | None:
    """Return diffusers' name of the linear module `name`, or None if Z-Image has none of that name.

    Args:
        spell: how the file writes names, such as `underscored`.
    """
    # An underscored name cannot be turned back, since `to_q` has an underscore of its own. So all names that Z-Image
    # has are spelled as in the file, and looked up.
    match = _BLOCK.fullmatch(name)
    if match:
        block, rest, modules = f"{match[1]}.{match[2]}.", match[3], _IN_A_BLOCK
    else:
        block, rest, modules = "", name, _OUTSIDE
    spellings: dict[str, str] = {}
    for module in modules:
        spellings[spell(native_name(module))] = module
        spellings[spell(module)] = module
    if match:
        for old, module in _OLD.items():
            spellings[spell(old)] = module
    return block + spellings[rest] if rest in spellings else None
