"""Caption files, and the prompt that an image is trained with."""

import re
from collections.abc import Callable
from pathlib import Path

from zimage_train.config import triggers
from zimage_train.config.dataset import DataEntry
from zimage_train.config.schema import PreserveSettings
from zimage_train.errors import DataError, Problem

MAX_BYTES = 20_000
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


def read_caption(path: Path) -> str:
    """Return the text of a caption file, cleaned as in `clean_text`.

    Raises:
        DataError: the file cannot be read, is not text in UTF-8, or is too long for a caption.
    """
    text = _read_text(path)
    num_bytes = len(text.encode())
    if num_bytes > MAX_BYTES:
        message = f"has {num_bytes} bytes"
        raise DataError(Problem(str(path), message, "captions end at 512 tokens; shorten it", "too-long"))
    return clean_text(text)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of prompts, each cleaned as a caption is. Empty lines stay, for line numbers.

    Raises:
        DataError: the file cannot be read, or is not text in UTF-8.
    """
    # Not splitlines, which also cuts at characters such as U+2028 inside a prompt.
    return [clean_text(line) for line in re.split(r"\r\n|\r|\n", _read_text(path))]


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise DataError(Problem(str(path), "is not a file", "remove it or check the name", "not-a-file"))
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), message, "check the file", "unreadable-file")) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        has_utf16_mark = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        message = "is UTF-16" if has_utf16_mark else f"is not UTF-8 (byte {error.start})"
        raise DataError(Problem(str(path), message, "save it as UTF-8", "not-text")) from None
    if "\0" in text:
        raise DataError(Problem(str(path), "contains NUL bytes, so it is not a text", "replace it", "not-text"))
    return text


def clean_text(text: str) -> str:
    """Return `text` with LF as line ends, without zero-width characters and without spaces around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_ZERO_WIDTH).strip()


def compose_prompt(caption: str, default: str, trigger: str | None, separator: str = " ") -> str:
    """Return the prompt of an image: its caption, or `default` if that is empty, with the trigger in place.

    The trigger is inserted by the rule of `config.triggers`. If the text then still lacks it, it is put in front, so
    that every image teaches it.
    """
    text = caption or clean_text(default)
    if trigger is None:
        return text
    text = triggers.insert_trigger(text, trigger)
    if triggers.has_trigger(text, trigger):
        return text
    return f"{trigger}{separator}{text}" if text else trigger


def prompts_of(captions: tuple[str, ...], entry: DataEntry) -> tuple[str, ...]:
    """Return the prompts of an image with these captions, without repetitions, tags not yet shuffled or dropped.

    `sample_prompt` chooses a prompt for each sample. There is always at least one prompt, which may be empty.
    """
    texts: list[str] = []
    for caption in captions:
        parts = caption.split("\n") if entry.caption_lines else [caption]
        texts += [part.strip() for part in parts if part.strip()]
    separator = ", " if has_tags(entry) else " "  # so that the trigger becomes a tag
    prompts = [compose_prompt(text, entry.default_caption, entry.trigger, separator) for text in texts or [""]]
    return tuple(dict.fromkeys(prompts))


def has_tags(entry: DataEntry) -> bool:
    """Return whether captions are lists of tags, so that the prompt of an image changes from epoch to epoch."""
    return entry.shuffle_tags or entry.tag_dropout > 0


def sample_prompt(prompts: tuple[str, ...], entry: DataEntry, uniform: Callable[..., float]) -> str:
    """Return a prompt drawn from `prompts`, with its tags dropped and shuffled as `entry` asks.

    Tags with the trigger, and the first `keep_tags` of the others, are never dropped, and come first when the rest is
    shuffled. `uniform(name, *key)` is a number in [0, 1) that depends on its arguments alone.
    """
    text = prompts[int(uniform("caption") * len(prompts))]
    if not has_tags(entry):
        return text
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    fixed: list[int] = []
    movable: list[int] = []
    num_ordinary = 0  # tags so far that do not hold the trigger
    for position, tag in enumerate(tags):
        if entry.trigger is not None and triggers.has_trigger(tag, entry.trigger):
            fixed.append(position)
            continue
        if num_ordinary < entry.keep_tags:
            fixed.append(position)
        elif uniform("tag dropout", position) >= entry.tag_dropout:
            movable.append(position)
        num_ordinary += 1
    if entry.shuffle_tags:
        # Sorted by a random number that each tag has by its position, instead of shuffled as a list: the tags that are
        # dropped do not change the order of the others.
        movable.sort(key=lambda position: uniform("tag order", position))
        order = [*fixed, *movable]
    else:
        order = sorted([*fixed, *movable])
    return ", ".join(tags[position] for position in order)


def dropout_prompt(entry: DataEntry) -> str:
    """Return the prompt that replaces a dropped caption."""
    if entry.dropout_keeps_trigger and entry.trigger is not None:
        return entry.trigger
    return ""


def preserve_prompt(prompt: str, entry: DataEntry, preserve: PreserveSettings) -> str | None:
    """Return the prompt of the preservation loss that goes with `prompt`, or None if preservation is off."""
    if preserve.kind is None:
        return None
    if preserve.kind == "blank":
        return ""
    if not entry.trigger:
        return prompt
    return triggers.replace_trigger(prompt, entry.trigger, preserve.class_word)
