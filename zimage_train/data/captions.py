"""Caption files, and the prompt that a picture is trained with."""

from pathlib import Path

from zimage_train.errors import DataError, Problem

MAX_BYTES = 20_000
PLACEHOLDER = "[trigger]"
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


def read(path: Path) -> str:
    """The text of a caption file, without byte order mark, carriage returns and space around it.

    Raises:
        DataError: not UTF-8, or not a text.
    """
    try:
        if not path.is_file():
            raise DataError(Problem(str(path), "is not a file", "remove it or check the name"))
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read ({error.strerror})", "check the file")) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "is UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"is not UTF-8 (byte {error.start})"
        raise DataError(Problem(str(path), what, "save it as UTF-8")) from None
    if "\0" in text:
        raise DataError(Problem(str(path), "contains NUL bytes, so it is not a text", "replace it"))
    if len(content) > MAX_BYTES:
        raise DataError(Problem(str(path), f"has {len(content)} bytes", "captions end at 512 tokens; shorten it"))
    return clean(text)


def clean(text: str) -> str:
    """Normalise line ends, and drop zero-width characters and the space around the text."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_INVISIBLE).strip()


def compose(caption: str, default: str, trigger: str | None) -> str:
    """The prompt of a picture: its caption, or the default, with the trigger in place.

    `[trigger]` is replaced; a trigger that then occurs nowhere is put in front, so that every picture teaches it.
    """
    text = caption or clean(default)
    if trigger is None:
        return text
    text = text.replace(PLACEHOLDER, trigger)
    return text if trigger in text else f"{trigger} {text}".strip()
