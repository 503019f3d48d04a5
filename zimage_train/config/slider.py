"""Settings of the slider: the prompts between which it moves images, and its anchor."""

from pydantic import Field

from zimage_train.config.types import ConflictError, Section

PLACEHOLDER = "[prompt]"
"""Stands for the prompt of an image in the prompts of the slider."""


class SliderSettings(Section):
    positive: str = ""
    """Prompt towards which a weight of +1 moves images; `[prompt]` stands for the prompt of each image."""
    negative: str = ""
    """Prompt towards which a weight of -1 moves images, with the same `[prompt]`; empty: only away from `positive`."""
    guidance: float = Field(default=3.0, gt=0.0, le=100.0)
    """Strength g: at the weights +1 and -1 the prediction moves by g times the difference of both prompts."""
    anchor: str | None = None
    """Prompt whose prediction stays as it is at both weights, with the same `[prompt]`; null: none. Costs another
    forward pass, and two more of forward and backward."""
    anchor_weight: float = Field(default=1.0, gt=0.0, le=100.0)
    """Weight of the anchor's loss."""

    def prompts_for(self, prompt: str) -> list[str]:
        """Return the positive, the negative and the anchor's prompt, if there is one, for an image of `prompt`."""
        texts = [self.positive, self.negative] if self.anchor is None else [self.positive, self.negative, self.anchor]
        return [text.replace(PLACEHOLDER, prompt) for text in texts]


def slider_passes(num_prompts: int) -> tuple[int, int]:
    """Return how many passes of forward and backward, and of forward alone, a step takes more than in plain training.

    `num_prompts` are those of `prompts_for`; 0: no slider is trained.
    """
    return {0: (0, 0), 2: (1, 3), 3: (3, 4)}[num_prompts]


def slider_error(slider: SliderSettings, is_used: bool) -> ConflictError | None:
    """Return the first setting of the slider that conflicts with another, or None if there is none."""
    if not is_used:
        if slider == SliderSettings():
            return None
        hint = "set train.method: slider, or leave slider out"
        return ConflictError("needs train.method: slider", hint, ("slider",))
    if slider.positive.strip() == slider.negative.strip():
        found = "is empty, as slider.negative" if not slider.positive.strip() else "is the same as slider.negative"
        hint = "describe the images at the weight +1, such as '[prompt], very large'"
        return ConflictError(found, hint, ("slider", "positive"))
    if slider.anchor is None and slider.anchor_weight != SliderSettings.model_fields["anchor_weight"].default:
        return ConflictError("needs slider.anchor", "set it, or leave it out", ("slider", "anchor_weight"))
    return None
