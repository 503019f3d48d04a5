"""Configs with their reasons: four kinds of LoRA on three models, for anybody's images or for those of one folder.

`scripts/generate.py` writes the former into configs/, `init` the latter. Torch-free.
"""

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SubjectKind:
    """What is taught."""

    what: str
    images: list[str]
    trigger: str
    enough: tuple[int, int]
    """Images that people have good results with."""
    bias: str
    why_bias: str
    prompts: list[str]
    """With the trigger."""
    neutral: list[str]
    """Without: they show whether the LoRA leaks."""


@dataclass(frozen=True)
class ModelTemplate:
    """What it is trained on."""

    what: str
    model: list[str]
    """Lines of the model section."""
    also: bool
    """Whether previews are drawn on Turbo too."""
    notes: list[str]


SUBJECT_KINDS = {
    "character": SubjectKind(
        what="A person or character",
        images=[
            "12 to 30 images: close-up and full body, several angles, lights and clothes. A caption says what",
            "changes from image to image, and not what belongs to the person.",
        ],
        trigger="zchar",
        enough=(12, 30),
        bias="balanced",
        why_bias="low_noise, slightly, where face, hands or skin stay vague",
        prompts=[
            "a photo of zchar in a sunlit garden, half body",
            "zchar reading a newspaper in a cafe, close-up",
            "zchar hiking in the mountains, full body",
        ],
        neutral=["a photo of a person in a sunlit garden, half body", "a red bicycle leaning against a brick wall"],
    ),
    "style": SubjectKind(
        what="A style",
        images=[
            "15 to 40 images of many subjects in the one style. Captions describe the scene, and never the style:",
            "what no caption explains is what the trigger comes to mean.",
        ],
        trigger="zstyle",
        enough=(15, 40),
        bias="high_noise",
        why_bias="composition, mood and style are decided at high noise",
        prompts=[
            "zstyle, a lighthouse on a cliff at dusk",
            "zstyle, two friends laughing at a kitchen table",
            "zstyle, a fox in tall grass",
        ],
        neutral=["a lighthouse on a cliff at dusk", "a photo of two friends laughing at a kitchen table"],
    ),
    "product": SubjectKind(
        what="A product",
        images=[
            "12 to 30 images: every side, on different grounds, in use and alone. Captions name the surroundings, so",
            "that they are not learned with the product.",
        ],
        trigger="zproduct",
        enough=(12, 30),
        bias="balanced",
        why_bias="low_noise where labels and textures stay vague",
        prompts=[
            "a studio photo of zproduct on a white background",
            "zproduct on a wooden table beside a window",
            "a hand holding zproduct outdoors, shallow depth of field",
        ],
        neutral=["a studio photo of a bottle on a white background", "a wooden table beside a window"],
    ),
    "concept": SubjectKind(
        what="A concept: a pose, a garment, a composition",
        images=[
            "15 to 40 images in which only the concept is the same: other people, places, lights. Captions describe",
            "everything else.",
        ],
        trigger="zconcept",
        enough=(15, 40),
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
MODEL_TEMPLATES = {
    "turbo": ModelTemplate(
        what="Z-Image-Turbo",
        model=[
            "variant: turbo",
            "adapter: v2  # takes the damage to the 8 steps, and stays out of the LoRA; if unstable, v1",
        ],
        also=False,
        notes=[],
    ),
    "deturbo": ModelTemplate(
        what="Z-Image-De-Turbo",
        model=["variant: deturbo"],
        also=True,
        notes=[
            "De-Turbo needs no adapter, for longer trainings than Turbo bears; draw on it with 20 to 30 steps at",
            "g 1 to 2 (CFG 2 to 3). Previews on Turbo stand beside its own.",
        ],
    ),
    "base": ModelTemplate(
        what="Z-Image (Base)",
        model=["variant: base"],
        also=True,
        notes=[
            "Draw on Base with 28 to 50 steps at g 2 to 4 (CFG 3 to 5). A LoRA of Base is often weaker on Turbo:",
            "previews on Turbo stand beside its own.",
        ],
    ),
}


@dataclass(frozen=True)
class TemplateValues:
    """What is known of one folder of images; as it is by default, of nobody's."""

    folder: str = "photos"
    name: str | None = None
    trigger: str | None = None
    """None: the kind's example."""
    resolution: tuple[int, ...] = (512, 768, 1024)
    why_resolution: str = "1024 alone: fewer samples an epoch, longer steps"
    steps: int = 3000
    why_steps: str = "1500 to 2200 with fewer than 10 images"
    by_folder: bool = False
    """Whether the names of subfolders say how often their images are seen."""
    mask: str | None = None
    captions: tuple[str, ...] = ()
    """Of the images, as prompts that show whether they are learned."""
    miniature: tuple[str, str] | None = None
    """Paths of the model and the adapter to try everything on, without a GPU."""
    header: tuple[str, ...] = (
        "Needs an NVIDIA card; weights are downloaded from the hub on the first start. docs/recipes.md says what to",
        "change when. Written by scripts/generate.py.",
    )


DEFAULT_VALUES = TemplateValues()
TRIGGER = "[trigger]"
MINIATURE_PROMPTS = [f"a red {TRIGGER} on a blue background", f"a green {TRIGGER} on a white background", TRIGGER]
MINIATURE_NEUTRAL = ["a red circle on a blue background", "a green square on a white background"]
"""All that the miniature knows are shapes and colours."""


def render_template(base_name: str, kind_name: str, own: TemplateValues = DEFAULT_VALUES) -> str:
    """A config, with comments."""
    base, kind = MODEL_TEMPLATES[base_name], SUBJECT_KINDS[kind_name]
    name = own.name or (f"my_{kind_name}" if base_name == "turbo" else f"my_{kind_name}_{base_name}")
    bias = [f"timesteps:\n  bias: {kind.bias}  # {kind.why_bias}"] if kind.bias != "balanced" else []
    also = base.also and own.miniature is None
    where = "the miniature" if own.miniature else base.what
    lines = [
        f"# {kind.what} on {where}: images in {own.folder}/, a .txt caption beside each.",
        *(f"# {line}" for line in (*kind.images, *base.notes, *own.header)),
        f"name: {_scalar(name)}",
        "model:",
        *(f"  {line}" for line in _model(base, own)),
        "data:",
        f"  - folder: {_scalar(own.folder)}",
        f"    resolution: [{', '.join(map(str, own.resolution))}]  # {own.why_resolution}",
        *(["    repeats: by_folder  # 10_cat is seen ten times as often as 1_dog"] if own.by_folder else []),
        f"    trigger: {_scalar(own.trigger or kind.trigger)}",
        '    default_caption: "[trigger]"  # for images without a caption',
        "    caption_dropout: 0.05",
        *([f"    mask: {_scalar(own.mask)}  # white is trained"] if own.mask else []),
        "lora:",
        "  rank: 16  # 8 for something subtle",
        "train:",
        f"  steps: {own.steps}  # {own.why_steps}",
        *(["  batch_size: 4"] if own.miniature else []),
        *bias,
        *_optimizer(own),
        "sample:",
        f"  every: {100 if own.miniature else 250}",
        *(["  width: 96", "  height: 96"] if own.miniature else []),
        *(["  compare_on: turbo  # each preview on Turbo too; null saves downloading its 12 GB"] if also else []),
        "  prompts:",
        *(f"    - {line}" for line in _prompts(kind, own)),
    ]
    return "\n".join(lines) + "\n"


def _model(base: ModelTemplate, own: TemplateValues) -> list[str]:
    if own.miniature is None:
        return base.model
    path, adapter = own.miniature
    return [f"path: {_scalar(path)}", f"adapter: {_scalar(adapter)}", "dtype: fp32"]


def _optimizer(own: TemplateValues) -> list[str]:
    if own.miniature:
        rate = "2.0e-3  # the miniature wants more than the 6 B model, whose rate is 1.0e-4"
        return ["optimizer:", "  name: adamw", f"  lr: {rate}"]
    rate = "1.0e-4  # 5.0e-5 to 8.0e-5 if images get noisy; never 2.0e-4 on Turbo"
    return ["optimizer:", "  name: adamw8bit", f"  lr: {rate}"]


def _prompts(kind: SubjectKind, own: TemplateValues) -> list[str]:
    """With the trigger, then without, which shows whether the LoRA leaks."""
    trigger = own.trigger or kind.trigger
    prompts, without = (MINIATURE_PROMPTS, MINIATURE_NEUTRAL) if own.miniature else (kind.prompts, kind.neutral)
    taught = [_scalar(prompt.replace(TRIGGER if own.miniature else kind.trigger, trigger)) for prompt in prompts]
    learned = [f"{_scalar(caption)}  # a caption of yours" for caption in own.captions]
    neutral = [_scalar(prompt) for prompt in without]
    return [*taught, *learned, f"{neutral[0]}  # without the trigger: shows whether the LoRA leaks", *neutral[1:]]


def _scalar(text: str) -> str:
    """`text` as YAML, plain where that is the same text to every reader."""
    is_plain = re.fullmatch(r"[A-Za-z_./][\w ,./+()'-]*", text) and not text.endswith((" ", "."))
    is_word = text.lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~")
    return text if is_plain and not is_word else json.dumps(text, ensure_ascii=False)
