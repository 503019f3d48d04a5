"""What a training method wants of the rest of a config, and what of it does not go with it (torch-free)."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field

from zimage_train.config.dataset import DataEntry
from zimage_train.config.section import Section

MethodName = Literal["sft", "trajectory_imitation", "de_distill"]


class TeacherSettings(Section):
    steps: int = Field(default=50, ge=9, le=1000)
    """Steps in which trajectory_imitation draws what is to be imitated."""
    guidance: float = Field(default=1.0, ge=0.0, le=50.0)
    """Guidance g (CFG scale - 1) of it."""


IMAGE_ONLY_SETTINGS = ("flip", "mask", "shuffle_tags", "tag_dropout", "caption_lines")
"""Settings of `data` that speak of images, or of captions that change, where neither is trained on."""


def uses_generated_data(method: MethodName) -> bool:
    """Whether the model is trained on what it draws itself, and images give but their captions and sizes."""
    return method != "sft"


def fill_method_defaults(values: Any) -> Any:
    """`values` of a config, with what is left out as its method needs it: no adapter, captions that are not dropped."""
    train = values.get("train") if isinstance(values, dict) else None
    method = train.get("method", "sft") if isinstance(train, dict) else "sft"
    if method == "sft":
        return values
    values, model, data = dict(values), values.get("model"), values.get("data")
    if model is None or (isinstance(model, dict) and "adapter" not in model):
        values["model"] = {**(model or {}), "adapter": None}
    if method == "trajectory_imitation" and isinstance(data, list):
        values["data"] = [{"caption_dropout": 0.0, **one} if isinstance(one, dict) else one for one in data]
    return values


def method_error(
    method: MethodName, variant: str, adapter: str | None, init_from: str | None, data: Sequence[DataEntry]
) -> str | None:
    """What of a config does not go with its method."""
    if method == "sft":
        bare = [index for index, entry in enumerate(data) if entry.prompts is not None]
        ways = " or ".join(one for one in get_args(MethodName) if uses_generated_data(one))
        return (
            f"data.{bare[0]}.prompts has no images to train on; give folder, or train.method: {ways}" if bare else None
        )
    if adapter is not None:
        return f"train.method: {method} learns from the model without adapter; set model.adapter: null"
    for index, entry in enumerate(data):
        changed = [name for name in IMAGE_ONLY_SETTINGS if getattr(entry, name) != DataEntry.model_fields[name].default]
        if method == "trajectory_imitation" and entry.caption_dropout:
            changed.append("caption_dropout")
        if changed:
            return f"train.method: {method} does not train on images; leave data.{index}.{changed[0]} out"
    if method == "trajectory_imitation" and variant != "turbo":
        return "train.method: trajectory_imitation is for Turbo's 8 steps; set model.variant: turbo"
    if method == "trajectory_imitation" and init_from is None:
        return "train.method: trajectory_imitation needs lora.init_from, the LoRA that it repairs"
    return None
