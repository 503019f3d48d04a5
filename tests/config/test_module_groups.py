"""Regular expressions for modules: those that decide at once are read, those that may take for ever are refused."""

import re
import time

import pytest

from zimage_train.config.module_groups import UnboundedPatternError, compile_bounded

AS_PEFT = r"(.*\.)?({})$"
NAME = "layers." * 9 + "attention.to_q"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.\d+\.attention\.to_q|.*noise_refiner\.\d+\.attention\.to_q|.*context_refiner\.\d+\.attention\.to_q",
        r"layers\.(?:1\d|2\d)\.(?:attention|feed_forward)\.(?:to_q|to_k|to_v|to_out|w1|w2|w3)",
        r"(layers\.){1}\d+\..*",
        r"layers[.]\d{1,2}[.].*to_(q|k|v)",
        r"^layers\.\d+\.(?!adaLN).*$",
        r"layers\.[0-9]+\.attention\.to_q",
        r"a[*+{]b|a\+\{",
    ],
)
def test_usual_patterns_are_read(pattern: str):
    """What people write for modules is read, and decides on a name at once."""
    assert compile_bounded(pattern).pattern == pattern
    began = time.process_time()
    compile_bounded(pattern, AS_PEFT).match(NAME)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(?x:([\\w.]+) +Z)", "(a|aa)+$", "(a?)+", "(a*){2,}", "((a{1,3}){1,3}){1,9}", r"(a*)\1+"),
        *(".*.*.*.*.*", "a?" * 9, "(?:a|b*c*d*e*f*)", "(?=(a+)+)b", "(a+){5}"),
    ],
)
def test_endless_patterns_are_refused(pattern: str):
    """What repeats a repetition, in any spelling, is refused; so are many repetitions in a row."""
    with pytest.raises(UnboundedPatternError, match="may take for ever"):
        compile_bounded(pattern)


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "(" * 5000, "a{99999999999}", "*"])
def test_no_pattern_at_all(pattern: str):
    """What is no regular expression is a ValueError, but for no reason of time."""
    with pytest.raises(ValueError, match=r"\S") as error:
        compile_bounded(pattern)
    assert not isinstance(error.value, UnboundedPatternError | re.error)
