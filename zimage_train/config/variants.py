"""The members of the Z-Image family: one row of one table each (torch-free)."""

from dataclasses import dataclass
from typing import Literal

VariantName = Literal["turbo", "deturbo", "base"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs between the checkpoints; the graph is the same for all of them."""

    transformer: str
    """Hub repository of the transformer."""
    extras: str
    """Hub repository of the text encoder, tokenizer and VAE."""
    adapter: str | None
    """The training adapter that is merged unless the config says otherwise."""
    shift: float
    """Static shift of the sampling schedule."""
    steps: int
    """Sampling steps of previews."""
    guidance: float
    """Guidance g of previews, as in `pos + g (pos - neg)`; the usual CFG scale is g + 1."""
    comfyui: str
    """File name of the transformer in ComfyUI's `models/diffusion_models`, as its publishers call it."""


VARIANTS: dict[str, Variant] = {
    "turbo": Variant(
        transformer="Tongyi-MAI/Z-Image-Turbo",
        extras="Tongyi-MAI/Z-Image-Turbo",
        adapter="v2",
        shift=3.0,
        steps=8,
        guidance=0.0,
        comfyui="z_image_turbo_bf16.safetensors",
    ),
    "deturbo": Variant(
        transformer="ostris/Z-Image-De-Turbo",
        extras="Tongyi-MAI/Z-Image-Turbo",
        adapter=None,
        shift=3.0,
        steps=25,
        guidance=2.0,
        comfyui="z_image_de_turbo_v1_bf16.safetensors",
    ),
    "base": Variant(
        transformer="Tongyi-MAI/Z-Image",
        extras="Tongyi-MAI/Z-Image",
        adapter=None,
        shift=6.0,
        steps=30,
        guidance=3.0,
        comfyui="z_image_bf16.safetensors",
    ),
}

ADAPTERS = {
    "v1": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v1.safetensors",
    "v2": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
}

NAMED_LORAS = {"distillpatch": "DiffSynth-Studio/Z-Image-Turbo-DistillPatch/model.safetensors"}
"""LoRAs that a short name stands for: one that gives Turbo its 8 steps back after a training without adapter."""

DOWNLOAD_GB = {"transformer": 12.3, "text encoder": 8.0, "VAE": 0.2, "adapter": 0.6}
"""What the published files take."""
