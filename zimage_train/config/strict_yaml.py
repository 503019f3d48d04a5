"""A strict reader and a writer of YAML, with the line of every key.

Only the core types of YAML 1.2 are read: `no` and `12:30` are text, `010` is ten, `1e-4` is a number. Duplicate keys,
several documents, tags, merge keys, anchors that unfold to too many values, and characters that no text can hold are
refused.
"""

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

KeyPath = tuple[str | int, ...]
"""Keys and indices from the top of a document to a value, such as `("data", 0, "folder")`."""

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 40
TOO_LARGE = "too large or nested too deeply for a config"

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|\t', re.DOTALL)
"""A string, a comment or a tab of JSON."""
_SURROGATE_PAIR = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
LONGEST_NUMBER = 100
"""Characters of a number. A longer number is read as text, since `int` refuses more than 4300 digits."""
_WINDOWS_PATH = re.compile(r'"(?:[A-Za-z]:|\\\\[^\\"\n]+)\\(?!\\)')
"""The beginning of a Windows path in double quotes whose backslashes are not doubled: a drive, or `\\\\server`."""


class YamlError(Exception):
    """An error in a text; `line` counts from 1, and 0 means the whole file."""

    code, hint = "bad-yaml", "correct it"

    def __init__(self, line: int, message: str, path: KeyPath = ()) -> None:
        super().__init__(message)
        self.line, self.message, self.path = line, message, path


class DuplicateKeyError(YamlError):
    """A key that is given twice in a section; the first value is kept."""

    code, hint = "duplicate-key", "remove one of them"


class BackslashError(YamlError):
    """A backslash in double quotes that begins an escape, where a Windows path was probably meant."""

    hint = "use single quotes ('C:\\train'), or write / or two backslashes for each"


@dataclass
class YamlDocument:
    """A document as plain values, and the line of each."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    names: dict[KeyPath, str] = field(default_factory=dict)
    """Name of a value in the file, if that is not its path: the key of another trainer's config."""
    problems: list[YamlError] = field(default_factory=list)


def parse(text: str) -> YamlDocument:
    """Parse a YAML document; duplicate keys and backslashes are collected as problems, anything worse is raised.

    Raises:
        YamlError: the text is not valid YAML, or is refused.
    """
    if "\0" in text:
        raise YamlError(0, "contains NUL bytes, so it is not a text file")
    try:
        # Composed to nodes only, which have lines and the text of each scalar. PyYAML's values would be of YAML 1.1.
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"holds the control character {error.character:#04x}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if _is_about_backslash(text, error):
            begin = error.context_mark or mark
            raise BackslashError(
                begin.line + 1 if begin else 0, "has a backslash in double quotes, which begins an escape there"
            ) from None
        raise YamlError(mark.line + 1 if mark else 0, f"not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise YamlError(0, f"not valid YAML: {str(error).splitlines()[0]}") from None
    document = YamlDocument()
    if node is not None:
        document.value = _Builder(document).build(node, ())
    return document


def _is_about_backslash(text: str, error: yaml.MarkedYAMLError) -> bool:
    """Return whether the text could not be parsed because of a backslash in double quotes."""
    if error.context == "while scanning a double-quoted scalar":
        return True
    # The last backslash of "C:\\train\\" escapes the quote, so that the text goes on to the end of the file.
    mark = error.context_mark
    return mark is not None and _WINDOWS_PATH.match(text, mark.index) is not None


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
    """A loader that refuses explicit tags, which `_Builder` would ignore: `!!str 5` would be a number."""

    depth = 0
    num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        self.num_nodes += 1
        tag = getattr(event, "tag", None)
        line = event.start_mark.line + 1
        if tag is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise YamlError(line, f"has the tag {tag}, and only plain values are read")
        if self.depth > MAX_DEPTH:
            raise YamlError(line, f"is nested more than {MAX_DEPTH} deep")
        if self.num_nodes > 2 * MAX_NODES:  # keys count here, too; the builder counts values, with those of aliases
            raise YamlError(line, TOO_LARGE)
        self.depth += 1
        node = cast(yaml.Node, super().compose_node(parent, index))
        self.depth -= 1
        return node


class _Builder:
    """Builds plain values from nodes, and records lines and problems in a document."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.num_nodes = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise YamlError(line, TOO_LARGE, path)
        self.document.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        if _NOT_TEXT.search(node.value):
            raise YamlError(line, "holds a character that no text has (NUL or half a surrogate pair)", path)
        assert node.start_mark.buffer is not None  # the document is a text, and no stream
        written = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
        if _WINDOWS_PATH.match(written):
            message = f"is {written}, and a backslash in double quotes begins an escape"
            self.document.problems.append(BackslashError(line, message, path))
            return written[1:-1]  # what was meant, so that further checks do not report its escapes again
        is_quoted = isinstance(node, yaml.ScalarNode) and node.style
        return node.value if is_quoted else plain_value(node.value)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or _NOT_TEXT.search(key_node.value):
                raise YamlError(line, "a key must be plain text", path)
            key = str(key_node.value)
            key_path = (*path, key)
            if key in result:
                first_line = self.document.lines[key_path]
                message = f"given twice, first in line {first_line}"
                self.document.problems.append(DuplicateKeyError(line, message, key_path))
                continue
            self.document.lines[key_path] = line
            result[key] = self.build(value_node, key_path)
        return result


def plain_value(text: str) -> Any:
    """Return the value of an unquoted scalar by the core schema of YAML 1.2."""
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
    """A dumper that writes equal lists and sections in full, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Represent a text with the quotes that it needs, so that this reader and PyYAML read it as the same text."""
    style = None
    if not isinstance(plain_value(value), str):
        style = "'"  # such as `1e-4`, a number here, which PyYAML would leave without quotes
    if not value.isprintable():
        style = '"'  # escapes line breaks and control characters; PyYAML loses U+0085 in single quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """Return plain values as YAML in block style, which this reader and PyYAML read back with the same types."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def dump_inline(value: Any) -> str:
    """Return a plain value as YAML on one line, as it stands behind `key:`."""
    # In a list, so that a scalar gets neither a line of its own nor an end of document.
    text = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000, default_flow_style=True
    )
    return text.strip()[1:-1]
