"""The training methods: what each trains on and needs, and which settings do not go with it (torch-free).

To add one: its name and `TrainingMethod` here, and its batches in training/self_distill.py or training/loss.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from zimage_train.config.dataset import DataEntry
from zimage_train.config.types import ConflictError, Section

MethodName = Literal["sft", "trajectory_imitation", "de_distill"]


@dataclass(frozen=True)
class TrainingMethod:
    """What the rest of the program has to know of a method."""

    generates_data: bool
    """Whether the model draws what it is trained on; images then give their captions and sizes only."""
    imitates_teacher: bool = False
    """Whether it is trained to take a teacher's many steps in Turbo's eight."""


METHODS: dict[MethodName, TrainingMethod] = {
    "sft": TrainingMethod(generates_data=False),
    "trajectory_imitation": TrainingMethod(generates_data=True, imitates_teacher=True),
    "de_distill": TrainingMethod(generates_data=True),
}


class TeacherSettings(Section):
    steps: int = Field(default=50, ge=9, le=1000)
    """Steps in which trajectory_imitation draws what is to be imitated."""
    guidance: float = Field(default=1.0, ge=0.0, le=50.0)
    """Guidance g (CFG scale - 1) of it."""


IMAGE_ONLY_SETTINGS = ("flip", "mask", "shuffle_tags", "tag_dropout", "caption_lines")
"""Settings of `data` that change images, or captions from epoch to epoch; no use where the model draws its own data."""


def fill_method_defaults(values: Any) -> Any:
    """Return the values of a config with the defaults that its method needs: no adapter, no caption dropout."""
    train = values.get("train") if isinstance(values, dict) else None
    name = train.get("method", "sft") if isinstance(train, dict) else "sft"
    method = next((spec for known, spec in METHODS.items() if known == name), None)
    if method is None or not method.generates_data:
        return values
    values, model, data = dict(values), values.get("model"), values.get("data")
    if model is None or (isinstance(model, dict) and "adapter" not in model):
        values["model"] = {**(model or {}), "adapter": None}
    if method.imitates_teacher and isinstance(data, list):
        values["data"] = [{"caption_dropout": 0.0, **entry} if isinstance(entry, dict) else entry for entry in data]
    return values


def method_error(
    name: MethodName, variant: str, adapter: str | None, init_from: str | None, data: Sequence[DataEntry]
) -> ConflictError | None:
    """Return the first setting that does not go with the method, or None if all do."""
    method = METHODS[name]
    if not method.generates_data:
        for index, entry in enumerate(data):
            if entry.prompts is not None:
                ways = " or ".join(other for other, spec in METHODS.items() if spec.generates_data)
                return ConflictError(
                    f"data.{index}.prompts has no images to train on", f"give folder, or train.method: {ways}"
                )
        return None
    if adapter is not None:
        return ConflictError(f"train.method: {name} learns from the model without adapter", "set model.adapter: null")
    for index, entry in enumerate(data):
        defaults = DataEntry.model_fields
        changed = [key for key in IMAGE_ONLY_SETTINGS if getattr(entry, key) != defaults[key].default]
        if method.imitates_teacher and entry.caption_dropout:
            changed.append("caption_dropout")
        if changed:
            return ConflictError(
                f"train.method: {name} does not train on images", f"leave data.{index}.{changed[0]} out"
            )
    if method.imitates_teacher and variant != "turbo":
        return ConflictError(f"train.method: {name} is for Turbo's 8 steps", "set model.variant: turbo")
    if method.imitates_teacher and init_from is None:
        return ConflictError(f"train.method: {name} needs lora.init_from, the LoRA that it repairs")
    return None
