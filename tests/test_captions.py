"""A caption is the text that the user wrote, or a refusal that names the file; the trigger is where it should be."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.data import captions
from zimage_train.errors import DataError


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match="is not a file"):
            captions.read(path)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_text_or_a_refusal(tmp_path_factory, content: bytes):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        text = captions.read(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert text == captions.clean(text) and text.encode().decode() == text


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
        ("a Zorb car", "", "zorb", "zorb a Zorb car"),
        ("", "  a thing\r\n", None, "a thing"),
    ],
)
def test_the_prompt_has_the_trigger_once_it_is_set(caption: str, default: str, trigger: str | None, prompt: str):
    assert captions.compose(caption, default, trigger) == prompt


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(["zorb", "a zorb", "z*(", "[x]"]))
def test_every_prompt_teaches_the_trigger(caption: str, default: str, trigger: str):
    prompt = captions.compose(captions.clean(caption), default, trigger)
    assert trigger in prompt and captions.PLACEHOLDER not in prompt
    again = captions.compose(prompt, default, trigger)
    assert again == prompt
