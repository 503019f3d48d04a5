"""YAML without surprises: text to plain values, and the line of every key.

YAML 1.2's core types only: `no` and `12:30` are text, `010` is ten, `1e-4` is a number. Duplicate keys, several
documents, tags, merge keys, anchors that grow without end and characters that no file can hold are refused.
"""

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 40

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|\t', re.DOTALL)
"""A text, a comment or a tab of JSON."""
_SURROGATE_PAIR = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
LONGEST_NUMBER = 100
"""Characters; what is longer is text, and so an error wherever a number is expected."""


class YamlError(Exception):
    """What is wrong with the text, and in which line (from 1; 0: the whole file)."""

    def __init__(self, line: int, what: str, path: KeyPath = (), code: str = "bad-yaml") -> None:
        super().__init__(what)
        self.line, self.what, self.path, self.code = line, what, path, code


@dataclass
class YamlDocument:
    """Plain values, and the line in which each of them stands."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    names: dict[KeyPath, str] = field(default_factory=dict)
    """What a place is called in the file, where that is not its path."""
    problems: list[YamlError] = field(default_factory=list)


def parse(text: str) -> YamlDocument:
    """Parse one YAML document; duplicate keys are collected as problems, anything worse is raised.

    Raises:
        YamlProblem: the text is not a YAML document that this reader takes.
    """
    if "\0" in text:
        raise YamlError(0, "contains NUL bytes, so it is not a text file")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"holds the control character {error.character:#04x}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 0, f"not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise YamlError(0, f"not valid YAML: {str(error).splitlines()[0]}") from None
    document = YamlDocument()
    if node is not None:
        document.value = _Builder(document).build(node, ())
    return document


def json_to_yaml(text: str) -> str:
    """Return JSON as text that `parse` takes: without comments and tabs, each line where it was.

    JSON writes a character beyond U+FFFF as two escapes, a surrogate pair, which YAML would read as two characters.
    """

    def as_yaml(match: re.Match[str]) -> str:
        token = match[0]
        if token.startswith('"'):
            return _SURROGATE_PAIR.sub(lambda pair: _join_surrogates(int(pair[1], 16), int(pair[2], 16)), token)
        return " " + "\n" * token.count("\n")

    return _JSON_TOKEN.sub(as_yaml, text)


def _join_surrogates(high: int, low: int) -> str:
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


class _Loader(yaml.SafeLoader):
    """Refuses every tag that is written out, on keys and on values; `!!str 5` would have to be text, and is not."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        line = event.start_mark.line + 1
        if tag is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise YamlError(line, f"has the tag {tag}, and only plain values are read")
        if self.depth > MAX_DEPTH:
            raise YamlError(line, f"is nested more than {MAX_DEPTH} deep")
        self.depth += 1
        node = cast(yaml.Node, super().compose_node(parent, index))
        self.depth -= 1
        return node


class _Builder:
    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.num_nodes = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise YamlError(line, "too large or nested too deeply for a config", path)
        self.document.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        if _NOT_TEXT.search(node.value):
            raise YamlError(line, "holds a character that no text has (NUL or half a surrogate pair)", path)
        is_quoted = isinstance(node, yaml.ScalarNode) and node.style
        return node.value if is_quoted else plain_value(node.value)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or _NOT_TEXT.search(key_node.value):
                raise YamlError(line, "a key must be plain text", path)
            key = str(key_node.value)
            here = (*path, key)
            if key in result:
                first = self.document.lines[here]
                twice = YamlError(line, f"given twice, first in line {first}", here, "duplicate-key")
                self.document.problems.append(twice)
                continue
            self.document.lines[here] = line
            result[key] = self.build(value_node, here)
        return result


def plain_value(text: str) -> Any:
    """The value of an unquoted scalar by YAML 1.2's core schema."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if len(text) > LONGEST_NUMBER:
        return text
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    if _SPECIAL_FLOAT.match(text):
        return float(text.lower().replace(".", "", 1))
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Quote what this reader would not take for text, such as `1e-4`, which plain PyYAML leaves bare.

    Line breaks and what cannot be printed are escaped: PyYAML loses U+0085 in single quotes.
    """
    style = None if isinstance(plain_value(value), str) else "'"
    style = style if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """Write plain values as block style YAML that this reader and plain PyYAML read back with the same types."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
