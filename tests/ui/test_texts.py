"""The catalogue of texts."""

import re
from pathlib import Path

from zimage_train.ui import texts
from zimage_train.ui.form_fields import ESSENTIALS, field_at

UI = Path(texts.__file__).parent
USED = re.compile(r"""\b_?t\(\s*"([a-z_]+\.[a-z_]+)\"""")
FILLED = re.compile(r"""\b_?t\(\s*f?"([a-z_]+\.)(?:\{|" \+)""")


def test_no_text_is_missing():
    """Each key has each language with the same values, and every key that a page asks for is there."""
    catalogue = texts.catalogue()
    for key, found in catalogue.items():
        assert found.keys() == texts.LANGUAGES.keys(), key
        values = [sorted(re.findall(r"\{(\w+)\}", text)) for text in found.values()]
        assert values[0] == values[1], key
        assert all(text.strip() for text in found.values()), key
    source = "\n".join(path.read_text() for path in UI.rglob("*.py"))
    used = set(USED.findall(source))
    assert used and used <= catalogue.keys(), used - catalogue.keys()
    groups = {group.split(".")[0] for group in FILLED.findall(source)}
    unused = {key for key in catalogue if key not in used and key.split(".")[0] not in groups}
    assert not unused


def test_common_settings_have_words():
    keys = {field_at(path).name.replace("data.0.", "data.") for path in ESSENTIALS}
    written = {key.removeprefix("field.") for key in texts.catalogue() if key.startswith("field.")}
    assert written == keys


def test_chinese_is_chinese():
    same = {key for key, found in texts.catalogue().items() if found["en"] == found["zh"]}
    assert same <= {"plan.context"}
