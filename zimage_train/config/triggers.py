"""The trigger in a text: where it stands, and where a placeholder stands for it (torch-free).

The rule, for captions, previews, preservation and imported jobs alike: the trigger is a whole word, in upper or lower
case, and is written as `data.N.trigger` spells it. `zorb` is in `a Zorb's hat`, and not in `zorblike`. Chinese,
Japanese, Korean and Thai letters do not make a word longer, since there is no space between words there. Between the
words of a trigger may be any white space, and an accent may be a character of its own, which the tokenizer composes.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_PLACEHOLDER = re.compile(r"\[(?:trigger|name)\]", re.IGNORECASE)
_UNSPACED = "\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
"""Letters of scripts that write words without spaces, or that append to a word what others write apart."""
_JOINS_WORDS = rf"[^\W{_UNSPACED}\U00020000-\U0003ffff]"
"""A letter or digit beside which a word goes on."""


def placeholder_in(text: str) -> str | None:
    """Return the first `[trigger]` or `[name]` as it is written in `text`, or None if it has none."""
    match = _PLACEHOLDER.search(text)
    return None if match is None else match[0]


def fill_placeholders(text: str, trigger: str) -> str:
    """Return `text` with the trigger for each placeholder."""
    return _PLACEHOLDER.sub(lambda _: trigger, text)


def insert_trigger(text: str, trigger: str) -> str:
    """Return `text` with the trigger for each placeholder, and as it is spelt wherever it stands in another case."""
    return replace_trigger(fill_placeholders(text, trigger), trigger, trigger)


def insert_triggers(text: str, triggers: Sequence[str]) -> str:
    """Do as `insert_trigger` for each of several triggers; a placeholder stays if there is not exactly one."""
    if len(triggers) == 1:
        return insert_trigger(text, triggers[0])
    for trigger in triggers:
        text = replace_trigger(text, trigger, trigger)
    return text


def has_trigger(text: str, trigger: str) -> bool:
    """Return whether the trigger stands in `text`, in any case."""
    return _pattern(trigger).search(_composed(text)) is not None


def has_any_trigger(text: str, triggers: Iterable[str]) -> bool:
    """Return whether any of several triggers stands in `text`, or a placeholder for them."""
    return placeholder_in(text) is not None or any(has_trigger(text, trigger) for trigger in triggers)


def replace_trigger(text: str, trigger: str, words: str) -> str:
    """Return `text` with `words` wherever the trigger stands, in any case."""
    replaced, count = _pattern(trigger).subn(lambda _: words, _composed(text))
    return replaced if count else text


def other_spelling(text: str, trigger: str) -> str | None:
    """Return the first place where `text` has the trigger in another case, as it is written there, or None."""
    found = (match[0] for match in _pattern(trigger).finditer(_composed(text)))
    words = _composed(trigger).split()
    return next((place for place in found if place.split() != words), None)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _pattern(trigger: str) -> re.Pattern[str]:
    trigger = _composed(trigger)
    # Not \b, which needs a letter at the end of the trigger: `zorb!` would not be found.
    start = rf"(?<!{_JOINS_WORDS})" if re.match(_JOINS_WORDS, trigger[0]) else ""
    end = rf"(?!{_JOINS_WORDS})" if re.match(_JOINS_WORDS, trigger[-1]) else ""
    words = r"\s+".join(map(re.escape, trigger.split()))
    return re.compile(f"{start}{words}{end}", re.IGNORECASE)
