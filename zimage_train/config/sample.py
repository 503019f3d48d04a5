"""Settings of the images that a run draws on its way."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from zimage_train.config.types import EverySteps, Pixels, Section, SettingError, as_lora, as_prompt


class PreviewPrompt(Section):
    prompt: str
    """What to draw."""
    negative: str | None = None
    """null: sample.negative."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """null: sample.seed plus the prompt's number, from 0."""
    width: Pixels | None = None
    """null: sample.width."""
    height: Pixels | None = None
    """null: sample.height."""


class ExtraLora(Section):
    file: str = Field(min_length=1)
    """A LoRA file, org/repo/file on the hub, or distillpatch."""
    weight: float = Field(default=1.0, ge=-100.0, le=100.0)
    """Its strength."""


class SampleSettings(Section):
    every: EverySteps = 250
    """Steps between previews; null: none."""
    first: bool = True
    """Also before step 1."""
    prompts: list[Annotated[PreviewPrompt, BeforeValidator(as_prompt, json_schema_input_type=str | PreviewPrompt)]] = []
    """A prompt is a string or {prompt, negative, seed, width, height}."""
    negative: str = ""
    """Negative prompt, used where guidance is above 0."""
    width: Pixels = 1024
    """Width of previews in px."""
    height: Pixels = 1024
    """Height of previews in px."""
    steps: int | Literal["auto"] = "auto"
    """Sampling steps; auto: 8 for turbo, 25 for deturbo, 30 for base."""
    guidance: float | Literal["auto"] = "auto"
    """Guidance g (CFG scale - 1); auto: 0 for turbo, 2 for deturbo, 3 for base."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Prompt i is drawn with seed + i."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights draw the previews."""
    extra_loras: list[Annotated[ExtraLora, BeforeValidator(as_lora, json_schema_input_type=str | ExtraLora)]] = []
    """LoRAs that previews have besides the run's own: FILE, FILE=WEIGHT or {file, weight}."""
    compare_on: str | None = Field(default=None, min_length=1)
    """Draw each preview on this model too, in its way: turbo, deturbo, base, or a path or hub id of a Turbo."""

    @field_validator("steps", "guidance")
    @classmethod
    def _ranges(cls, value: float | str, info: ValidationInfo) -> float | str:
        least, most = {"steps": (1, 1000), "guidance": (0, 50)}[str(info.field_name)]
        if not isinstance(value, str) and not least <= value <= most:
            raise SettingError(f"is {value}", f"give auto, or {least} to {most}")
        return value
