"""Settings of the previews."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from zimage_train.config.prompt_flags import flag_in
from zimage_train.config.strict_yaml import KeyPath
from zimage_train.config.triggers import placeholder_in
from zimage_train.config.types import (
    ConflictError,
    EverySteps,
    NonEmptyPath,
    Pixels,
    Section,
    SettingError,
    as_lora,
    as_prompt,
)


class PreviewPrompt(Section):
    prompt: str
    """Text of the prompt; `[trigger]` and `[name]` stand for the trigger, if there is a single one."""
    negative: str | None = None
    """Negative prompt; null: sample.negative."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed; null: sample.seed + i for prompt i, counted from 0."""
    width: Pixels | None = None
    """Width in px; null: sample.width."""
    height: Pixels | None = None
    """Height in px; null: sample.height."""

    @field_validator("prompt")
    @classmethod
    def _has_no_flag(cls, value: str) -> str:
        flag = flag_in(value)
        if flag is not None:
            hint = "write {prompt: ..., width: 512} for a flag; flags are read in prompt files, with two hyphens"
            raise SettingError(f"has {flag.text}, which would be words of the prompt", hint)
        return value


class ExtraLora(Section):
    file: NonEmptyPath
    """LoRA file, org/repo/file on the hub, or distillpatch."""
    weight: float = Field(default=1.0, ge=-100.0, le=100.0)
    """Factor on its change to the weights."""


ExtraLoraEntry = Annotated[ExtraLora, BeforeValidator(as_lora, json_schema_input_type=str | ExtraLora)]
"""A LoRA as {file, weight}, or as FILE or FILE=WEIGHT."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


BesideLoras = Annotated[
    list[ExtraLoraEntry],
    BeforeValidator(_as_list, json_schema_input_type=str | ExtraLora | list[str | ExtraLora]),
]
"""Several LoRAs, or a single one without the list around it."""


class SampleSettings(Section):
    every: EverySteps = 250
    """Steps between previews; null: none."""
    first: bool = True
    """Draw previews before step 1 too."""
    prompts: list[Annotated[PreviewPrompt, BeforeValidator(as_prompt, json_schema_input_type=str | PreviewPrompt)]] = []
    """Prompts of the previews, each a string or {prompt, negative, seed, width, height}."""
    negative: str = ""
    """Negative prompt, which is used if guidance is above 0."""
    width: Pixels = 1024
    """Width of previews in px."""
    height: Pixels = 1024
    """Height of previews in px."""
    steps: int | Literal["auto"] = "auto"
    """Sampling steps; auto: 8 for turbo, 25 for deturbo, 30 for base."""
    guidance: float | Literal["auto"] = "auto"
    """Guidance g (CFG scale - 1); auto: 0 for turbo, 2 for deturbo, 3 for base."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of the first prompt; prompt i is drawn with seed + i."""
    weights: Literal["raw", "ema"] = "raw"
    """Weights that draw the previews: raw, or ema, which needs ema.decay."""
    lora_weights: list[Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(default=None, min_length=1)
    """Weights of the run's LoRA at which each preview is drawn, 1 among them; null: 1, or -1, 0 and 1 for
    a LoRA that is trained at both signs."""
    extra_loras: list[ExtraLoraEntry] = []
    """LoRAs of the previews in addition to the run's own: FILE, FILE=WEIGHT or {file, weight}."""
    compare_on: NonEmptyPath | None = None
    """Second model on which each preview is drawn, with the steps and the guidance of that model: turbo, deturbo, base,
    or a path or hub id of a Turbo; null: none."""

    @field_validator("steps", "guidance")
    @classmethod
    def _ranges(cls, value: float | str, info: ValidationInfo) -> float | str:
        low, high = {"steps": (1, 1000), "guidance": (0, 50)}[str(info.field_name)]
        if not isinstance(value, str) and not low <= value <= high:
            raise SettingError(f"is {value}", f"give auto, or {low} to {high}")
        return value

    @field_validator("lora_weights")
    @classmethod
    def _has_the_whole_lora(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (1.0 not in value or len(set(value)) < len(value)):
            found = "has no 1" if 1.0 not in value else "has a weight twice"
            raise SettingError(found, "give each weight once, and 1, by which the run is judged, among them")
        return value


def trigger_error(sample: SampleSettings, triggers: Sequence[str]) -> ConflictError | None:
    """Return the conflict of the previews with the triggers of all concepts, or None if there is none."""
    for number, trigger in enumerate(triggers):
        for other in triggers[:number]:
            if trigger.casefold() == other.casefold():
                message = f"the triggers {other!r} and {trigger!r} differ in case alone, so they are the same word"
                return ConflictError(message, "spell them alike, or choose another word", ("data",))
    if len(triggers) == 1:
        return None
    texts: dict[KeyPath, str] = {("sample", "negative"): sample.negative}
    for index, preview in enumerate(sample.prompts):
        texts["sample", "prompts", index] = f"{preview.prompt} {preview.negative or ''}"
    for key, text in texts.items():
        placeholder = placeholder_in(text)
        if placeholder is not None:
            found = f"there are several triggers ({', '.join(triggers)})" if triggers else "no trigger is set"
            return ConflictError(f"has {placeholder}, and {found}", "write the word itself", key)
    return None
