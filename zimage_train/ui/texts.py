"""The texts of the page in every language, from one catalogue, `texts.yaml`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml

LANGUAGES = {"en": "English", "zh": "简体中文"}
CATALOGUE = Path(__file__).with_name("texts.yaml")

Translate = Callable[..., str]
"""`t("runs.empty", name=...)`: the text of a key, with its values in place."""


@cache
def catalogue() -> dict[str, dict[str, str]]:
    """Return key -> language -> text."""
    return yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))


def translator(language: str) -> Translate:
    """Return the function that gives texts in `language`; a text that is missing there comes in English."""

    def translate(key: str, **values: object) -> str:
        texts = catalogue()[key]
        return texts.get(language, texts["en"]).format(**values)

    return translate
