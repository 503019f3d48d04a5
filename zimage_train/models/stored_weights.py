"""The weights of a checkpoint as its files store them, in any precision in use (torch-free).

Quantised weights are numbers of 8 bits and scales, and a weight is their product. Each tool has its own names for the
scale of `NAME.weight`, and scales a whole tensor, each row, or each block:

* `NAME.scale_weight`: musubi-tuner, and ComfyUI's older scaled fp8, which has a tensor `scaled_fp8` too.
* `NAME.weight_scale` with `NAME.comfy_quant`, which is JSON in bytes, or with `_quantization_metadata` in the header:
  ComfyUI.
* `NAME.weight_scale_inv`: DeepSeek's and Qwen's own fp8. It is multiplied, too.

The scales of activations are left aside, since here no product is computed in the precision of the file.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from zimage_train.errors import Problem, WeightsError
from zimage_train.io.dtypes import COMPUTE_DTYPES
from zimage_train.io.json_text import parse_json
from zimage_train.io.safetensors_format import (
    PLAIN_WEIGHTS_HINT,
    TensorInfo,
    read_bytes,
    read_header,
    read_sharded,
)

Part = Literal["transformer", "text_encoder", "vae"]
STEMS: dict[Part, str] = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
"""File name of the weights in the folder of a part, without its extension."""
PREFIXES: dict[Part, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "text_encoder": ("text_encoders.qwen3_4b.transformer.", "text_encoders."),
    "vae": ("vae.", "first_stage_model."),
}
"""What the names of a part begin with in a file that may hold several."""
UNUSED: dict[Part, tuple[str, ...]] = {"text_encoder": ("lm_head.",)}
"""How the names of tensors begin that nothing reads, so that they may be stored in any way."""
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
"""How the name of a file ends that holds a part of the tensors."""
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
FORMAT = ".comfy_quant"
LEFT_ASIDE = (".input_scale", ".scale_input", ".scaled_fp8")
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
FORMATS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e4m3fn_blockwise": "F8_E4M3",
    "float8_e4m3fn_block3d": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8",
    "int8_blockwise": "I8",
}
"""ComfyUI's name of a format that is numbers times scales -> the dtype of its numbers."""
OTHER_FORMATS = {
    ".weight_scale_2": "nvfp4",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".wscales": "Nunchaku (SVDQuant)",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    "._data": "quanto",
    ".zero_point": "integers with a zero point, as of SDNQ",
}
"""How names in formats that are not read here end."""
EMBEDDING = "embed_tokens.weight"
"""A table that scaled checkpoints may store as plain fp8, since it is no linear layer."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight, or a third of a fused one, with the tensors of which it is made."""

    info: TensorInfo
    scale: TensorInfo | None = None
    third: int | None = None
    """Which third of the rows of a fused tensor it is; None for the whole tensor."""

    @property
    def dtype(self) -> str:
        """Return safetensors' name of the dtype that it is stored in."""
        return self.info.dtype

    @property
    def rows(self) -> slice:
        """Return its rows of the tensor."""
        if self.third is None:
            return slice(None)
        count = self.info.shape[0] // 3
        return slice(self.third * count, (self.third + 1) * count)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.info.shape
        if self.third is None or not shape or shape[0] % 3:
            return shape  # nothing that can be divided is of another shape than expected, and refused as such
        return (shape[0] // 3, *shape[1:])

    def split(self, third: int | None) -> "StoredWeight":
        """Return a third of it, or itself for None."""
        return replace(self, third=third)


def read_part(path: Path, part: Part) -> dict[str, StoredWeight]:
    """Return name -> weight of a part of a model: a folder with weights, or a single file, which may hold other parts.

    Raises:
        WeightsError: unreadable, or in a precision that is not read here.
    """
    if path.is_dir():
        tensors, metadata = read_sharded(path, STEMS[part]), {}
    else:
        _require_whole(path)
        header = read_header(path)
        tensors, metadata = header.tensors, header.metadata
    named: dict[str, TensorInfo] = {}
    for full_name, info in tensors.items():
        name = _name_in_part(full_name, part)
        if name is None or name.startswith(UNUSED.get(part, ())):
            continue
        if name in named:
            message = f"holds {name} twice, as {named[name].name} and as {full_name}"
            raise WeightsError(Problem(str(path), message, "get the file again", "damaged-file"))
        named[name] = info
    return _with_scales(str(path), named, _formats(named, metadata, part))


def _require_whole(path: Path) -> None:
    """Refuse a file that by its name is one of several.

    Raises:
        WeightsError: it is.
    """
    shard = SHARD.search(path.name)
    if shard is not None and int(shard[1]) > 1:
        what = f"is one of {int(shard[1])} files that hold the weights together"
        raise WeightsError(
            Problem(str(path), what, "give the folder with config.json and all of them", "incomplete-model")
        )


def _name_in_part(name: str, part: Part) -> str | None:
    """Return `name` without the prefix of `part`, or None if it is of another part."""
    for owner, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return name.removeprefix(prefix) if owner == part else None
    return name


def _formats(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], part: Part) -> dict[str, dict[str, Any]]:
    """Return module -> what ComfyUI's file says of its format, by `.comfy_quant` tensors and by the header."""
    formats: dict[str, dict[str, Any]] = {}
    for layer, value in _header_formats(metadata):
        module = _name_in_part(layer, part)
        if module is not None:
            formats[module] = value if isinstance(value, dict) else {"format": value}
    for name, info in tensors.items():
        if name.endswith(FORMAT):
            try:
                value = parse_json(read_bytes(info))
            except ValueError:
                value = None
            formats[name.removesuffix(FORMAT)] = value if isinstance(value, dict) else {}
    return formats


def _header_formats(metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    try:
        layers = parse_json(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        yield from layers.items()
    except (ValueError, AttributeError):  # no statement that could be read: the tensors decide
        return


def _with_scales(
    where: str, tensors: Mapping[str, TensorInfo], formats: Mapping[str, dict[str, Any]]
) -> dict[str, StoredWeight]:
    """Return name -> weight with its scale.

    Raises:
        WeightsError: the format is not read here, or weights and scales do not fit together.
    """
    _require_known_formats(where, tensors, formats)
    weights: dict[str, StoredWeight] = {}
    scales: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), None)
        if suffix is not None:
            weight_name = f"{name.removesuffix(suffix)}.weight"
            if weight_name in scales or weight_name not in tensors:
                count = "two scales" if weight_name in scales else "a scale, but no weight"
                raise _mismatch(where, f"{name.removesuffix(suffix)} has {count}")
            scales[weight_name] = info
        elif not name.endswith(FORMAT) and not f".{name}".endswith(LEFT_ASIDE):
            weights[name] = StoredWeight(info)
    unscaled: list[str] = []
    for name, weight in weights.items():
        weights[name] = replace(weight, scale=scales.get(name))
        told = formats.get(name.removesuffix(".weight"), {}).get("format")
        _require_fitting(where, name, weights[name], told)
        is_matrix = name.endswith(".weight") and len(weight.info.shape) == 2 and not name.endswith(EMBEDDING)
        if weight.dtype in FLOAT8 and name not in scales and (told or (scales and is_matrix)):
            unscaled.append(name)
    if unscaled:
        raise _mismatch(where, f"{len(unscaled)} of its fp8 weights have no scale, such as {min(unscaled)}")
    return weights


def _require_known_formats(
    where: str, tensors: Mapping[str, TensorInfo], formats: Mapping[str, dict[str, Any]]
) -> None:
    """Refuse formats whose weights are not numbers times scales, by the names that the file or its tensors have.

    Raises:
        WeightsError: names the formats.
    """
    unknown: set[str] = set()
    for value in formats.values():
        name, parameters = value.get("format"), value.get("params")
        convrot = value.get("convrot") or (isinstance(parameters, dict) and parameters.get("convrot"))
        if not isinstance(name, str) or not name:
            unknown.add("a format that .comfy_quant does not name")
        elif convrot:
            unknown.add(f"{name} with ConvRot")
        elif name not in FORMATS:
            unknown.add(name)
    for name in tensors:
        unknown.update(kind for suffix, kind in OTHER_FORMATS.items() if name.endswith(suffix))
    if unknown:
        message = f"is quantised as {' and '.join(sorted(unknown))}, which is not read here"
        raise WeightsError(Problem(where, message, PLAIN_WEIGHTS_HINT, "unsupported-dtype"))


def _require_fitting(where: str, name: str, weight: StoredWeight, told: Any) -> None:
    """Require a dtype that is read here, and a scale that belongs to it.

    Raises:
        WeightsError: names the weight.
    """
    dtype, scale = weight.dtype, weight.scale
    if dtype not in COMPUTE_DTYPES | FLOAT8 and not (dtype == "I8" and FORMATS.get(told) == "I8" and scale):
        message = f"holds {dtype} weights of an unknown format, such as {name}"
        raise WeightsError(Problem(where, message, PLAIN_WEIGHTS_HINT, "unsupported-dtype"))
    if scale is None:
        return
    if dtype in COMPUTE_DTYPES:
        raise _mismatch(where, f"{name} is {dtype} and has a scale, which only numbers of 8 bits need")
    if scale.dtype not in COMPUTE_DTYPES:
        message = f"has scales in {scale.dtype}, such as {scale.name}"
        raise WeightsError(Problem(where, message, PLAIN_WEIGHTS_HINT, "unsupported-dtype"))
    if scale_counts(weight.info.shape, scale.shape) is None:
        raise _mismatch(where, f"{name} is {list(weight.info.shape)}, and its scale {list(scale.shape)}")


def scale_counts(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the number of scales along each dimension of a weight of `shape`; None if `scale` does not fit it.

    A scale is of the whole tensor (one number), of rows (out) or (out, 1), or of blocks (out / n, in / m), with or
    without ones behind, as musubi-tuner's (out, blocks, 1).
    """
    counts = list(scale)
    while len(counts) > len(shape) and counts[-1] == 1:
        counts.pop()
    if math.prod(scale) == 1 and shape:
        counts = []
    counts += [1] * (len(shape) - len(counts))
    if not shape or len(counts) != len(shape) or any(count > 1 for count in counts[2:]):
        return None
    for size, count in zip(shape, counts, strict=True):
        if count == 0 or size % count:
            return None
    return tuple(counts)


def _mismatch(where: str, message: str) -> WeightsError:
    return WeightsError(Problem(where, message, "get the file again, or " + PLAIN_WEIGHTS_HINT, "incomplete-model"))
