"""The members of the Z-Image family, and the published files of each (torch-free)."""

from dataclasses import dataclass
from typing import Literal

VariantName = Literal["turbo", "deturbo", "base"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The properties of a member; the architecture is the same for all."""

    transformer: str
    """Hub repository of the transformer."""
    extras: str
    """Hub repository of the text encoder, tokenizer and VAE."""
    adapter: str | None
    """Default of `model.adapter`."""
    shift: float
    """Shift of the sampling schedule, independent of resolution."""
    steps: int
    """Default sampling steps."""
    guidance: float
    """Default guidance g, as in `pos + g (pos - neg)`; the usual CFG scale is g + 1."""
    base_model: str
    """Name of the base model on CivitAI. Managers of models show it for a LoRA: see lora/metadata.py."""
    comfyui: str
    """File name of the transformer as published for ComfyUI's `models/diffusion_models`."""


VARIANTS: dict[str, Variant] = {
    "turbo": Variant(
        transformer="Tongyi-MAI/Z-Image-Turbo",
        extras="Tongyi-MAI/Z-Image-Turbo",
        adapter="v2",
        shift=3.0,
        steps=8,
        guidance=0.0,
        base_model="ZImageTurbo",
        comfyui="z_image_turbo_bf16.safetensors",
    ),
    "deturbo": Variant(
        transformer="ostris/Z-Image-De-Turbo",
        extras="Tongyi-MAI/Z-Image-Turbo",
        adapter=None,
        shift=3.0,
        steps=25,
        guidance=2.0,
        base_model="ZImageTurbo",
        comfyui="z_image_de_turbo_v1_bf16.safetensors",
    ),
    "base": Variant(
        transformer="Tongyi-MAI/Z-Image",
        extras="Tongyi-MAI/Z-Image",
        adapter=None,
        shift=6.0,
        steps=30,
        guidance=3.0,
        base_model="ZImageBase",
        comfyui="z_image_bf16.safetensors",
    ),
}

ADAPTERS = {
    "v1": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v1.safetensors",
    "v2": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
}
"""Short name of a training adapter -> its file on the hub."""

NAMED_LORAS = {"distillpatch": "DiffSynth-Studio/Z-Image-Turbo-DistillPatch/model.safetensors"}
"""Short name -> LoRA on the hub. distillpatch restores the 8 steps of Turbo after a training without adapter."""

DOWNLOAD_GB = {"transformer": 12.3, "text encoder": 8.0, "VAE": 0.2, "adapter": 0.6}
"""Part of a run's model -> size of its published files, GB."""
