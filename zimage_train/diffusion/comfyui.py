"""A ComfyUI workflow that reproduces a preview with ComfyUI's own nodes (torch-free).

It is in the API format, which ComfyUI accepts by `POST /prompt`; `comfyui_canvas` arranges it for the editor. The LoRAs
have to be in `models/loras`; the model's files are those that Comfy-Org publishes. Noise, grid and guidance are the
same: ComfyUI also draws noise on the CPU from the seed, and its "simple" schedule with a static shift gives the
pipeline's sigmas where the number of steps divides 1000. Elsewhere it is off by less than a thousandth, before the
shift.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion.request import SamplingRequest

TEXT_ENCODER = "qwen_3_4b.safetensors"
VAE = "ae.safetensors"

Node = dict[str, Any]


def comfyui_workflow(
    request: SamplingRequest, model: ModelSettings, lora: str, extra_loras: Sequence[tuple[str, float]] = ()
) -> dict[str, Node]:
    """Return the workflow that draws `request` with the LoRA file named `lora`, as nodes by number.

    Args:
        extra_loras: names and strengths of the LoRAs that previews use in addition.
    """
    if request.guidance > 0:
        negative = _node("CLIPTextEncode", clip=["text encoder", 0], text=request.negative)
    else:
        # The sampler requires the input, but does not use it at CFG 1.
        negative = _node("ConditioningZeroOut", conditioning=["prompt", 0])
    nodes = {
        "model": _node("UNETLoader", unet_name=_transformer_file(model), weight_dtype="default"),
        "text encoder": _node("CLIPLoader", clip_name=TEXT_ENCODER, type="lumina2", device="default"),
        "vae": _node("VAELoader", vae_name=VAE),
        "lora": _node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0),
    }
    last = "lora"
    for number, (name, strength) in enumerate(extra_loras, 2):
        nodes[f"lora {number}"] = _node("LoraLoaderModelOnly", model=[last, 0], lora_name=name, strength_model=strength)
        last = f"lora {number}"
    nodes |= {
        "shift": _node("ModelSamplingAuraFlow", model=[last, 0], shift=request.shift),
        "prompt": _node("CLIPTextEncode", clip=["text encoder", 0], text=request.prompt),
        "negative": negative,
        "size": _node("EmptySD3LatentImage", width=request.width, height=request.height, batch_size=1),
        "sampler": _node(
            "KSampler",
            model=["shift", 0],
            positive=["prompt", 0],
            negative=["negative", 0],
            latent_image=["size", 0],
            seed=request.seed,
            steps=request.steps,
            cfg=request.guidance + 1.0,  # ComfyUI's scale; ours is g
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix=Path(lora).stem),
    }
    # ComfyUI refers to nodes by number; a list is a link to (node, output).
    numbers = {name: str(number) for number, name in enumerate(nodes, 1)}
    for name, node in nodes.items():
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][key] = [numbers[value[0]], value[1]]
        node["_meta"] = {"title": name}
    return {numbers[name]: node for name, node in nodes.items()}


def workflow_path(lora: Path) -> Path:
    """Return the path of the workflow in the API format, beside an exported LoRA."""
    return lora.with_suffix(".comfyui.json")


def _node(kind: str, **inputs: Any) -> Node:
    return {"class_type": kind, "inputs": inputs}


def _transformer_file(model: ModelSettings) -> str:
    if model.path is not None and model.path.endswith(".safetensors"):
        return Path(model.path).name
    return VARIANTS[model.variant].comfyui
