"""The modules of a LoRA file, the model that it was made for, and whether it fits, from its header (torch-free)."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from zimage_train.errors import Problem, WeightsError
from zimage_train.io.safetensors_format import TensorInfo, read_header
from zimage_train.lora import keys

_UNET = r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)"

FAMILIES = (
    ("SDXL LoRA (UNet keys)", re.compile(rf"lora_te2_|(?:lora_unet_|unet\.).*{_UNET}.*transformer_blocks[._][2-9]")),
    ("Stable Diffusion LoRA (UNet keys)", re.compile(rf"(?:lora_unet_|unet\.).*{_UNET}|lora_te1?_text_model")),
    ("Qwen-Image LoRA", re.compile(r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|img_mod|txt_mod)")),
    ("FLUX LoRA", re.compile(r"double_blocks|single_blocks|single_transformer_blocks|context_embedder|double_stream")),
    ("Stable Diffusion 3 LoRA", re.compile(r"joint_blocks|transformer_blocks[._]\d+[._](?:attn|ff_context|ff)[._]")),
    ("Wan LoRA", re.compile(r"blocks[._]\d+[._](?:self_attn|cross_attn)[._]")),
)
"""(family, pattern of its keys); the first pattern that matches any key counts, so specific patterns come first."""

_BESIDE_LORA = "whole weights or biases beside the LoRA"
_ALONE_HINT = "a LoRA without them draws something else; ask for a file of LoRA keys alone, or use this one in ComfyUI"
_PARAMETER = re.compile(
    r"^(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.)*"
    r"(?:(?:(?:layers|noise_refiner|context_refiner)\.\d+|(?:all_)?x_embedder|(?:all_)?final_layer|cap_embedder|t_embedder)"
    r"(?:\..*)?\.(?:weight|bias)|(?:x|cap)_pad_token)$"
)
"""Names of parameters of Z-Image."""
KINDS = (
    (
        _BESIDE_LORA,
        re.compile(r"\.(?:diff|diff_b|set_weight|w_norm|b_norm)$|lora_(?:B|up)(?:\.[^.]+)?\.bias$"),
        _ALONE_HINT,
    ),
    (
        "a LoRA of the text encoder",
        re.compile(
            r"^(?:base_model\.model\.)?(?:lora_)?(?:text_encoders?|te|cond_stage_model|conditioner)[0-9]*[._]"
            r"|^base_model\.model\.model\.layers"
            r"|(?:self_attn[._][qkvo]|mlp[._](?:gate|up|down))_proj[._](?:lora|lokr|hada|dora|alpha)"
        ),
        "the text encoder is not changed here; train or save the LoRA of the transformer alone, or use it in ComfyUI",
    ),
    ("a LoRA of convolutions", re.compile(r"lora_mid|lokr_t2|hada_t[12]"), "Z-Image has no convolutions"),
    (
        "an OFT that is not LyCORIS's diag-oft",
        re.compile(r"oft_|\.rescale$", re.IGNORECASE),
        "it is not read here; bake it into the model with the tool that trained it, and extract a LoRA from the result",
    ),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$"), "it is not read here; make it a LoRA with the tool that trained it"),
)
"""(what, pattern of its keys, what to do) of keys that are no LoRA of the transformer."""


LARGEST_MODULE = 2**26
"""No weight of Z-Image has more elements, so that no small file unfolds to gigabytes."""
PLAIN, ADDITIVE, READ = ("LoRA",), ("LoRA", "LoKr", "LoHa"), ("LoRA", "LoKr", "LoHa", "DoRA", "OFT")
"""Kinds of changes: LoRAs alone, those that add a delta to any weight, and those that can be sampled and baked."""


def detect_family(keys: Iterable[str]) -> str | None:
    """Return the other family of models that a file with these keys was made for, or None if it may be Z-Image."""
    found = list(keys)
    return next((name for name, pattern in FAMILIES if any(pattern.search(key) for key in found)), None)


def _unknown_keys_problem(path: Path, unknown: list[str], broken: list[str], has_lora: bool) -> Problem:
    """Return the problem of a file with keys that this trainer cannot read, or with modules whose parts do not fit."""
    beside = ((_BESIDE_LORA, _PARAMETER, _ALONE_HINT),) if has_lora else ()
    for what, pattern, hint in (*KINDS, *beside):
        found = sorted(key for key in unknown if pattern.search(key))
        if found:
            message = f"has {what}: {len(found)} keys, such as {found[0]}"
            return Problem(str(path), message, hint, "unknown-tensors")
    if any(key.endswith("attention_norm1.weight") for key in unknown):
        hint = "it is a whole model: give it as MODEL, or make a LoRA of what it changes with lora extract"
    elif unknown:
        hint = "is it a LoRA of Z-Image?"
    else:
        hint = "a part of it is missing or of another file; get the file again"
    return Problem(str(path), _unknown_keys_message(unknown, broken), hint, "unknown-tensors")


Sizes = Mapping[str, tuple[int, int]]
"""Module -> (out, in); of a file, in may be `keys.ANY_INPUTS`."""
Parts = dict[str, dict[str, str]]
"""Module, which may be fused -> part -> key in the file."""


def read_parts(path: Path) -> Parts:
    """Return the keys of an adapter's file by module and part.

    Raises:
        WeightsError: the file is unreadable, has an unknown key or a tensor twice, or a module whose parts do not fit.
    """
    tensors = read_header(path).tensors
    if family := detect_family(tensors):
        raise WeightsError(
            Problem(str(path), f"{family}: cannot work on Z-Image", "retrain from the dataset", "other-family")
        )
    parts: Parts = {}
    unknown, twice = [], []
    for key in tensors:
        parsed = keys.parse_key(key)
        if parsed is None:
            unknown.append(key)
        elif parsed[1] in parts.setdefault(parsed[0], {}):
            twice.append(key)
        else:
            parts[parsed[0]][parsed[1]] = key
    twice += [min(found.values()) for module, found in parts.items() if keys.fused_name(module) in parts]
    broken = [module for module, found in parts.items() if not _is_whole(module, found, tensors)]
    adapters = keys.adapter_names(tensors)
    if twice and len(adapters) > 1:
        what = f"holds several adapters of peft ({', '.join(adapters[:5])})"
        raise WeightsError(Problem(str(path), what, "save one of them alone", "duplicate-module"))
    if twice:
        what = f"holds {len(twice)} tensors twice, under two names each, such as {min(twice)}"
        raise WeightsError(Problem(str(path), what, "remove one of each", "duplicate-module"))
    if unknown or broken or not parts:
        raise WeightsError(_unknown_keys_problem(path, unknown, broken, bool(parts)))
    return parts


def read_sizes(path: Path, kinds: Collection[str] = READ) -> Sizes:
    """Return module -> (out, in) of an adapter; a fused module counts as q, k and v.

    Raises:
        WeightsError: as `read_parts`, or a module is not of `kinds`.
    """
    parts, tensors = read_parts(path), read_header(path).tensors
    require_kinds(path, {module: _kind(found, tensors) for module, found in parts.items()}, kinds)
    sizes: dict[str, tuple[int, int]] = {}
    for module, found in parts.items():
        outputs, inputs = keys.size_of(_shapes(found, tensors))
        split = keys.split_qkv_names(module)
        sizes |= dict.fromkeys(split, (outputs // 3, inputs)) if split else {module: (outputs, inputs)}
    return sizes


def read_ranks(path: Path) -> dict[str, int]:
    """Return module -> rank of a plain LoRA; a fused module counts as q, k and v.

    Raises:
        WeightsError: as `read_sizes`.
    """
    parts, tensors = read_parts(path), read_header(path).tensors
    require_kinds(path, {module: _kind(found, tensors) for module, found in parts.items()}, PLAIN)
    ranks = {module: tensors[found["A"]].shape[0] for module, found in parts.items()}
    return {name: rank for module, rank in ranks.items() for name in keys.split_qkv_names(module) or (module,)}


def read_part_shapes(path: Path, kind: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return module -> part -> shape of a `kind`, such as LoKr, as `keys` names its parts.

    Raises:
        WeightsError: as `read_parts`, or the file is of another kind, or has q, k and v in one.
    """
    parts, tensors = read_parts(path), read_header(path).tensors
    require_kinds(path, {module: _kind(found, tensors) for module, found in parts.items()}, (kind,))
    fused = [module for module in parts if keys.split_qkv_names(module) is not None]
    if fused:
        hint = "convert it first: zimage-train lora convert FILE --to comfyui"
        raise WeightsError(Problem(f"{path}: {fused[0]}", "holds q, k and v in one", hint, "other-modules"))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for module, found in parts.items():
        shapes[module] = {part: tensors[key].shape for part, key in found.items() if part != "alpha"}
    return shapes


def require_kinds(path: Path, kinds: Mapping[str, str | None], allowed: Collection[str]) -> None:
    """Require that every module's change is of a kind that is `allowed`.

    Raises:
        WeightsError: a module is of another kind, which the message names.
    """
    others = {module: kind for module, kind in kinds.items() if kind not in allowed}
    if not others:
        return
    module, kind = min(others.items())
    what = f"is a {kind} ({len(others)} modules, such as {module}), and this takes a {' or '.join(allowed)}"
    todo = "bake it into the model with `zimage-train lora bake`, since its change depends on the weights"
    if len(allowed) == 1 and kind == "LoRA":
        todo = f"give a {next(iter(allowed))}"
    elif kind in ADDITIVE:
        todo = "make it a LoRA with `zimage-train lora resize FILE --rank auto -o OUT`, which prints what is lost"
    raise WeightsError(Problem(str(path), what, todo, "not-a-plain-lora"))


def fits(size: tuple[int, int], linear: tuple[int, int] | None) -> bool:
    """Return whether a change of `size` (out, in) belongs to a linear of the model, which is None if it has none."""
    return linear is not None and size[0] == linear[0] and size[1] in (linear[1], keys.ANY_INPUTS)


def require_match(path: Path, found: Sizes, linears: Sizes) -> None:
    """Require that every module of a LoRA is a linear of the model with the right shape.

    Raises:
        WeightsError: a module has no counterpart in the model, or another shape.
    """
    # A LoRA applied in part is worse than none: nothing would show it, and the result would look like a bad LoRA.
    lost = sorted(module for module, size in found.items() if not fits(size, linears.get(module)))
    if lost:
        first, there = lost[0], linears.get(lost[0])
        why = "the model has no such module" if there is None else f"{found[first]} there, {there} in the model"
        what = f"matched {len(found) - len(lost)}/{len(found)} modules; not matched: {first} ({why})"
        raise WeightsError(
            Problem(str(path), what, "it belongs to another model, and is used in whole or not at all", "other-modules")
        )


def _kind(found: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> str | None:
    return keys.kind_of(_shapes(found, tensors))


def _shapes(found: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {part: tensors[key].shape for part, key in found.items()}


def _is_whole(module: str, found: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bool:
    if _kind(found, tensors) is None:
        return False
    outputs, inputs = keys.size_of(_shapes(found, tensors))
    if outputs * max(inputs, 1) > LARGEST_MODULE:
        return False
    return keys.split_qkv_names(module) is None or keys.has_thirds(_shapes(found, tensors))


def _unknown_keys_message(unknown: list[str], broken: list[str]) -> str:
    if unknown:
        return f"has {len(unknown)} keys that are not of a Z-Image LoRA, such as {min(unknown)}"
    if broken:
        return f"has {len(broken)} modules whose A, B or alpha are missing or do not fit, such as {min(broken)}"
    return "holds no LoRA"
