"""Conversion of parameter names between ComfyUI's own Z-Image model and diffusers (torch-free).

They differ in the fused q, k and v, the output projection of attention, two norms, and the first and last layer.
Source: diffusers' single-file conversion for Z-Image, and ComfyUI's `z_image_to_diffusers`.
"""

FUSED = "attention.qkv"
THIRDS = ("attention.to_q", "attention.to_k", "attention.to_v")
PAIRS = (
    ("attention.to_out.0", "attention.out"),
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
    ("all_x_embedder.2-1", "x_embedder"),
    ("all_final_layer.2-1", "final_layer"),
)
"""(diffusers' part of a name, ComfyUI's), except for the fused projection."""


def to_native(name: str) -> tuple[str, int | None]:
    """Return ComfyUI's name of diffusers' `name`, and which third of the fused tensor it is, or None if not fused."""
    for index, third in enumerate(THIRDS):
        if f".{third}." in f".{name}.":
            return name.replace(third, FUSED), index
    for diffusers_part, comfyui_part in PAIRS:
        if f".{diffusers_part}." in f".{name}.":
            name = name.replace(diffusers_part, comfyui_part)
    return name, None


def from_native(name: str) -> list[tuple[str, int | None]]:
    """Return diffusers' names of ComfyUI's `name`, each with its third of the fused tensor, or None if not fused.

    A name that is diffusers' already is returned as it is.
    """
    if f".{FUSED}." in f".{name}.":
        return [(name.replace(FUSED, third), index) for index, third in enumerate(THIRDS)]
    for diffusers_part, comfyui_part in PAIRS:
        if f".{comfyui_part}." in f".{name}." and f".{diffusers_part}." not in f".{name}.":
            name = name.replace(comfyui_part, diffusers_part)
    return [(name, None)]
