"""Templates of configs, with reasons as comments: four kinds of subject on three models (torch-free).

`scripts/generate.py` renders them with default values into configs/, and `init` with the values of an image folder.
"""

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SubjectKind:
    """A kind of subject that a LoRA can learn."""

    description: str
    image_advice: list[str]
    """Lines of a comment on images and captions."""
    trigger: str
    image_range: tuple[int, int]
    """Smallest and largest number of images that is usual for good results."""
    bias: str
    """`timesteps.bias`; balanced is the default, and not written."""
    bias_reason: str
    prompts: list[str]
    """Previews with the trigger."""
    neutral_prompts: list[str]
    """Previews without the trigger, which show whether the LoRA leaks into other images."""


@dataclass(frozen=True)
class ModelTemplate:
    """A model that is trained."""

    description: str
    model: list[str]
    """Lines of the model section."""
    compares_on_turbo: bool
    """Whether previews are drawn on Turbo too."""
    notes: list[str]
    """Lines of a comment on the model."""


SUBJECT_KINDS = {
    "character": SubjectKind(
        description="A person or character",
        image_advice=[
            "12 to 30 images: close-up and full body, several angles, lights and clothes. A caption says what",
            "changes from image to image, and not what belongs to the person.",
        ],
        trigger="zchar",
        image_range=(12, 30),
        bias="balanced",
        bias_reason="low_noise, slightly, where face, hands or skin stay vague",
        prompts=[
            "a photo of zchar in a sunlit garden, half body",
            "zchar reading a newspaper in a cafe, close-up",
            "zchar hiking in the mountains, full body",
        ],
        neutral_prompts=[
            "a photo of a person in a sunlit garden, half body",
            "a red bicycle leaning against a brick wall",
        ],
    ),
    "style": SubjectKind(
        description="A style",
        image_advice=[
            "15 to 40 images of many subjects in the one style. Captions describe the scene, and never the style:",
            "what no caption explains is what the trigger comes to mean.",
        ],
        trigger="zstyle",
        image_range=(15, 40),
        bias="high_noise",
        bias_reason="composition, mood and style are decided at high noise",
        prompts=[
            "zstyle, a lighthouse on a cliff at dusk",
            "zstyle, two friends laughing at a kitchen table",
            "zstyle, a fox in tall grass",
        ],
        neutral_prompts=["a lighthouse on a cliff at dusk", "a photo of two friends laughing at a kitchen table"],
    ),
    "product": SubjectKind(
        description="A product",
        image_advice=[
            "12 to 30 images: every side, on different grounds, in use and alone. Captions name the surroundings, so",
            "that they are not learned with the product.",
        ],
        trigger="zproduct",
        image_range=(12, 30),
        bias="balanced",
        bias_reason="low_noise where labels and textures stay vague",
        prompts=[
            "a studio photo of zproduct on a white background",
            "zproduct on a wooden table beside a window",
            "a hand holding zproduct outdoors, shallow depth of field",
        ],
        neutral_prompts=["a studio photo of a bottle on a white background", "a wooden table beside a window"],
    ),
    "concept": SubjectKind(
        description="A concept: a pose, a garment, a composition",
        image_advice=[
            "15 to 40 images in which only the concept is the same: other people, places, lights. Captions describe",
            "everything else.",
        ],
        trigger="zconcept",
        image_range=(15, 40),
        bias="high_noise",
        bias_reason="composition is decided at high noise; balanced for a thing with detail",
        prompts=[
            "a photo of a woman, zconcept, in a park",
            "an old man, zconcept, in a workshop",
            "an oil painting of a child, zconcept",
        ],
        neutral_prompts=["a photo of a woman in a park", "an old man in a workshop"],
    ),
}
MODEL_TEMPLATES = {
    "turbo": ModelTemplate(
        description="Z-Image-Turbo",
        model=[
            "variant: turbo",
            "adapter: v2  # takes the damage to the 8 steps, and stays out of the LoRA; if unstable, v1",
        ],
        compares_on_turbo=False,
        notes=[],
    ),
    "deturbo": ModelTemplate(
        description="Z-Image-De-Turbo",
        model=["variant: deturbo"],
        compares_on_turbo=True,
        notes=[
            "De-Turbo needs no adapter, for longer trainings than Turbo bears; draw on it with 20 to 30 steps at",
            "g 1 to 2 (CFG 2 to 3). Previews on Turbo stand beside its own.",
        ],
    ),
    "base": ModelTemplate(
        description="Z-Image (Base)",
        model=["variant: base"],
        compares_on_turbo=True,
        notes=[
            "Draw on Base with 28 to 50 steps at g 2 to 4 (CFG 3 to 5). A LoRA of Base is often weaker on Turbo:",
            "previews on Turbo stand beside its own.",
        ],
    ),
}


@dataclass(frozen=True)
class TemplateValues:
    """The values of a config that depend on the image folder; the defaults are those of configs/."""

    folder: str = "photos"
    name: str | None = None
    trigger: str | None = None
    """None takes the example of the kind."""
    resolution: tuple[int, ...] = (512, 768, 1024)
    resolution_reason: str = "1024 alone: fewer samples an epoch, longer steps"
    steps: int = 3000
    steps_reason: str = "1500 to 2200 with fewer than 10 images"
    repeats_by_folder: bool = False
    """Whether `repeats: by_folder` is written."""
    mask: str | None = None
    captions: tuple[str, ...] = ()
    """Captions of the images, as prompts that show whether these are learned."""
    miniature: tuple[str, str] | None = None
    """Paths of the miniature model and its adapter, for a trial without a GPU; None is a training on a real model."""
    header: tuple[str, ...] = (
        "Needs an NVIDIA card; weights are downloaded from the hub on the first start. docs/recipes.md says what to",
        "change when. Written by scripts/generate.py.",
    )


DEFAULT_VALUES = TemplateValues()
TRIGGER = "[trigger]"
MINIATURE_PROMPTS = [f"a red {TRIGGER} on a blue background", f"a green {TRIGGER} on a white background", TRIGGER]
MINIATURE_NEUTRAL_PROMPTS = ["a red circle on a blue background", "a green square on a white background"]
"""The miniature was trained on shapes and colours only."""


def render_template(model_name: str, kind_name: str, values: TemplateValues = DEFAULT_VALUES) -> str:
    """Return the text of a config for a name in `MODEL_TEMPLATES` and a kind in `SUBJECT_KINDS`."""
    model, kind = MODEL_TEMPLATES[model_name], SUBJECT_KINDS[kind_name]
    default_name = f"my_{kind_name}" if model_name == "turbo" else f"my_{kind_name}_{model_name}"
    model_description = "the miniature" if values.miniature else model.description
    lines = [
        f"# {kind.description} on {model_description}: images in {values.folder}/, a .txt caption beside each.",
        *(f"# {line}" for line in (*kind.image_advice, *model.notes, *values.header)),
        f"name: {_scalar(values.name or default_name)}",
        *_model_section(model, values),
        *_data_section(kind, values),
        "lora:",
        "  rank: 16  # 8 for something subtle",
        "train:",
        f"  steps: {values.steps}  # {values.steps_reason}",
    ]
    if values.miniature:
        lines.append("  batch_size: 4")
    if kind.bias != "balanced":
        lines += ["timesteps:", f"  bias: {kind.bias}  # {kind.bias_reason}"]
    lines += [*_optimizer_section(values), *_sample_section(model, kind, values)]
    return "\n".join(lines) + "\n"


def _model_section(model: ModelTemplate, values: TemplateValues) -> list[str]:
    lines = model.model
    if values.miniature is not None:
        path, adapter = values.miniature
        lines = [f"path: {_scalar(path)}", f"adapter: {_scalar(adapter)}", "dtype: fp32"]
    return ["model:", *(f"  {line}" for line in lines)]


def _data_section(kind: SubjectKind, values: TemplateValues) -> list[str]:
    lines = [
        "data:",
        f"  - folder: {_scalar(values.folder)}",
        f"    resolution: [{', '.join(map(str, values.resolution))}]  # {values.resolution_reason}",
    ]
    if values.repeats_by_folder:
        lines.append("    repeats: by_folder  # 10_cat is seen ten times as often as 1_dog")
    lines += [
        f"    trigger: {_scalar(values.trigger or kind.trigger)}",
        '    default_caption: "[trigger]"  # for images without a caption',
        "    caption_dropout: 0.05",
    ]
    if values.mask:
        lines.append(f"    mask: {_scalar(values.mask)}  # white is trained")
    return lines


def _optimizer_section(values: TemplateValues) -> list[str]:
    if values.miniature:
        lr = "2.0e-3  # the miniature wants more than the 6 B model, whose rate is 1.0e-4"
        return ["optimizer:", "  name: adamw", f"  lr: {lr}"]
    lr = "1.0e-4  # 5.0e-5 to 8.0e-5 if images get noisy; never 2.0e-4 on Turbo"
    return ["optimizer:", "  name: adamw8bit", f"  lr: {lr}"]


def _sample_section(model: ModelTemplate, kind: SubjectKind, values: TemplateValues) -> list[str]:
    lines = ["sample:", f"  every: {100 if values.miniature else 250}"]
    if values.miniature:
        lines += ["  width: 96", "  height: 96"]
    elif model.compares_on_turbo:
        lines.append("  compare_on: turbo  # each preview on Turbo too; null saves downloading its 12 GB")
    lines.append("  prompts:")
    for prompt in _preview_prompts(kind, values):
        lines.append(f"    - {prompt}")
    return lines


def _preview_prompts(kind: SubjectKind, values: TemplateValues) -> list[str]:
    """Return prompts as YAML: with the trigger, captions of the images, and without the trigger."""
    if values.miniature:
        placeholder, prompts, neutral_prompts = TRIGGER, MINIATURE_PROMPTS, MINIATURE_NEUTRAL_PROMPTS
    else:
        placeholder, prompts, neutral_prompts = kind.trigger, kind.prompts, kind.neutral_prompts
    trigger = values.trigger or kind.trigger
    lines = [_scalar(prompt.replace(placeholder, trigger)) for prompt in prompts]
    lines += [f"{_scalar(caption)}  # a caption of yours" for caption in values.captions]
    first, *others = [_scalar(prompt) for prompt in neutral_prompts]
    return [*lines, f"{first}  # without the trigger: shows whether the LoRA leaks", *others]


def _scalar(text: str) -> str:
    """Return `text` as YAML, without quotes if every reader takes it as the same text."""
    is_plain = re.fullmatch(r"[A-Za-z_./][\w ,./+()'-]*", text) and not text.endswith((" ", "."))
    is_word = text.lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~")
    return text if is_plain and not is_word else json.dumps(text, ensure_ascii=False)
