"""The training methods: their properties, defaults, and conflicts with other settings (torch-free).

To add a method: its name and `TrainingMethod` here, and its batches in training/self_distill.py or training/batches.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from zimage_train.config.dataset import DataEntry
from zimage_train.config.types import ConflictError, Section

MethodName = Literal["sft", "trajectory_imitation", "de_distill", "slider", "pairs"]


@dataclass(frozen=True)
class TrainingMethod:
    """The properties of a method on which the rest of the program depends."""

    generates_data: bool
    """Whether the model draws the images that it is trained on; those of `data` then only give captions and sizes."""
    imitates_teacher: bool = False
    """Whether Turbo's 8 steps are trained to reach what a teacher reaches in many."""
    has_prompts: bool = False
    """Whether the LoRA learns from the model's predictions for the prompts of `slider`, at the weights +1 and -1."""
    has_pairs: bool = False
    """Whether the LoRA learns images at the weight +1, and their partners in `data.N.negative` at -1."""

    @property
    def is_two_sided(self) -> bool:
        """Whether each step trains the LoRA at the weights +1 and -1."""
        return self.has_prompts or self.has_pairs


METHODS: dict[MethodName, TrainingMethod] = {
    "sft": TrainingMethod(generates_data=False),
    "trajectory_imitation": TrainingMethod(generates_data=True, imitates_teacher=True),
    "de_distill": TrainingMethod(generates_data=True),
    "slider": TrainingMethod(generates_data=True, has_prompts=True),
    "pairs": TrainingMethod(generates_data=False, has_pairs=True),
}


class TeacherSettings(Section):
    steps: int = Field(default=50, ge=9, le=1000)
    """Sampling steps of the trajectories that trajectory_imitation imitates."""
    guidance: float = Field(default=1.0, ge=0.0, le=50.0)
    """Guidance g (CFG scale - 1) of these trajectories."""


IMAGE_ONLY_SETTINGS = ("flip", "mask", "shuffle_tags", "tag_dropout", "caption_lines")
"""Settings of `data` that change images, or captions from epoch to epoch; invalid if the model draws its own images."""


def fill_method_defaults(values: Any) -> Any:
    """Return the values of a config with the defaults of its method.

    A method that draws its own images has no adapter, and a method that imitates a teacher no caption dropout.
    """
    # The values are not yet validated, so each may be of any type.
    train = values.get("train") if isinstance(values, dict) else None
    name = train.get("method") if isinstance(train, dict) else None
    method = METHODS.get(name) if isinstance(name, str) else None  # pyright: ignore[reportArgumentType]
    if method is None or not method.generates_data:
        return values
    values, model, data = dict(values), values.get("model"), values.get("data")
    if model is None or (isinstance(model, dict) and "adapter" not in model):
        values["model"] = {**(model or {}), "adapter": None}
    if method.imitates_teacher and isinstance(data, list):
        entries: list[Any] = []
        for entry in data:
            entries.append({"caption_dropout": 0.0, **entry} if isinstance(entry, dict) else entry)
        values["data"] = entries
    return values


def method_error(
    name: MethodName, variant: str, adapter: str | None, init_from: str | None, data: Sequence[DataEntry]
) -> ConflictError | None:
    """Return the first conflict of a setting with the method, or None if there is none."""
    method = METHODS[name]
    for index, entry in enumerate(data):
        if method.has_pairs and entry.negative is None:
            hint = f"set data.{index}.negative to the folder of the images at -1"
            return ConflictError(f"train.method: {name} learns from pairs of images", hint, ("data", index))
        if entry.negative is not None and not method.has_pairs:
            message = "has no effect without train.method: pairs"
            return ConflictError(message, "set it, or leave it out", ("data", index, "negative"))
    if not method.generates_data:
        for index, entry in enumerate(data):
            if entry.prompts is not None:
                suitable = " or ".join(other for other, spec in METHODS.items() if spec.generates_data)
                hint = f"give folder, or train.method: {suitable}"
                return ConflictError(f"data.{index}.prompts has no images to train on", hint)
        return None
    if adapter is not None:
        return ConflictError(f"train.method: {name} learns from the model without adapter", "set model.adapter: null")
    defaults = DataEntry.model_fields
    for index, entry in enumerate(data):
        changed = [key for key in IMAGE_ONLY_SETTINGS if getattr(entry, key) != defaults[key].default]
        if method.imitates_teacher and entry.caption_dropout:
            changed.append("caption_dropout")
        if changed:
            hint = f"leave data.{index}.{changed[0]} out"
            return ConflictError(f"train.method: {name} does not train on images", hint)
    if method.imitates_teacher and variant != "turbo":
        return ConflictError(f"train.method: {name} is for Turbo's 8 steps", "set model.variant: turbo")
    if method.imitates_teacher and init_from is None:
        return ConflictError(f"train.method: {name} needs lora.init_from, the LoRA that it repairs")
    return None
