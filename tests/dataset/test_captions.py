"""A caption is the text that the user wrote, or a refusal that names the file; the trigger is where it should be."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.config.dataset import DataEntry
from zimage_train.config.schema import PreserveSettings
from zimage_train.config.triggers import has_trigger, placeholder_in
from zimage_train.dataset import captions
from zimage_train.errors import DataError
from zimage_train.rng import keyed_int


def test_unreadable_file_is_refused(tmp_path: Path):
    """A file that cannot be read is refused."""
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match="is not a file"):
            captions.read_caption(path)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_text_or_a_refusal(tmp_path_factory, content: bytes):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        text = captions.read_caption(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert text == captions.clean_text(text) and text.encode().decode() == text


@pytest.mark.parametrize(
    ("caption", "default", "trigger", "prompt"),
    [
        ("a red car", "", None, "a red car"),
        ("a red car", "a thing", None, "a red car"),
        ("", "a thing", None, "a thing"),
        ("", "", None, ""),
        ("a red car", "", "zorb", "zorb a red car"),
        ("a zorb car", "", "zorb", "a zorb car"),
        ("a [trigger] car", "", "zorb", "a zorb car"),
        ("[trigger], [trigger]", "", "zorb", "zorb, zorb"),
        ("", "[trigger]", "zorb", "zorb"),
        ("", "a photo of [trigger]", "zorb", "a photo of zorb"),
        ("", "a photo", "zorb", "zorb a photo"),
        ("", "", "zorb", "zorb"),
        ("a [trigger] car", "", None, "a [trigger] car"),
        ("a Zorb car", "", "zorb", "a zorb car"),
        ("ZORB's car", "", "zorb", "zorb's car"),
        ("a [Trigger] car, [NAME]", "", "zorb", "a zorb car, zorb"),
        ("", "a [name] car", "zorb", "a zorb car"),
        ("a zorblike car", "", "zorb", "zorb a zorblike car"),
        ("a zorb-like car", "", "zorb", "a zorb-like car"),
        ("", "  a thing\r\n", None, "a thing"),
    ],
)
def test_trigger_is_in_the_prompt_once(caption: str, default: str, trigger: str | None, prompt: str):
    """The prompt has the trigger once, if it is set."""
    assert captions.compose_prompt(caption, default, trigger) == prompt


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(["zorb", "a zorb", "z*(", "[x]"]))
def test_every_prompt_teaches_the_trigger(caption: str, default: str, trigger: str):
    prompt = captions.compose_prompt(captions.clean_text(caption), default, trigger)
    assert trigger in prompt and placeholder_in(prompt) is None
    again = captions.compose_prompt(prompt, default, trigger)
    assert again == prompt


# What a sample is trained with


def entry(**settings: Any) -> DataEntry:
    return DataEntry.model_validate({"folder": "x", **settings})


def shares(epoch: int) -> Callable[..., float]:
    return lambda *path: keyed_int(0, epoch, *path) / 2**63


def drawn(texts: tuple[str, ...], count: int = 400, **settings: Any) -> Counter[str]:
    made = entry(**settings)
    prompts = captions.prompts_of(texts, made)
    return Counter(captions.sample_prompt(prompts, made, shares(epoch)) for epoch in range(count))


def test_prompt_without_settings():
    """Without settings the prompt is the caption, whatever it contains."""
    assert drawn(("a,b,,  c\nsecond line",)) == {"a,b,,  c\nsecond line": 400}


def test_tags_are_shuffled_evenly():
    """Tags are shuffled, and each order is equally likely."""
    found = drawn(("a, b,c",), 6000, shuffle_tags=True)
    assert set(found) == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}
    assert all(abs(count - 1000) < 150 for count in found.values())


def test_kept_tags_stay_in_front():
    """Kept tags and the trigger stay in front."""
    found = drawn(("first, second, a, the zorb, b",), shuffle_tags=True, keep_tags=2, trigger="zorb")
    assert set(found) == {"first, second, the zorb, a, b", "first, second, the zorb, b, a"}
    put_in_front = drawn(("a, b",), shuffle_tags=True, trigger="zorb")
    assert set(put_in_front) == {"zorb, a, b", "zorb, b, a"}


def test_tag_dropout():
    """Tags are dropped at the given rate and stay in order; kept tags are never dropped."""
    found = drawn(("zorb, a, b, c",), 4000, tag_dropout=0.25, keep_tags=1)
    left = sum((len(prompt.split(", ")) - 1) * count for prompt, count in found.items())
    assert abs(left - 3 * 4000 * 0.75) < 150
    endings = {"", ", a", ", b", ", c", ", a, b", ", a, c", ", b, c", ", a, b, c"}
    assert set(found) == {f"zorb{ending}" for ending in endings}


def test_caption_lines():
    """Each line of a caption file may be a caption of its own."""
    found = drawn(("one\n\n two ",), 1000, caption_lines=True, trigger="zorb")
    assert set(found) == {"zorb one", "zorb two"} and min(found.values()) > 400
    assert set(drawn(("one\ntwo",))) == {"one\ntwo"}
    assert set(drawn(("one", "two"))) == {"one", "two"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, ""), ({"trigger": "zorb"}, ""), ({"trigger": "zorb", "dropout_keeps_trigger": True}, "zorb")],
)
def test_caption_dropout(settings: dict[str, Any], expected: str):
    """A dropped caption is empty, or the trigger alone."""
    assert captions.dropout_prompt(entry(**settings)) == expected


def test_preserve_prompt_has_class_word():
    """The prompt for preservation has the class word in place of the trigger."""
    own, other = entry(trigger="zorb"), entry()
    kept = PreserveSettings(kind="trigger", class_word="shape")
    assert captions.preserve_prompt("a zorb, zorb-like", own, kept) == "a shape, shape-like"
    assert captions.preserve_prompt("zorb a Zorb, zorblike", own, kept) == "shape a shape, zorblike"
    for caption in ("Zorb in snow", "a [NAME]", "zorblike", "ZORB"):
        composed = captions.compose_prompt(caption, "", "zorb")
        assert not has_trigger(captions.preserve_prompt(composed, own, kept) or "", "zorb")
    assert captions.preserve_prompt("a circle", other, kept) == "a circle"
    assert captions.preserve_prompt("", own, kept) == ""
    assert captions.preserve_prompt("a zorb", own, PreserveSettings(kind="blank")) == ""
    assert captions.preserve_prompt("a zorb", own, PreserveSettings()) is None


def test_added_trigger_takes_no_kept_place():
    """A trigger that was put in front does not count as a kept tag."""
    found = drawn(("one, two, three",), shuffle_tags=True, keep_tags=1, trigger="zorb")
    assert set(found) == {"zorb, one, two, three", "zorb, one, three, two"}
