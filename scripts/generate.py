"""Write what follows from the code: the config's schema and reference, and the reference of the command line.

python scripts/generate.py           write what is stale
python scripts/generate.py --check   write nothing; exit code 1 if something is stale
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from zimage_train import cli
from zimage_train.config import yaml_reader
from zimage_train.config.schema import Config, Prompt

ROOT = Path(__file__).parent.parent

EXAMPLE = Config.model_validate({"name": "my_lora", "data": [{"folder": "photos"}]})
"""What the reference shows: the two settings that have no default, and every default."""

HEAD = """\
# yaml-language-server: $schema=schema.json
# Every setting with its default, except for name and data.0.folder, which every config gives itself.
# A config needs only what it changes; configs/quickstart.yaml is a start. Written by scripts/generate.py.

"""


def schema_json() -> str:
    """The JSON schema of a config, for editors that complete and check YAML."""
    schema = _tidy(Config.model_json_schema())
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "zimage-train config"}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """Without generated titles, without defaults that repeat a whole section, and with descriptions on one line."""
    if isinstance(node, list):
        return [_tidy(one) for one in node]
    if not isinstance(node, dict):
        return node
    drop = {"title"} if isinstance(node.get("title"), str) else set()
    drop |= {"default"} if isinstance(node.get("default"), dict) and "$ref" in node else set()
    if isinstance(node.get("description"), str):
        node = node | {"description": _one_line(node["description"])}
    return {key: _tidy(value) for key, value in node.items() if key not in drop}


def reference_yaml() -> str:
    """A config that spells out every setting, each under a line that says what it does."""
    return HEAD + "\n".join(_section(EXAMPLE, ""))


def _section(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines.append(f"{indent}# {_one_line(field.description or '')}")
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *_section(value, f"{indent}  ")]
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(f"{indent}{name}:")
            for entry in value:
                lines += [f"{indent}  -", *_section(entry, f"{indent}    ")]
        else:
            dumped = yaml_reader.dump({name: section.model_dump(include={name})[name]})
            lines += [indent + line for line in dumped.splitlines()]
        if name == "prompts":
            keys = {key: _one_line(prompt.description or "") for key, prompt in Prompt.model_fields.items()}
            lines += [f"{indent}#   {key}: {text}" for key, text in keys.items()]
        if not indent:
            lines.append("")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def config_md() -> str:
    """Every setting with its type, default and meaning, a table a section."""
    lines = ["# Every setting", "", f"{NOTICE} A config names what it changes; the rest has these defaults.", ""]
    lines += _table(EXAMPLE, "", "the run")
    return "\n".join(lines) + "\n"


def _table(section: BaseModel, prefix: str, title: str) -> list[str]:
    rows: list[str] = []
    below: list[str] = []
    for name, field in type(section).model_fields.items():
        value, text = getattr(section, name), _one_line(field.description or "")
        nested = value[0] if isinstance(value, list) and value and isinstance(value[0], BaseModel) else value
        if isinstance(nested, BaseModel):
            path = f"{prefix}{name}" + (".N" if isinstance(value, list) else "")
            below += _table(nested, f"{path}.", f"`{path}`: {text[0].lower()}{text[1:]}")
        else:
            default = json.dumps(section.model_dump(mode="json", include={name})[name])
            must = " (required)" if field.is_required() else ""
            rows.append(f"| `{prefix}{name}` | `{default}`{must} | {text.replace('|', '/')} |")
    head = [f"## {title[0].upper()}{title[1:]}" if prefix == "" else f"## {title}", ""]
    return [*head, "| setting | default | what it does |", "|---|---|---|", *rows, "", *below]


def cli_md() -> str:
    """What every command says of itself with `--help`."""
    lines = ["# Every command", "", NOTICE, ""]
    for words in _commands(get_command(cli.app)):
        shown = CliRunner().invoke(cli.app, [*words, "--help"], env={"COLUMNS": "110", "TERMINAL_WIDTH": "110"})
        text = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
        text = re.sub(r"^Usage: \S+", "Usage: zimage-train", text)
        lines += [f"## zimage-train {' '.join(words)}", "", "```text", text, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: Any) -> list[list[str]]:
    found: list[list[str]] = []
    for name, one in group.commands.items():
        found += [[name, *rest] for rest in _commands(one)] if hasattr(one, "commands") else [[name]]
    return found


def readme() -> str:
    """The README with the lengths of the files that it says to read."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def counted(match: re.Match[str]) -> str:
        return f"`{match[1]}` ({len((ROOT / match[1]).read_text(encoding='utf-8').splitlines())} lines)"

    return re.sub(r"`(zimage_train/[\w/]+\.py)` \(\d+ lines\)", counted, text)


NOTICE = "Written by `scripts/generate.py` from the code; a test keeps it so."

GENERATED: dict[str, Callable[[], str]] = {
    "configs/schema.json": schema_json,
    "configs/reference.yaml": reference_yaml,
    "README.md": readme,
    "docs/config.md": config_md,
    "docs/commands.md": cli_md,
}


def stale(root: Path = ROOT) -> list[str]:
    """Which generated files are missing or differ from what the code says now."""
    return [
        name
        for name, make in GENERATED.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != make()
    ]


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write what is stale, or with `--check` only say so; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    names = stale(root)
    for name in names:
        if arguments:
            print(f"{name} is stale; run python scripts/generate.py")
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(GENERATED[name](), encoding="utf-8")
            print(f"wrote {name}")
    return 1 if arguments and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
