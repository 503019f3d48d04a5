"""One rule says where the trigger stands, for captions, previews and preservation alike."""

from typing import Any

import pytest

from zimage_train.config.schema import Config
from zimage_train.config.triggers import (
    has_any_trigger,
    has_trigger,
    insert_trigger,
    other_spelling,
    placeholder_in,
    replace_trigger,
)
from zimage_train.dataset.captions import compose_prompt
from zimage_train.diffusion.request import preview_requests


def previews(data: list[dict[str, Any]], sample: dict[str, Any]) -> Config:
    return Config.model_validate({"name": "x", "data": data, "sample": sample})


CASES = [
    ("zorb", "a zorb", "a zorb"),
    ("zorb", "Zorb in snow", "zorb in snow"),
    ("zorb", "a ZORB's hat", "a zorb's hat"),
    ("Zorb", "a zorb-like hat", "a Zorb-like hat"),
    ("zorb", "a zorblike hat", None),
    ("zorb", "ein Überzorb", None),
    ("zorb", "zorb2 and zorb_3", None),
    ("man", "a woman", None),
    ("zorb!", "the ZORB! of today", "the zorb! of today"),
    ("a zorb", "see A Zorb", "see a zorb"),
    ("zorb", "一只Zorb在雪地里", "一只zorb在雪地里"),
    ("小灰猫", "一只小灰猫在雪地里", "一只小灰猫在雪地里"),
    ("조르브", "조르브가 걷는다", "조르브가 걷는다"),
    ("ゾルブ", "雪の中のゾルブです", "雪の中のゾルブです"),
    ("猫x", "猫xy", None),
    ("zorb cat", "a Zorb  cat and a zorb\ncat", "a zorb cat and a zorb cat"),
    ("zörb", "a zo\u0308rb here", "a zörb here"),
    ("zo\u0308rb", "a zörb here", "a zo\u0308rb here"),
    ("zorb", "a zo\u0308rb here", None),
]


@pytest.mark.parametrize(("trigger", "text", "written"), CASES)
def test_the_rule(trigger: str, text: str, written: str | None):
    """A whole word in any case is the trigger, and is written as the trigger; a part of a word is not."""
    assert has_trigger(text, trigger) == has_any_trigger(text, [trigger]) == (written is not None)
    assert insert_trigger(text, trigger) == (written or text)
    assert compose_prompt(text, "", trigger) == (written or f"{trigger} {text}")
    without = replace_trigger(text, trigger, "@")
    assert without == ((written or text).replace(trigger, "@") if written else text)


@pytest.mark.parametrize("placeholder", ["[trigger]", "[name]", "[TRIGGER]", "[Name]"])
def test_placeholders(placeholder: str):
    """`[trigger]` and `[name]` in any case stand for the trigger."""
    text = f"a {placeholder} and [names]"
    assert placeholder_in(text) == placeholder
    assert insert_trigger(text, r"z\1") == r"a z\1 and [names]"
    assert has_any_trigger(text, ["zorb"])


def test_spelling_is_of_letters_alone():
    """Only another case is another spelling of the trigger; spaces and the composition of accents are none."""
    assert other_spelling("a zo\u0308rb  cat", "zörb cat") is None
    assert other_spelling("a Zo\u0308rb  cat", "zörb cat") == "Zörb  cat"


def test_previews_follow_the_rule():
    """Previews get the trigger for placeholders, and as it is spelt."""
    prompts = ["a [NAME] here", {"prompt": "Zorb", "negative": "[trigger]"}, "zorblike"]
    data = [{"folder": "x", "trigger": "zorb"}]
    requests = preview_requests(previews(data, {"prompts": prompts, "negative": "no [name]"}))
    found = [(request.prompt, request.negative) for request in requests]
    assert found == [("a zorb here", "no zorb"), ("zorb", "zorb"), ("zorblike", "no zorb")]


def test_previews_of_several_triggers():
    """Each of several triggers is written as it is spelt."""
    data = [{"folder": "x", "trigger": "zorb"}, {"folder": "y", "trigger": "Qua"}]
    requests = preview_requests(previews(data, {"prompts": ["a Zorb and a qua"]}))
    assert [request.prompt for request in requests] == ["a zorb and a Qua"]


@pytest.mark.parametrize(
    ("triggers", "prompt", "message"),
    [
        (["zorb", "qua"], "a [name]", r"has \[name\], and there are several triggers \(zorb, qua\)"),
        (["zorb", "Zorb"], "a", "'zorb' and 'Zorb' differ in case alone"),
        (["[Name]"], "a", "give the word itself"),
        (["x [TRIGGER]"], "a", "give the word itself"),
    ],
)
def test_triggers_that_are_refused(triggers: list[str], prompt: str, message: str):
    """A placeholder for one of several triggers, and triggers that are the same word, are refused."""
    data = [{"folder": "x", "trigger": trigger} for trigger in triggers]
    with pytest.raises(ValueError, match=message):
        previews(data, {"prompts": [prompt]})
