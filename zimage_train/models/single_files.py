"""The configs of text encoders and VAEs that are single files, such as ComfyUI's, and so have none (torch-free)."""

import re
from pathlib import Path
from typing import Any

from zimage_train import mini
from zimage_train.errors import Problem, WeightsError
from zimage_train.io.safetensors_format import read_json
from zimage_train.models.arch import TensorShape

PUBLISHED_LAYERS = {2560: 36}
"""Width of a published Qwen3 that Z-Image takes -> its number of layers."""
QWEN3_CONSTANTS = {"model_type": "qwen3", "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "attention_bias": False}
"""The values of the published config that no tensor shows."""
PUBLISHED_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
"""The config of the VAE that Z-Image shares with Flux; its scale, shift and groups appear in no tensor."""
LDM_DOWN = "encoder.down.{}.block.0.conv1.weight"
DIFFUSERS_DOWN = "encoder.down_blocks.{}.resnets.0.conv1.weight"


def qwen3_config(path: Path, shapes: dict[str, TensorShape]) -> dict[str, Any]:
    """Return the config of the Qwen3 whose tensors have `shapes`, by their names without `model.`.

    Raises:
        WeightsError: it is no Qwen3, or layers of the published one are missing.
    """

    def sizes(name: str, count: int) -> TensorShape:
        shape = shapes.get(name, ())
        if len(shape) != count or not all(shape):
            message = f"has no {name} of {count} dimensions" if name in shapes else f"has no {name}"
            hint = "give a Qwen3 text encoder, such as qwen_3_4b.safetensors"
            raise WeightsError(Problem(str(path), f"is no Qwen3: it {message}", hint, "other-model"))
        return shape

    layer = "layers.0"
    vocabulary, width = sizes("embed_tokens.weight", 2)
    (head,) = sizes(f"{layer}.self_attn.q_norm.weight", 1)
    numbers = [int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, shapes) if match]
    num_layers = 1 + max(numbers)
    published = PUBLISHED_LAYERS.get(width, num_layers)
    if num_layers != published:
        message = f"has {num_layers} layers, and the Qwen3 of this width has {published}"
        hint = "get the whole text encoder: Z-Image reads the output of its last but one layer"
        raise WeightsError(Problem(str(path), message, hint, "incomplete-model"))
    return QWEN3_CONSTANTS | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sizes(f"{layer}.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": sizes(f"{layer}.self_attn.q_proj.weight", 2)[0] // head,
        "num_key_value_heads": sizes(f"{layer}.self_attn.k_proj.weight", 2)[0] // head,
        "head_dim": head,
    }


def vae_config(path: Path, shapes: dict[str, TensorShape]) -> dict[str, Any]:
    """Return the config of the VAE whose tensors have `shapes`: the published one's, or the miniature's.

    Raises:
        WeightsError: it is another VAE, or none.
    """
    template = LDM_DOWN if is_ldm_vae(shapes) else DIFFUSERS_DOWN
    widths: list[int] = []
    while shape := shapes.get(template.format(len(widths))):
        widths.append(shape[0])
    latents = shapes.get("decoder.conv_in.weight", ())[1:2]
    for config in (PUBLISHED_VAE, read_json(mini.TURBO / "vae" / "config.json")):
        if widths == config["block_out_channels"] and latents == (config["latent_channels"],):
            return config
    hint = "give the ae.safetensors of Z-Image and Flux, or a diffusers folder"
    if not widths or not latents:
        raise WeightsError(Problem(str(path), "is no AutoencoderKL", hint, "other-model"))
    message = f"is a VAE with {latents[0]} channels and blocks of {widths}, whose config is not known"
    raise WeightsError(Problem(str(path), message, hint, "other-model"))


def is_ldm_vae(names: dict[str, Any]) -> bool:
    """Return whether the tensors of a VAE have the names of the original implementation, and not those of diffusers."""
    return LDM_DOWN.format(0) in names
