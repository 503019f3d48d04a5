"""Reading LoRA files of any known layout, and writing them in a fixed layout.

The layout written is the only layout that ComfyUI and every diffusers since 0.36 read alike:
`diffusion_model.<module>.lora_A/lora_B.weight`, and `.alpha` equal to the rank, with the scale folded into B. A LoKr
has the keys that AI Toolkit and LyCORIS give it, `.lokr_w1` and `.lokr_w2` or `.lokr_w2_a/_b`, and a LoHa those of
LyCORIS, `.hada_w1_a/_b` and `.hada_w2_a/_b`. A DoRA has `.dora_scale` beside a LoRA's keys, in fp32. An OFT has
LyCORIS's `.oft_blocks`, and an `.alpha` of 0.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import safetensors_format, tensorfile
from zimage_train.lora import adapter_config, file_hashes, format_metadata, headers, keys, qkv
from zimage_train.lora.deltas import Delta, Deltas, Dora, Factors, Hadamard, Kronecker, Lora, Rotation
from zimage_train.lora.keys import MAGNITUDE
from zimage_train.lora.qkv import Change

NOT_SAID = "taken as 1, which the file does not say"
SCALE_PLACES = {"from .alpha": "tensors", f"from {adapter_config.CONFIG_FILE}": "config", "from the header": "header"}
"""Where a scale stands, as the end of a sentence -> as in `readers.LoraTraits`."""
Changes = dict[str, Change]
"""Module -> its tensors, as `keys` names them; q, k and v are split, and alpha is an fp32 scalar."""


@dataclass(frozen=True)
class LoraContent:
    """What a LoRA file holds."""

    changes: Changes
    metadata: dict[str, str]
    scales_from: str
    """Where the scales stand, as the end of a sentence."""
    scale_in: frozenset[str]
    """Where the scales stand, as `readers.LoraTraits.scale_in`."""


def read_changes(path: Path) -> LoraContent:
    """Return the changes of an adapter's file of any known layout.

    A module's scale is that of its alpha tensor, or else of peft's description of the file (`adapter_config`), or else
    1.

    Raises:
        WeightsError: the file is unreadable, holds values that are not finite, or keys that belong to no module of a
            Z-Image transformer; or its scales stand in two places that disagree.
    """
    parts = headers.read_parts(path)
    tensors, metadata = tensorfile.load(path)
    original = format_metadata.read_format_metadata(metadata.pop(format_metadata.CONVERTED_KEY, None))
    sources = adapter_config.scale_sources(path, metadata)
    used: set[str] = set()
    changes: Changes = {}
    for module, keys_of_parts in parts.items():
        change = {part: _require_finite_floats(path, key, tensors[key]) for part, key in keys_of_parts.items()}
        if "alpha" in change:
            change["alpha"] = change["alpha"].reshape(()).float()
        names = dict.fromkeys([*keys.modules_in_file(min(keys_of_parts.values())), module])
        used.add(
            _set_scale(
                path, module, change, [(source.name, source.scale_of(names, qkv.rank_of(change))) for source in sources]
            )
        )
        # kohya's tools write a DoRA's magnitude as (out, 1), and peft as (out,).
        if MAGNITUDE in change and change[MAGNITUDE].shape[-1] == 1:
            change[MAGNITUDE] = change[MAGNITUDE].reshape(-1)
        changes |= _split_fused(path, module, change, original.ranks.get(module))
    _restore_alphas(changes, original.alpha)
    places = frozenset(SCALE_PLACES[source] for source in used - {NOT_SAID})
    return LoraContent(changes, metadata, " and ".join(sorted(used)), places)


def _set_scale(path: Path, module: str, change: Change, described: list[tuple[str, float]]) -> str:
    """Give `change` the first of the scales (source, scale) that are `described`, unless it has an alpha of its own.

    Return the source of its scale.

    Raises:
        WeightsError: two sources disagree.
    """
    places = [(".alpha", qkv.scale_of(change))] if "alpha" in change else []
    places += described
    if not places:
        return NOT_SAID
    source, scale = places[0]
    origin = f"from {source}"
    for other, other_scale in places[1:]:
        if not math.isclose(scale, other_scale, rel_tol=1e-5):
            what = f"{module} is multiplied by {scale:g} according to {source}, and by {other_scale:g} to {other}"
            raise WeightsError(Problem(str(path), what, "remove the one that is wrong", "conflicting-alpha"))
    rank = qkv.rank_of(change)
    if "alpha" in change:
        return origin
    if rank:
        change["alpha"] = torch.tensor(scale * rank)
    elif keys.OFT not in change and scale != 1.0:
        # A LoKr, whose alpha counts only together with the rank of a factor, which it may not have.
        first = "lokr_w1" if "lokr_w1" in change else "lokr_w1_a"
        change[first] = change[first].float() * scale
    return origin


def _restore_alphas(changes: Changes, had_alpha: bool | None) -> None:
    """Add or remove alphas that equal the rank, in place, as the file that `changes` were converted from had them.

    Does nothing if `had_alpha` is None, or if an alpha has an effect.
    """
    with_rank = [change for change in changes.values() if qkv.rank_of(change)]
    if had_alpha is None or any(qkv.scale_of(change) != 1.0 for change in with_rank):
        return
    for change in with_rank:
        change.pop("alpha", None)
        if had_alpha:
            change["alpha"] = torch.tensor(float(qkv.rank_of(change)))


def read_lora(path: Path) -> Lora:
    """Return the factors of a plain LoRA file of any known layout.

    Raises:
        WeightsError: as `read_changes`, or the file is of another kind.
    """
    changes = read_changes(path).changes
    headers.require_kinds(path, {module: kind_of(change) for module, change in changes.items()}, headers.PLAIN)
    return {module: Factors(change["A"], change["B"], qkv.scale_of(change)) for module, change in changes.items()}


def read_deltas(path: Path, kinds: Collection[str] = headers.ADDITIVE) -> Deltas:
    """Return the deltas of an adapter's file of any known layout.

    Raises:
        WeightsError: as `read_changes`; a module is not of `kinds`, a DoRA with other magnitudes than ComfyUI's, or an
            OFT with a constraint.
    """
    changes = read_changes(path).changes
    headers.require_kinds(path, {module: kind_of(change) for module, change in changes.items()}, kinds)
    for module, parts in headers.read_parts(path).items():
        is_of_peft = MAGNITUDE in parts and not parts[MAGNITUDE].endswith(".dora_scale")
        if is_of_peft or any(MAGNITUDE in change and change[MAGNITUDE].dim() > 1 for change in changes.values()):
            formula = "that of peft, which divides by ||W + B A||" if is_of_peft else "a magnitude for each input"
            hint = "use it in diffusers" if is_of_peft else "use it in ComfyUI"
            raise WeightsError(Problem(str(path), f"is a DoRA: {module} has {formula}", hint, "not-a-plain-lora"))
    for module, change in changes.items():
        if keys.OFT in change and change.get("alpha", torch.zeros(())) != 0:
            what = f"is an OFT: {module} has a constraint (alpha {float(change['alpha']):g})"
            hint = "use it in ComfyUI; LyCORIS and ComfyUI apply constraints differently, so none is read here"
            raise WeightsError(Problem(str(path), what, hint, "not-a-plain-lora"))
    return {module: _delta_of(change) for module, change in changes.items()}


def _delta_of(change: Change) -> Delta:
    scale = qkv.scale_of(change)
    if "A" in change:
        factors = Factors(change["A"], change["B"], scale)
        return Dora(factors, change[MAGNITUDE].float()) if MAGNITUDE in change else factors
    if "hada_w1_a" in change:
        b1, a1, b2, a2 = (change[part] for part in keys.LOHA)
        return Hadamard((b1, a1), (b2, a2), scale)
    if keys.OFT in change:
        return Rotation(change[keys.OFT])
    whole: list[tuple[Tensor, ...]] = []
    for name in ("lokr_w1", "lokr_w2"):
        whole.append((change[name],) if name in change else (change[f"{name}_a"], change[f"{name}_b"]))
    return Kronecker(whole[0], whole[1], scale)


def kind_of(change: Change) -> str | None:
    """Return the kind, as `keys.kind_of` names it, or None if the parts do not fit together."""
    return keys.kind_of({part: tuple(tensor.shape) for part, tensor in change.items()})


def _require_finite_floats(path: Path, key: str, tensor: Tensor) -> Tensor:
    """Return `tensor`, 8-bit floats as bf16, which represents each of their values exactly."""
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise WeightsError(
            Problem(
                f"{path}: {key}", f"holds {dtype} values instead of floats", "get the file again", "unsupported-dtype"
            )
        )
    if not tensor.float().isfinite().all():
        hint = "get the file again, or take an earlier save if the run diverged"
        raise WeightsError(Problem(f"{path}: {key}", "holds values that are not finite", hint, "not-finite"))
    return tensor.bfloat16() if tensor.dtype.itemsize == 1 else tensor


def _split_fused(path: Path, module: str, change: Change, ranks: list[int] | None) -> Changes:
    """Return module -> change, with a fused q, k, v module split into those that it changes."""
    names = keys.split_qkv_names(module)
    if names is None:
        return {module: change}
    try:
        thirds = qkv.split_qkv(change, ranks)
    except qkv.CannotFuseError as error:
        hint = "ask its author for a file with to_q, to_k and to_v"
        raise WeightsError(Problem(f"{path}: {module}", str(error), hint, "other-shape")) from None
    return {name: third for name, third in zip(names, thirds, strict=True) if third is not None}


def require_modules(path: Path, deltas: Mapping[str, Delta], linears: headers.Sizes) -> None:
    """Require that every module of `deltas`, read from `path`, fits the model.

    Raises:
        WeightsError: as `headers.require_match`.
    """
    headers.require_match(path, {module: delta.shape for module, delta in deltas.items()}, linears)


def round_to_dtype(deltas: Mapping[str, Delta], dtype: str) -> Deltas:
    """Return `deltas` as a file of this precision stores them: the scale folded in, the matrices rounded."""
    torch_dtype = tensorfile.TORCH_DTYPES[dtype]
    return {module: delta.stored(torch_dtype) for module, delta in deltas.items()}


def narrowest_dtype(lora: Mapping[str, Factors]) -> str:
    """Return `bf16` if it represents every value of `lora` exactly, otherwise `fp32`."""
    for factors in lora.values():
        exact, rounded = factors.stored(torch.float32), factors.stored(torch.bfloat16)
        is_exact = torch.equal(rounded.a.float(), exact.a) and torch.equal(rounded.b.float(), exact.b)
        if not is_exact:
            return "fp32"
    return "bf16"


def renewed_hashes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source_metadata: Mapping[str, str]
) -> dict[str, str]:
    """Return the hashes of a file of these tensors and metadata, as many as the file had that it was made from."""
    keys_there = source_metadata.keys() & set(file_hashes.HASH_KEYS)
    if not keys_there:
        return {}
    entries = {name: tensorfile.tensor_entry(tensor) for name, tensor in tensors.items()}
    hashes = file_hashes.file_hashes(entries, metadata)
    return {key: hashes[key] for key in keys_there}


def export_lora(path: Path, deltas: Mapping[str, Delta], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write an adapter in the layout that the module's docstring describes.

    The hashes of the file are added to `metadata`, unless that holds nothing but the format.

    Raises:
        WeightsError: a value is not finite; nothing is written then.
        DiskError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, delta in round_to_dtype(deltas, dtype).items():
        tensors |= {f"diffusion_model.{module}.{name}": tensor for name, tensor in _file_parts(delta).items()}
    not_finite = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        message = f"{len(not_finite)} tensors are not finite, such as {not_finite[0]}"
        raise WeightsError(Problem(str(path), message, "nothing was written", "not-finite"))
    entries = {name: tensorfile.tensor_entry(tensor) for name, tensor in tensors.items()}
    hashes = file_hashes.file_hashes(entries, metadata) if metadata.keys() - {"format"} else {}
    safetensors_format.write_safetensors(path, entries, {**metadata, **hashes})


def _file_parts(delta: Delta) -> dict[str, Tensor]:
    """Return suffix of a key -> tensor of a delta whose scale is 1; alpha is its rank."""
    if isinstance(delta, Factors):
        return {"lora_A.weight": delta.a, "lora_B.weight": delta.b, "alpha": torch.tensor(float(delta.rank))}
    if isinstance(delta, Dora):
        return {**_file_parts(delta.factors), "dora_scale": delta.magnitude.reshape(-1, 1)}
    if isinstance(delta, Hadamard):
        matrices = dict(zip(keys.LOHA, (*delta.w1, *delta.w2), strict=True))
        return matrices | {"alpha": torch.tensor(float(delta.rank))}
    if isinstance(delta, Rotation):
        return {keys.OFT: delta.blocks, "alpha": torch.tensor(0.0)}  # no constraint
    assert isinstance(delta, Kronecker)
    tensors: dict[str, Tensor] = {}
    for name, factor in (("lokr_w1", delta.w1), ("lokr_w2", delta.w2)):
        names = [name] if len(factor) == 1 else [f"{name}_a", f"{name}_b"]
        tensors |= dict(zip(names, factor, strict=True))
    # Without a rank alpha has no effect; AI Toolkit and LyCORIS write one all the same.
    return tensors | {"alpha": torch.tensor(float(delta.rank or 1))}
