"""Instructions for captioning by a vision-language model, and the cleaning of its answers (torch-free)."""

import re
from dataclasses import dataclass

from zimage_train.dataset import captions

DEFAULT_MODEL = "Qwen/Qwen3-VL-4B-Instruct"
"""Hub id of the model that writes captions."""
SEEN_ONLY = "State only what can be seen."


@dataclass(frozen=True)
class CaptionStyle:
    """A form of captions, and how the model is asked for it."""

    instruction: str
    max_tokens: int
    """Length of an answer; an answer that is cut off there ends at its last whole sentence or tag."""
    separator: str
    """Text between the trigger and an answer that lacks it."""


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
"""Kind of concept -> what captions leave out. What a caption describes is not learned as part of the trigger."""

_TRIGGER_USE = {
    "character": "Call the main person {}.",
    "product": "Call the main object {}.",
    "concept": "Call the main subject {}.",
}
_INTRODUCTION = re.compile(
    r"^(?:(?:sure|certainly|of course)\W+)?(?:here (?:is|are)|here's|caption|tags)[^:\n]{0,60}:\s*", re.I
)
_SHOWS = re.compile(r"^(?:the|this) (?:image|picture) (?:shows|depicts|features|presents|displays|captures)\s+", re.I)
_THINKING = re.compile(r"^.*</think>|<think>.*", re.S)
_SENTENCE_END = re.compile(r"""[.!?。！？]["'”’)]?(?=\s|$)""")


def caption_instruction(style: str, kind: str | None, trigger: str | None) -> str:
    """Return the instruction for the model.

    Args:
        style: a key of `CAPTION_STYLES`.
        kind: a key of `OMITTED_TRAITS`, or None to describe everything.
        trigger: the word for the concept, by which kinds with a single subject are called.
    """
    parts = [CAPTION_STYLES[style].instruction]
    if kind is not None:
        parts.append(OMITTED_TRAITS[kind])
    if trigger is not None and kind in _TRIGGER_USE:
        parts.append(_TRIGGER_USE[kind].format(trigger))
    return " ".join(parts)


def clean_answer(answer: str, style: str, is_whole: bool, trigger: str | None) -> str:
    """Return the caption in `answer`, on a single line and with the trigger, or "" if there is none.

    Thinking, an introduction and Markdown are removed. If the answer was cut off (not `is_whole`), the caption ends at
    its last whole sentence or tag.
    """
    text = _THINKING.sub("", captions.clean_text(answer))
    if style == "tags":
        text = text.replace("\n", ", ")
    # U+FFFD is half of a character, where the answer was cut off between its tokens.
    text = "".join(char if char.isprintable() else " " for char in text.replace("\ufffd", ""))
    text = " ".join(re.sub(r"[*#`]+", "", text).split()).strip("\"“”' ")
    text = _INTRODUCTION.sub("", text).strip("\"“”' ")
    text = _clean_tags(text, is_whole) if style == "tags" else _clean_sentences(text, is_whole)
    if not text:
        return ""
    return captions.compose_prompt(text, "", trigger, CAPTION_STYLES[style].separator)


def _clean_tags(text: str, is_whole: bool) -> str:
    tags = [tag.strip(" .-").lower() for tag in re.split(r"[,;]", text)]
    if not is_whole and len(tags) > 1:
        tags.pop()
    return ", ".join(dict.fromkeys(tag for tag in tags if tag))


def _clean_sentences(text: str, is_whole: bool) -> str:
    introduction = _SHOWS.match(text)
    if introduction is not None:
        rest = text[introduction.end() :]
        text = rest[:1].upper() + rest[1:]
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if is_whole or not ends:
        return text
    return text[: ends[-1]]
