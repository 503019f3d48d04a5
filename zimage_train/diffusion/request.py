"""Sampling requests: all that determines an image besides the model, and those of a config's previews (torch-free)."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from zimage_train.config.schema import Config
from zimage_train.config.triggers import insert_triggers
from zimage_train.config.types import Pixels
from zimage_train.config.variants import VARIANTS


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """All that determines an image besides the model; `guidance` is g, and the usual CFG scale is g + 1."""

    prompt: str
    negative: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    width: Pixels
    height: Pixels
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    shift: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @classmethod
    def from_json(cls, text: str) -> "SamplingRequest":
        """Parse the output of `to_json`.

        Raises:
            ValueError: the text is not a sampling request.
        """
        return TypeAdapter(cls).validate_json(text, strict=True, extra="forbid")

    def to_json(self) -> str:
        """Return all fields as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def summary(self) -> str:
        """Return a line for a terminal."""
        prompt = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:57]}..."
        size = f"{self.width}x{self.height}"
        return f"{size}, {self.steps} steps, guidance {self.guidance:g} (CFG {self.guidance + 1:g}), {prompt!r}"

    def describe(self) -> str:
        """Return three lines for image metadata in the layout of A1111, with guidance in both conventions."""
        return (
            f"{self.prompt}\nNegative prompt: {self.negative}\nSteps: {self.steps}, Sampler: Euler, "
            f"guidance g: {self.guidance:g} (CFG {self.guidance + 1:g}), Shift: {self.shift:g}, Seed: {self.seed}, "
            f"Size: {self.width}x{self.height}"
        )


def preview_requests(config: Config) -> list[SamplingRequest]:
    """Return the requests of the previews: prompt i has seed `sample.seed + i` unless it has its own."""
    variant, sample = VARIANTS[config.model.variant], config.sample
    steps = variant.steps if sample.steps == "auto" else sample.steps
    guidance = variant.guidance if sample.guidance == "auto" else sample.guidance
    return _requests(config, steps, guidance, variant.shift)


def comparison_requests(config: Config) -> list[SamplingRequest]:
    """Return the requests of the previews on `sample.compare_on`, with that model's steps, guidance and shift."""
    name = config.sample.compare_on
    if name is None:
        return []
    variant = VARIANTS.get(name, VARIANTS["turbo"])
    return _requests(config, variant.steps, variant.guidance, variant.shift)


def teacher_request(config: Config, prompt: str, width: int, height: int, seed: int) -> SamplingRequest:
    """Return the request for an image to train on: with the settings of the teacher, or else of the variant."""
    variant, teacher = VARIANTS[config.model.variant], config.teacher
    uses_teacher = config.method.imitates_teacher
    return SamplingRequest(
        prompt=prompt,
        negative="",
        seed=seed,
        width=width,
        height=height,
        steps=teacher.steps if uses_teacher else variant.steps,
        guidance=teacher.guidance if uses_teacher else variant.guidance,
        shift=variant.shift,
    )


def _requests(config: Config, steps: int, guidance: float, shift: float) -> list[SamplingRequest]:
    sample, triggers = config.sample, config.triggers
    return [
        SamplingRequest(
            prompt=insert_triggers(prompt.prompt, triggers),
            negative=insert_triggers(sample.negative if prompt.negative is None else prompt.negative, triggers),
            seed=sample.seed + index if prompt.seed is None else prompt.seed,
            width=prompt.width or sample.width,
            height=prompt.height or sample.height,
            steps=steps,
            guidance=guidance,
            shift=shift,
        )
        for index, prompt in enumerate(sample.prompts)
    ]


def prompts_to_encode(requests: list[SamplingRequest]) -> list[str]:
    """Return every prompt that `requests` need encoded, sorted; negatives only where guidance uses them."""
    prompts = {request.prompt for request in requests}
    negatives = {request.negative for request in requests if request.guidance > 0}
    return sorted(prompts | negatives)
