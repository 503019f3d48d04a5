"""Names in ComfyUI's own Z-Image model and those of diffusers (torch-free).

They differ in the fused q, k and v, the way out of attention, two norms and the ends of the model.
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
"""diffusers' part of a name and ComfyUI's, but for the fused one."""


def to_native(name: str) -> tuple[str, int | None]:
    """What ComfyUI calls the module or tensor `name`, and the third of a fused one that it is there."""
    for index, third in enumerate(THIRDS):
        if f".{third}." in f".{name}.":
            return name.replace(third, FUSED), index
    for ours, theirs in PAIRS:
        if f".{ours}." in f".{name}.":
            name = name.replace(ours, theirs)
    return name, None


def from_native(name: str) -> list[tuple[str, int | None]]:
    """diffusers' name(s) of ComfyUI's `name`, each with the third of a fused one that it is; its own stay."""
    if f".{FUSED}." in f".{name}.":
        return [(name.replace(FUSED, third), index) for index, third in enumerate(THIRDS)]
    for ours, theirs in PAIRS:
        if f".{theirs}." in f".{name}." and f".{ours}." not in f".{name}.":
            name = name.replace(theirs, ours)
    return [(name, None)]
