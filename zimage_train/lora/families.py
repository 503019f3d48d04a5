"""What a LoRA file that is not one of Z-Image was made for, by its keys (torch-free)."""

import re
from collections.abc import Iterable

_UNET = r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)"

FAMILIES = (
    ("SDXL LoRA (UNet keys)", re.compile(rf"lora_te2_|(?:lora_unet_|unet\.).*{_UNET}.*transformer_blocks[._][2-9]")),
    ("Stable Diffusion LoRA (UNet keys)", re.compile(rf"(?:lora_unet_|unet\.).*{_UNET}|lora_te1?_text_model")),
    ("Qwen-Image LoRA", re.compile(r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|img_mod|txt_mod)")),
    ("FLUX LoRA", re.compile(r"double_blocks|single_blocks|single_transformer_blocks|context_embedder|double_stream")),
    ("Stable Diffusion 3 LoRA", re.compile(r"joint_blocks|transformer_blocks[._]\d+[._](?:attn|ff_context|ff)[._]")),
    ("Wan LoRA", re.compile(r"blocks[._]\d+[._](?:self_attn|cross_attn)[._]")),
)
"""The first pattern that any key meets names the family; the specific stand before the general."""

KINDS = (
    ("LoRA of convolutions", re.compile(r"lora_mid|lokr_t2|hada_t[12]")),
    ("OFT", re.compile(r"oft_(?:r|blocks)")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
)


def detect_family(keys: Iterable[str]) -> str | None:
    """The family of models that a file with these keys was made for; None: nothing speaks against Z-Image."""
    found = list(keys)
    return next((name for name, pattern in FAMILIES if any(pattern.search(key) for key in found)), None)


def wrong_family_hint(keys: Iterable[str]) -> str:
    """What to do with keys that this trainer does not read."""
    found = list(keys)
    for name, pattern in KINDS:
        if any(pattern.search(key) for key in found):
            return f"it looks like {name}, which is not read here"
    if any(key.endswith("attention_norm1.weight") for key in found):
        return "it is a whole model: give it as MODEL, or make a LoRA of what it changes with lora extract"
    return "is it a LoRA of Z-Image?" if found else "a part of it is missing or of another file; get the file again"
