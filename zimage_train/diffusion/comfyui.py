"""A ComfyUI workflow that draws a preview again: the same noise, grid and guidance, by nodes that ComfyUI has itself.

It is in the API layout, which ComfyUI takes by drag and drop and by `POST /prompt`. The LoRA belongs into
`models/loras`, and the model's files are those that Comfy-Org publishes for it. ComfyUI draws its noise on the CPU from
the seed, as we do. Its "simple" schedule with a static shift has the pipeline's sigmas where 1000 can be divided by
the number of steps, and is off by less than a thousandth before the shift elsewhere. Torch-free.
"""

from pathlib import Path
from typing import Any

from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion.request import SamplingRequest

TEXT_ENCODER = "qwen_3_4b.safetensors"
VAE = "ae.safetensors"

Node = dict[str, Any]


def comfyui_workflow(recipe: SamplingRequest, model: ModelSettings, lora: str) -> dict[str, Node]:
    """The nodes by number; `lora` is a file name, and the CFG scale is g + 1."""
    is_guided = recipe.guidance > 0
    nodes = {
        "model": _node("UNETLoader", unet_name=_file_of(model), weight_dtype="default"),
        "text encoder": _node("CLIPLoader", clip_name=TEXT_ENCODER, type="lumina2", device="default"),
        "vae": _node("VAELoader", vae_name=VAE),
        "lora": _node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0),
        "shift": _node("ModelSamplingAuraFlow", model=["lora", 0], shift=recipe.shift, sampling="flow"),
        "prompt": _node("CLIPTextEncode", clip=["text encoder", 0], text=recipe.prompt),
        "negative": _node("CLIPTextEncode", clip=["text encoder", 0], text=recipe.negative)
        if is_guided
        else _node("ConditioningZeroOut", conditioning=["prompt", 0]),  # at CFG 1 it is asked for and not used
        "size": _node("EmptySD3LatentImage", width=recipe.width, height=recipe.height, batch_size=1),
        "sampler": _node(
            "KSampler",
            model=["shift", 0],
            positive=["prompt", 0],
            negative=["negative", 0],
            latent_image=["size", 0],
            seed=recipe.seed,
            steps=recipe.steps,
            cfg=recipe.guidance + 1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix=Path(lora).stem),
    }
    numbers = {name: str(number) for number, name in enumerate(nodes, 1)}
    for name, node in nodes.items():
        node["inputs"] = {
            key: [numbers[value[0]], value[1]] if isinstance(value, list) else value
            for key, value in node["inputs"].items()
        }
        node["_meta"] = {"title": name}
    return {numbers[name]: node for name, node in nodes.items()}


def workflow_path(lora: Path) -> Path:
    """Where the workflow of an exported LoRA lies."""
    return lora.with_suffix(".comfyui.json")


def _node(kind: str, **inputs: Any) -> Node:
    return {"class_type": kind, "inputs": inputs}


def _file_of(model: ModelSettings) -> str:
    if model.path is not None and model.path.endswith(".safetensors"):
        return Path(model.path).name
    return VARIANTS[model.variant].comfyui
