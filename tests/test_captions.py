"""A caption is the text that the user wrote, or a refusal that names the file; the trigger is where it should be."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.data import captions
from zimage_train.errors import DataError


@pytest.fixture
def file(tmp_path: Path):
    """`file(content)`: a caption file."""

    def make(content: bytes) -> Path:
        path = tmp_path / "a.txt"
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a red car", "a red car"),
        (b"  a red car\n\n", "a red car"),
        (b"\xef\xbb\xbfa red car", "a red car"),
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree"),
        ("café, 猫, 😀".encode(), "café, 猫, 😀"),
        ("a\u200bb\ufeffc\u2060d".encode(), "abcd"),
        ("\u200b\u200d\n".encode(), ""),
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        (b"a\tb  c", "a\tb  c"),
        (b"x" * 20_000, "x" * 20_000),
    ],
)
def test_the_text_is_kept_and_what_nobody_sees_is_not(file, content: bytes, text: str):
    assert captions.read(file(content)) == text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("café".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("\ufeffcafé".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ("café".encode("latin-1"), "is not UTF-8 (byte 3); save it as UTF-8"),
        (b"\xef\xbb\xbfok \xff", "is not UTF-8 (byte"),
        (b"a\0b", "contains NUL bytes, so it is not a text"),
        ("a red car".encode("utf-16-le"), "contains NUL bytes, so it is not a text"),
        (b"x" * 20_001, "has 20001 bytes; captions end at 512 tokens; shorten it"),
    ],
)
def test_what_is_no_caption_is_refused_naming_the_file(file, content: bytes, what: str):
    path = file(content)
    with pytest.raises(DataError) as caught:
        captions.read(path)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"{path}: {what}")


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
