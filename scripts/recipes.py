"""The recipes in configs/: four kinds of LoRA on three models, each with its reasons. generate.py writes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What is taught."""

    what: str
    pictures: list[str]
    trigger: str
    bias: str
    why_bias: str
    prompts: list[str]
    """With the trigger."""
    neutral: list[str]
    """Without: they show whether the LoRA leaks."""


@dataclass(frozen=True)
class Base:
    """What it is trained on."""

    what: str
    model: list[str]
    """Lines of the model section."""
    also: bool
    """Whether previews are drawn on Turbo too."""
    notes: list[str]


KINDS = {
    "character": Kind(
        what="A person or character",
        pictures=[
            "12 to 30 pictures: close-up and full body, several angles, lights and clothes. A caption says what",
            "changes from picture to picture, and not what belongs to the person.",
        ],
        trigger="zchar",
        bias="balanced",
        why_bias="low_noise, slightly, where face, hands or skin stay vague",
        prompts=[
            "a photo of zchar in a sunlit garden, half body",
            "zchar reading a newspaper in a cafe, close-up",
            "zchar hiking in the mountains, full body",
        ],
        neutral=["a photo of a person in a sunlit garden, half body", "a red bicycle leaning against a brick wall"],
    ),
    "style": Kind(
        what="A style",
        pictures=[
            "15 to 40 pictures of many subjects in the one style. Captions describe the scene, and never the style:",
            "what no caption explains is what the trigger comes to mean.",
        ],
        trigger="zstyle",
        bias="high_noise",
        why_bias="composition, mood and style are decided at high noise",
        prompts=[
            "zstyle, a lighthouse on a cliff at dusk",
            "zstyle, two friends laughing at a kitchen table",
            "zstyle, a fox in tall grass",
        ],
        neutral=["a lighthouse on a cliff at dusk", "a photo of two friends laughing at a kitchen table"],
    ),
    "product": Kind(
        what="A product",
        pictures=[
            "12 to 30 pictures: every side, on different grounds, in use and alone. Captions name the surroundings, so",
            "that they are not learned with the product.",
        ],
        trigger="zproduct",
        bias="balanced",
        why_bias="low_noise where labels and textures stay vague",
        prompts=[
            "a studio photo of zproduct on a white background",
            "zproduct on a wooden table beside a window",
            "a hand holding zproduct outdoors, shallow depth of field",
        ],
        neutral=["a studio photo of a bottle on a white background", "a wooden table beside a window"],
    ),
    "concept": Kind(
        what="A concept: a pose, a garment, a composition",
        pictures=[
            "15 to 40 pictures in which only the concept is the same: other people, places, lights. Captions describe",
            "everything else.",
        ],
        trigger="zconcept",
        bias="high_noise",
        why_bias="composition is decided at high noise; balanced for a thing with detail",
        prompts=[
            "a photo of a woman, zconcept, in a park",
            "an old man, zconcept, in a workshop",
            "an oil painting of a child, zconcept",
        ],
        neutral=["a photo of a woman in a park", "an old man in a workshop"],
    ),
}
BASES = {
    "turbo": Base(
        what="Z-Image-Turbo",
        model=[
            "variant: turbo",
            "adapter: v2  # takes the damage to the 8 steps, and stays out of the LoRA; if unstable, v1",
        ],
        also=False,
        notes=[],
    ),
    "deturbo": Base(
        what="Z-Image-De-Turbo",
        model=["variant: deturbo"],
        also=True,
        notes=[
            "De-Turbo needs no adapter, for longer trainings than Turbo bears; draw on it with 20 to 30 steps at",
            "g 1 to 2 (CFG 2 to 3). Previews on Turbo stand beside its own.",
        ],
    ),
    "base": Base(
        what="Z-Image (Base)",
        model=["variant: base"],
        also=True,
        notes=[
            "Draw on Base with 28 to 50 steps at g 2 to 4 (CFG 3 to 5). A LoRA of Base is often weaker on Turbo:",
            "previews on Turbo stand beside its own.",
        ],
    ),
}


def text(base_name: str, kind_name: str) -> str:
    """configs/BASE_KIND.yaml."""
    base, kind = BASES[base_name], KINDS[kind_name]
    name = f"my_{kind_name}" if base_name == "turbo" else f"my_{kind_name}_{base_name}"
    bias = [f"timesteps:\n  bias: {kind.bias}  # {kind.why_bias}"] if kind.bias != "balanced" else []
    lines = [
        f"# {kind.what} on {base.what}: pictures in photos/, a .txt caption beside each.",
        *(f"# {line}" for line in (*kind.pictures, *base.notes)),
        "# Needs an NVIDIA card; weights are downloaded from the hub on the first start. docs/recipes.md says what to",
        "# change when. Written by scripts/generate.py.",
        f"name: {name}",
        "model:",
        *(f"  {line}" for line in base.model),
        "data:",
        "  - folder: photos",
        "    resolution: [512, 768, 1024]  # 1024 alone: fewer samples an epoch, longer steps",
        f"    trigger: {kind.trigger}",
        '    default_caption: "[trigger]"  # for pictures without a caption',
        "    caption_dropout: 0.05",
        "lora:",
        "  rank: 16  # 8 for something subtle",
        "train:",
        "  steps: 3000  # 1500 to 2200 with fewer than 10 pictures",
        *bias,
        "optimizer:",
        "  name: adamw8bit",
        "  lr: 1.0e-4  # 5.0e-5 to 8.0e-5 if pictures get noisy; never 2.0e-4 on Turbo",
        "sample:",
        "  every: 250",
        *(["  also: turbo  # each preview on Turbo too; null saves downloading its 12 GB"] if base.also else []),
        "  prompts:",
        *(f"    - {prompt}" for prompt in kind.prompts),
        f"    - {kind.neutral[0]}  # without the trigger: shows whether the LoRA leaks",
        *(f"    - {prompt}" for prompt in kind.neutral[1:]),
    ]
    return "\n".join(lines) + "\n"
