"""Caption files, and the prompt that an image is trained with."""

import re
from collections.abc import Callable
from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.config.schema import PreserveSettings
from zimage_train.errors import DataError, Problem

MAX_BYTES = 20_000
PLACEHOLDER = "[trigger]"
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


def read_caption(path: Path) -> str:
    """The text of a caption file, without byte order mark, carriage returns and space around it.

    Raises:
        DataError: not UTF-8, or not a text, or too long for a caption.
    """
    text = _text_of(path)
    if (size := len(text.encode())) > MAX_BYTES:
        raise DataError(Problem(str(path), f"has {size} bytes", "captions end at 512 tokens; shorten it", "too-long"))
    return clean_text(text)


def read_lines(path: Path) -> list[str]:
    """The lines of a file of prompts, cleaned as captions are; empty ones too.

    Raises:
        DataError: not UTF-8, or not a text.
    """
    return [clean_text(line) for line in re.split(r"\r\n|\r|\n", _text_of(path))]


def _text_of(path: Path) -> str:
    try:
        if not path.is_file():
            raise DataError(Problem(str(path), "is not a file", "remove it or check the name", "not-a-file"))
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            Problem(str(path), f"cannot be read ({error.strerror})", "check the file", "unreadable-file")
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "is UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"is not UTF-8 (byte {error.start})"
        raise DataError(Problem(str(path), what, "save it as UTF-8", "not-text")) from None
    if "\0" in text:
        raise DataError(Problem(str(path), "contains NUL bytes, so it is not a text", "replace it", "not-text"))
    return text


def clean_text(text: str) -> str:
    """Normalise line ends, and drop zero-width characters and the space around the text."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_INVISIBLE).strip()


def compose_prompt(caption: str, default: str, trigger: str | None, separator: str = " ") -> str:
    """The prompt of an image: its caption, or the default, with the trigger in place.

    `[trigger]` is replaced; a trigger that then occurs nowhere is put in front, so that every image teaches it.
    """
    text = caption or clean_text(default)
    if trigger is None:
        return text
    text = text.replace(PLACEHOLDER, trigger)
    if trigger_pattern(trigger).search(text):
        return text
    return f"{trigger}{separator}{text}" if text else trigger


def trigger_pattern(trigger: str) -> re.Pattern[str]:
    """`trigger` where it stands alone: `zorb` is not in `zorblike`."""
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")


def prompts_of(captions: tuple[str, ...], entry: DataEntry) -> tuple[str, ...]:
    """What an image of `entry` with these captions may be trained with, before tags are shuffled or dropped."""
    texts = [line for text in captions for line in (text.split("\n") if entry.caption_lines else [text])]
    own = [text.strip() for text in texts if text.strip()] or [""]
    separator = ", " if has_tags(entry) else " "  # so that the trigger is a tag of its own
    return tuple(dict.fromkeys(compose_prompt(text, entry.default_caption, entry.trigger, separator) for text in own))


def has_tags(entry: DataEntry) -> bool:
    """Whether captions are taken as tags, so that an image has another prompt in each epoch."""
    return entry.shuffle_tags or entry.tag_dropout > 0


def sample_prompt(prompts: tuple[str, ...], entry: DataEntry, share: Callable[..., float]) -> str:
    """One of `prompts`, its tags shuffled and dropped; `share(name, ...)` is a number in [0, 1) for each use."""
    text = prompts[int(share("caption") * len(prompts))]
    if not has_tags(entry):
        return text
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    is_trigger = [entry.trigger is not None and trigger_pattern(entry.trigger).search(tag) is not None for tag in tags]
    before = [n - sum(is_trigger[:n]) for n in range(len(tags))]  # other tags in front of each
    kept = [is_trigger[n] or before[n] < entry.keep_tags for n in range(len(tags))]
    left = [n for n in range(len(tags)) if kept[n] or share("tag dropout", n) >= entry.tag_dropout]
    if entry.shuffle_tags:
        left.sort(key=lambda n: (not kept[n], n if kept[n] else share("tag order", n)))
    return ", ".join(tags[n] for n in left)


def dropout_prompt(entry: DataEntry) -> str:
    """What stands for a caption that is dropped."""
    return entry.trigger or "" if entry.dropout_keeps_trigger else ""


def preserve_prompt(prompt: str, entry: DataEntry, preserve: PreserveSettings) -> str | None:
    """The prompt for which the model is held to what it was, beside `prompt`; None: it is not."""
    if preserve.kind is None:
        return None
    if preserve.kind == "blank":
        return ""
    if not entry.trigger:
        return prompt
    pattern = re.compile(
        trigger_pattern(entry.trigger).pattern, re.IGNORECASE
    )  # what is trained in any spelling is not held
    return pattern.sub(lambda _: preserve.class_word, prompt)
