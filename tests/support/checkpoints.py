"""Checkpoints of the miniature as other tools write them, and what is in them, each written out without our readers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_train import mini

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards in `folder`."""
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def comfyui(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The native layout of a transformer."""
    native: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.to_q." in name:
            parts = [tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            native[name.replace("to_q", "qkv")] = torch.cat(parts, dim=0)
        elif ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        else:
            for old, new in (
                ("attention.to_out.0", "attention.out"),
                ("norm_q", "q_norm"),
                ("norm_k", "k_norm"),
                ("all_x_embedder.2-1", "x_embedder"),
                ("all_final_layer.2-1", "final_layer"),
            ):
                name = name.replace(old, new)
            native[name] = tensor
    return {name: tensor.contiguous() for name, tensor in native.items()}


def of_diffusers(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """A native transformer under diffusers' names, by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    return convert_z_image_transformer_checkpoint_to_diffusers(dict(native))


@dataclass(frozen=True)
class Style:
    """How a tool stores a linear weight of 8 bits."""

    suffix: str | None = ".weight_scale"
    """How the name of the scale ends; None: there are no scales."""
    form: tuple[int, ...] | None = None
    """Shape of the scale in the file; None: the number of blocks along both dimensions."""
    rows: int | None = None
    """Rows that share a scale; None: all."""
    columns: int | None = None
    dtype: torch.dtype = E4M3
    scale_dtype: torch.dtype = torch.float32
    told: str = ""
    """Where the format is told: in a tensor (comfy_quant), in the metadata (header), or by a mark (scaled_fp8)."""


STYLES = {
    "old": Style(".scale_weight", (), told="scaled_fp8"),
    "new": Style(form=(), told="comfy_quant"),
    "header": Style(form=(1,), told="header"),
    "row": Style(rows=1, told="comfy_quant"),
    "row_1d": Style(form=(-1,), rows=1, told="comfy_quant"),
    # musubi-tuner stores scales in the precision of the model.
    "musubi tensor": Style(".scale_weight", (), scale_dtype=torch.bfloat16),
    "musubi channel": Style(".scale_weight", rows=1, scale_dtype=torch.bfloat16),
    "musubi block": Style(".scale_weight", (0, -1, 1), rows=1, columns=32, scale_dtype=torch.bfloat16),
    "block2d": Style(rows=16, columns=32, told="comfy_quant"),
    "qwen": Style(".weight_scale_inv", rows=16, columns=16, scale_dtype=torch.bfloat16),
    "e5m2": Style(".scale_weight", (1,), dtype=E5M2),
    "int8": Style(rows=1, dtype=torch.int8, told="comfy_quant"),
    "plain": Style(None),
    "plain e5m2": Style(None, dtype=E5M2),
}
LARGEST = {E4M3: 448.0, E5M2: 57344.0, torch.int8: 127.0}
FORMATS = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", torch.int8: "int8_tensorwise"}
LINEARS = ("attention.", "feed_forward.", "self_attn.", "mlp.")


def marked(value: object) -> Tensor:
    """The content of a `.comfy_quant` tensor."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def scaled(tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The tensors of a file whose linear weights are stored in a style, the weights in float64, and its metadata."""
    style, metadata, layers = STYLES[name], {}, {}
    stored, exact = dict(tensors), {name: tensor.double() for name, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not key.endswith(".weight") or tensor.ndim != 2 or not any(part in key for part in LINEARS):
            continue
        module = key.removesuffix(".weight")
        stored[key], scale, exact[key] = _quantized(tensor.float(), style)
        layers[module] = {"format": FORMATS[style.dtype]}
        if style.suffix is not None:
            form = scale.shape if style.form is None else style.form
            stored[f"{module}{style.suffix}"] = scale.reshape([len(scale) if size == 0 else size for size in form])
        if style.told == "comfy_quant":
            stored[f"{module}.input_scale"] = torch.tensor(0.25)
            stored[f"{module}.comfy_quant"] = marked(layers[module])
        if style.told == "scaled_fp8":
            stored[f"{module}.scale_input"] = torch.tensor(0.5)
            stored["scaled_fp8"] = torch.empty(2, dtype=E4M3)
    if style.told == "header":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return stored, exact, metadata


def _quantized(weight: Tensor, style: Style) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales (blocks of rows, blocks of columns), and the product of both in float64."""
    rows, columns = style.rows or len(weight), style.columns or weight.shape[1]
    blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = blocks.abs().amax(dim=(1, 3)) / LARGEST[style.dtype]
    scale = scale.to(style.scale_dtype) if style.suffix else torch.ones_like(scale)
    spread = torch.kron(scale.double(), torch.ones(rows, columns).double())
    numbers = (weight / spread).clamp(-LARGEST[style.dtype], LARGEST[style.dtype])
    numbers = numbers.round() if style.dtype == torch.int8 else numbers
    stored = numbers.to(style.dtype)
    return stored, scale, stored.double() * spread


def write(path: Path, tensors: dict[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    """Write a single file, with `prefix` before each name."""
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE of diffusers under the names of the original implementation, whose attention is 1 x 1 convolutions."""
    found: dict[str, Tensor] = {}
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            level = int(parts[2]) if parts[1] == "down_blocks" else blocks - 1 - int(parts[2])
            kind = {"resnets": f"block.{parts[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[parts[3]]
            parts = [parts[0], parts[1].removesuffix("_blocks"), str(level), kind, *parts[5:]]
        elif parts[1] == "mid_block":
            kind = "attn_1" if parts[2] == "attentions" else f"block_{int(parts[3]) + 1}"
            parts = [parts[0], "mid", kind, *parts[4:]]
        new = ".".join(parts).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attn_1" in new:
            for old, short in (
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ):
                new = new.replace(f"attn_1.{old}", f"attn_1.{short}")
            tensor = tensor[:, :, None, None] if new.endswith("weight") and tensor.ndim == 2 else tensor
        found[new] = tensor.contiguous()
    return found


TRANSFORMER = mini.TURBO / "transformer"
