"""Flags in prompts are found however they are written, and words with hyphens are no flags."""

import pytest

from zimage_train.config.prompt_flags import Flag, flag_in


@pytest.mark.parametrize(
    ("text", "written", "well_formed"),
    [
        ("a cat -w 512", "-w 512", "--w 512"),
        ("a cat --w 512", "--w 512", "--w 512"),
        ("a cat --w=512 --h 64", "--w=512", "--w 512"),
        ("a cat --w512", "--w512", "--w 512"),
        ("a cat \u2014w 512", "\u2014w 512", "--w 512"),
        ("a cat \u2013\u2013w: 512", "\u2013\u2013w: 512", "--w 512"),
        ("-l 0", "-l 0", "--l 0"),
        ("a --g -1.5", "--g -1.5", "--g -1.5"),
        ("a -n blurry", "-n", "--n"),
        ("a --n=blurry", "--n", "--n"),
    ],
)
def test_flags_are_found(text: str, written: str, well_formed: str):
    assert flag_in(text) == Flag(written, well_formed)


@pytest.mark.parametrize(
    "text", ["rock-n-roll", "a T-shirt", "twenty-w 5", "4 - d 7", "-w wide", "f-s 2.8", "--ar 16:9", ""]
)
def test_words_are_no_flags(text: str):
    assert flag_in(text) is None
