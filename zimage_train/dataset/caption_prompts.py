"""What a vision-language model is asked for a caption, and what of its answer becomes one (torch-free)."""

import re
from dataclasses import dataclass

from zimage_train.dataset import captions

SEEN_ONLY = "State only what can be seen."


@dataclass(frozen=True)
class CaptionStyle:
    """How captions are written."""

    instruction: str
    most_tokens: int
    """Of an answer; what is cut off there ends at the last whole sentence or tag."""
    separator: str
    """Between a trigger that the answer lacks, and the answer."""


CAPTION_STYLES = {
    "sentences": CaptionStyle(
        "Write the caption of this image for training a text-to-image model: one paragraph of 80 to 200 words. "
        "Begin with the main subject and what it does; go on with its surroundings, the composition and the camera's "
        "angle, the light, the colours and the mood, and end with the medium and its style. "
        f"{SEEN_ONLY} No introduction, no list, no guesses.",
        300,
        " ",
    ),
    "tags": CaptionStyle(
        "List 15 to 30 tags for this image, for training a text-to-image model: lower case, separated by commas, "
        "the most important first: subject, pose, clothes, objects, surroundings, composition, light, colours, "
        f"mood, medium, style. {SEEN_ONLY} Answer with the tags alone.",
        160,
        ", ",
    ),
}

OMITTED_TRAITS = {
    "character": "Say what may differ from image to image (pose, expression, clothes, place, light), and nothing "
    "of the main person's face, hair, skin, body or age.",
    "style": "Say what is shown, and nothing of medium, technique, brushwork, grading or artistic style.",
    "product": "Say where the main object is, how it is seen and lit and what is around it, and nothing of its own "
    "shape, colours, material or label.",
    "concept": "Say everything but what makes the main subject special.",
}
"""By what is taught: what captions explain is not learned with the trigger."""

_CALLED = {
    "character": "Call the main person {}.",
    "product": "Call the main object {}.",
    "concept": "Call the main subject {}.",
}
_INTRODUCTION = re.compile(
    r"^(?:(?:sure|certainly|of course)\W+)?(?:here (?:is|are)|here's|caption|tags)[^:\n]{0,60}:\s*", re.I
)
_SHOWS = re.compile(r"^(?:the|this) (?:image|image) (?:shows|depicts|features|presents|displays|captures)\s+", re.I)
_THINKING = re.compile(r"^.*</think>|<think>.*", re.S)
_SENTENCE_END = re.compile(r"""[.!?。！？]["'”’)]?(?=\s|$)""")


def caption_instruction(style: str, kind: str | None, trigger: str | None) -> str:
    """What the model is asked."""
    parts = [CAPTION_STYLES[style].instruction]
    if kind is not None:
        parts.append(OMITTED_TRAITS[kind])
    if trigger is not None and kind in _CALLED:
        parts.append(_CALLED[kind].format(trigger))
    return " ".join(parts)


def clean_answer(answer: str, style: str, is_whole: bool, trigger: str | None) -> str:
    """The caption in an answer, on one line and with the trigger; empty if nothing was said.

    Thinking, an introduction and Markdown go; an answer that was cut off ends at its last whole sentence or tag.
    """
    text = _THINKING.sub("", captions.clean_text(answer))
    if style == "tags":
        text = text.replace("\n", ", ")
    text = "".join(one if one.isprintable() else " " for one in text if one != "\ufffd")
    text = " ".join(re.sub(r"[*#`]+", "", text).split()).strip("\"“”' ")
    text = _INTRODUCTION.sub("", text).strip("\"“”' ")
    text = _tags(text, is_whole) if style == "tags" else _sentences(text, is_whole)
    return captions.compose_prompt(text, "", trigger, CAPTION_STYLES[style].separator) if text else ""


def _tags(text: str, is_whole: bool) -> str:
    tags = [tag.strip(" .-").lower() for tag in re.split(r"[,;]", text)]
    if not is_whole and len(tags) > 1:
        tags.pop()
    return ", ".join(dict.fromkeys(tag for tag in tags if tag))


def _sentences(text: str, is_whole: bool) -> str:
    if match := _SHOWS.match(text):
        text = text[match.end() : match.end() + 1].upper() + text[match.end() + 1 :]
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text if is_whole or not ends else text[: ends[-1]]
