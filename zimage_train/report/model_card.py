"""The model card of a LoRA: what the hub shows of it, and how it is used (torch-free).

It holds names and settings, but no path and no user.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from zimage_train import __version__
from zimage_train.config.sample import ExtraLora
from zimage_train.config.schema import Config
from zimage_train.config.types import without_folder
from zimage_train.config.variants import VARIANTS, Variant
from zimage_train.diffusion.request import SamplingRequest

TAGS = ("text-to-image", "lora", "diffusers", "template:diffusion-lora", "z-image")
"""The hub shows the gallery of a card with `template:diffusion-lora`."""


@dataclass(frozen=True)
class CardContent:
    """The LoRA that a card is of."""

    config: Config
    lora: str
    """Name of its file."""
    step: int
    images: list[tuple[str, SamplingRequest]]
    """Path in the repository and request of each image of the gallery; the first stands for the LoRA."""
    workflow: str | None
    """Name of its ComfyUI workflow."""
    num_pictures: int | None
    """How many images it was trained on, if known."""


def model_card(content: CardContent, license_name: str | None, repository: str | None) -> str:
    """Return the README.md of a LoRA, which may be uploaded to `repository` (ORG/REPO)."""
    config = content.config
    parts = [
        f"---\n{_header(config, content.images, license_name)}\n---",
        f"# {config.name}",
        "<Gallery />" if content.images else "",
        _trigger_section(config.triggers),
        _usage_section(content, repository),
        _settings_section(config, content.step, content.num_pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(config: Config, images: Sequence[tuple[str, SamplingRequest]], license_name: str | None) -> str:
    widget = []
    for path, request in images:
        entry: dict[str, Any] = {"text": request.prompt, "output": {"url": path}}
        if request.negative and request.guidance > 0:
            entry["parameters"] = {"negative_prompt": request.negative}
        widget.append(entry)
    optional: dict[str, Any] = {"widget": widget} if widget else {}
    if config.triggers:
        optional["instance_prompt"] = ", ".join(config.triggers)
    data = ModelCardData(
        base_model=base_model(config),
        base_model_relation="adapter",
        library_name="diffusers",
        license=license_name,
        pipeline_tag="text-to-image",
        tags=list(TAGS),
        **optional,
    )
    return data.to_yaml().strip()


def base_model(config: Config) -> str:
    """Return the hub id of the model that was trained on: that of the variant, if it was a path."""
    label = config.model.label.partition("@")[0]
    return label if "/" in label else VARIANTS[config.model.variant].transformer


def _trigger_section(triggers: Sequence[str]) -> str:
    if not triggers:
        return ""
    words = ", ".join(f"`{trigger}`" for trigger in triggers)
    return f"## Trigger\n\nWrite {words} in the prompt."


def _usage_section(content: CardContent, repository: str | None) -> str:
    config, lora, images = content.config, content.lora, content.images
    variant = _used_on(config)
    is_as_trained = VARIANTS[config.model.variant] is variant
    request = images[0][1] if images else None
    prompt = request.prompt if request else ", ".join(config.triggers) or "a photo"
    steps, guidance, size = variant.steps, variant.guidance, (1024, 1024)
    if request is not None:
        size = (request.width, request.height)
        if is_as_trained:
            steps, guidance = request.steps, request.guidance
    workflow = f" `{content.workflow}` is such a workflow; drop it onto the canvas." if content.workflow else ""
    source = f'"{repository}", weight_name="{lora}"' if repository else f'"{lora}"'
    return f"""## Use

With diffusers:

```python
import torch
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("{variant.extras}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights({source})
image = pipe(
    {json.dumps(prompt, ensure_ascii=False)},
    num_inference_steps={steps},
    guidance_scale={guidance:g},
    width={size[0]},
    height={size[1]},
).images[0]
```

With ComfyUI: put `{lora}` into `models/loras`, and load it with the node LoraLoaderModelOnly after the model
(`{variant.comfyui}`): {steps} steps, euler, simple, CFG {guidance + 1:g}, ModelSamplingAuraFlow with shift \
{variant.shift:g}.{workflow}"""


def _used_on(config: Config) -> Variant:
    """Return the variant that the LoRA is used on: one trained on De-Turbo is used on Turbo."""
    return VARIANTS["turbo" if config.model.variant == "deturbo" else config.model.variant]


def _settings_section(config: Config, step: int, num_pictures: int | None) -> str:
    train, lora, optimizer = config.train, config.lora, config.optimizer
    concept = [entry for entry in config.data if not entry.regularization]
    sides: set[int] = set()
    for entry in concept:
        sides |= {math.isqrt(entry.max_pixels)} if entry.max_pixels is not None else set(entry.resolution)
    rows: dict[str, object] = {"base model": f"`{base_model(config)}`"}
    if config.model.adapter is not None:
        rows["training adapter"] = f"{without_folder(config.model.adapter)}, strength {config.model.adapter_strength:g}"
    if config.train.beside:
        rows["trained beside"] = _names_of(config.train.beside)
    rows |= {"method": train.method, "steps": step}
    if num_pictures is not None:
        rows["images"] = num_pictures
    rows |= {
        "resolution": ", ".join(map(str, sorted(sides))),
        "batch size": f"{train.batch_size} x {train.grad_accumulation} accumulated",
        "adapter": lora.description,
        "alpha": f"{lora.alpha or lora.rank or 'none'}{', over the root of the rank' if lora.rslora else ''}",
        "modules": lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}",
        "schedule": f"{config.schedule.name}, {config.schedule.warmup_steps} steps of warm-up",
        "noise levels": config.timesteps.summary,
        "precision": config.model.dtype if config.model.quantize is None else config.model.quantize,
    }
    for name, section in (("loss", config.loss), ("guidance", config.guidance)):
        changed = section.model_dump(exclude_defaults=True)
        if changed:
            rows[name] = ", ".join(f"{key} {value}" for key, value in changed.items())
    if config.preserve.kind is not None:
        rows["preservation"] = f"{config.preserve.kind}, weight {config.preserve.weight:g}"
    if config.sample.extra_loras:
        rows["previews drawn with"] = f"this LoRA and {_names_of(config.preview_loras)}"
    if config.ema.decay is not None:
        rows["averaged weights"] = f"decay {config.ema.decay:g}"
    rows |= {"seed": config.seed, "trained with": f"zimage-train {__version__}"}
    lines = ["## Training", "", "| setting | value |", "|---|---|"]
    for name, value in rows.items():
        cell = str(value).replace("|", "\\|")
        lines.append(f"| {name} | {cell} |")
    return "\n".join(lines)


def _names_of(loras: Sequence[ExtraLora]) -> str:
    return ", ".join(f"{without_folder(lora.file)} at {lora.weight:g}" for lora in loras)


def gallery_path(preview: Path) -> str:
    """Return where the image of a preview is in the repository."""
    return f"images/{preview.name}"
