"""Conversion of pydantic's errors to problems: where a value is, what it is, and what is expected instead."""

import difflib
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zimage_train.config.key_names import COMMON_VALUES, DENSITIES_ELSEWHERE, suggest_key
from zimage_train.config.strict_yaml import KeyPath
from zimage_train.config.types import SettingError
from zimage_train.errors import Location, Problem

LocateKey = Callable[[KeyPath], Location | str]
"""Returns the location of a setting for the user."""

TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a section",
}
"""Type of a value -> its name for users."""
EXPECTED_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "none_required": "null",
}
"""Kind of error -> what it expects."""
EXPECTED_RANGES = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "at least {min_length} entry",
}
"""Kind of error -> what it expects, with the values of the error's context."""
MAX_VALUE_LENGTH = 80
"""Characters of a value in a message; a longer value is cut off."""


def problems_of(error: ValidationError, values: dict[str, Any], locate: LocateKey) -> list[Problem]:
    """Return a problem for each place in `values` at which the validation failed."""
    # pydantic reports each alternative of a union as an error of its own; they are merged into a single problem.
    errors_by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        key_path = _key_path(details, values)
        errors_by_path.setdefault(key_path, []).append(details)
    return [_problem(key_path, errors, locate(key_path)) for key_path, errors in errors_by_path.items()]


def format_value(value: object) -> str:
    """Return a value as users write it; of a list or a section the name of its type, or `empty`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return type_name(value) if value else "empty"
    if isinstance(value, str):
        return f"{_shorten(repr(value))} (text)"
    return _shorten(repr(value))


def type_name(value: object) -> str:
    """Return the name of a value's type for users."""
    return TYPE_NAMES.get(type(value), type(value).__name__)


def _key_path(details: ErrorDetails, values: Any) -> KeyPath:
    """Return the path of the setting that an error is about.

    pydantic adds the names of a union's alternatives to the location; those are not part of the path.
    """
    location = details["loc"]
    path: list[str | int] = []
    for part in location:
        is_missing_key = details["type"] == "missing" and part == location[-1]
        if isinstance(values, dict) and (part in values or is_missing_key):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            break
        path.append(part)
    raised = details.get("ctx", {}).get("error")
    return (*path, *raised.key) if isinstance(raised, SettingError) else tuple(path)


def _problem(key_path: KeyPath, errors: list[ErrorDetails], location: Location | str) -> Problem:
    """Return the problem of a setting; of a union it has an error for each alternative."""
    first = errors[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        return Problem(location, "unknown key", suggest_key(key_path), "unknown-key")
    if kind == "missing":
        return Problem(location, "is missing", "add it", "missing-key")
    if kind == "value_error" and len(errors) == 1:
        return _problem_of_validator(first, location)
    if kind == "finite_number":
        return Problem(location, f"is {value}", "give a finite number", "bad-value")
    expected = " or ".join(dict.fromkeys(_expected(details) for details in errors))
    if key_path[-1] == "every" and kind == "greater_than_equal":
        expected += ", or null, which is never"
    if key_path == ("timesteps", "type") and isinstance(value, str) and value in DENSITIES_ELSEWHERE:
        return Problem(location, f"is {value!r}", DENSITIES_ELSEWHERE[value], "bad-value")
    is_choice = kind == "literal_error" and isinstance(value, str)
    value_text = _shorten(repr(value)) if is_choice else format_value(value)
    return Problem(location, f"is {value_text}", f"expected {expected}{_suggest_choice(first)}", "bad-value")


def _problem_of_validator(details: ErrorDetails, location: Location | str) -> Problem:
    """Return the problem of a `ValueError` that a validator of the schema raised."""
    raised = details.get("ctx", {})["error"]
    if isinstance(raised, SettingError):
        return Problem(location, raised.finding, raised.hint or "correct it", raised.code)
    return Problem(location, str(raised), "correct it", "bad-value")


def _expected(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in EXPECTED_TYPES:
        return EXPECTED_TYPES[kind]
    if kind in EXPECTED_RANGES:
        return EXPECTED_RANGES[kind].format(**context)
    if kind == "literal_error":
        return context["expected"].replace("'", "")
    return details["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("should ")


def _suggest_choice(details: ErrorDetails) -> str:
    """Return `; did you mean ...?` with the choice most similar to the misspelt value, or an empty text."""
    value = details["input"]
    if details["type"] != "literal_error" or not isinstance(value, str):
        return ""
    expected = details.get("ctx", {})["expected"]  # 'turbo', 'deturbo' or 'base'
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ",").split(",")]
    if COMMON_VALUES.get(value) in choices:
        return f"; did you mean '{COMMON_VALUES[value]}'?"
    similar = difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean '{similar[0]}'?" if similar else ""


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:60]}... ({len(text)} characters)"
