"""The page of the proof table, docs/proof.md, made of the rows and the results of their runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from proofs.rows import Row, shown
from proofs.table import ROWS, plain_key, settings

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "bench" / "proof.json"
MOST = 4
"""Values of a list that are shown."""

HEAD = """\
# Every setting, proved

{notice}

This page shows for every setting that it does what it says: two runs of the miniature that differ in this setting
alone, and the number that it must change, before and after. For readers who have met settings that are accepted and
ignored. CI makes all runs again with every change, and a setting without a row here fails it.

* **number**: read from the run without the setting and the run with it. *(plan)* marks predictions of
  the planner for the full model and images of 1024 px.
* **expected**: the change of the number, known beforehand. *another* and *less* are all that is known of some; the
  formulas behind them have tests of their own against calculations in float64.
* **LoRA**: a setting of training must change the LoRA; one of memory, previews, files and logs must leave it as it is,
  byte for byte. Both are checked.
* **neutral**: the value with which the LoRA has the same bytes as without the setting. Where it is the default, that
  value written out must give the same config as leaving it out.

The runs have 2 steps in fp32 on 8 images, with AdamW and a LoRA of rank 4; a row names further settings of both runs.
Names in braces are files and folders that scripts/proofs/inputs.py makes, such as models with changed parts.
`PYTHONPATH=. python scripts/proof_table.py` makes them and writes [the numbers](bench/proof.json).
"""


def recorded(value: Any) -> Any:
    """Return a value as the file holds it: short, with floats to 6 digits, and digests of bytes."""
    if isinstance(value, bytes):
        return f"sha256 {hashlib.sha256(value).hexdigest()[:8]}"
    if isinstance(value, list | tuple):
        return [recorded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def proof_md(notice: str) -> str:
    """Return the page: a table for each section of the config.

    Raises:
        KeyError: a row has not been measured.
    """
    found = json.loads(FILE.read_text())
    lines = [HEAD.format(notice=notice)]
    order = [key for key, _ in settings()]
    sections: dict[str, list[Row]] = {}
    for row in sorted(ROWS, key=lambda row: order.index(plain_key(row.key))):
        section = row.key.split(".")[0] if "." in row.key else "the run"
        sections.setdefault(section, []).append(row)
    for section, rows in sections.items():
        lines += [f"## {section[0].upper()}{section[1:]}" if section == "the run" else f"## `{section}`", ""]
        lines += ["| setting | number | without | with | expected | LoRA | neutral |", "|---|---|---|---|---|---|---|"]
        lines += [_line(row, found[row.label]) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row, entry: dict[str, Any]) -> str:
    setting = f"`{plain_key(row.key)}: {shown(row.value)}`"
    for words, settings_ in (("both runs with", row.given), ("and", row.beside)):
        if settings_:
            listed = ", ".join(f"`{key}: {shown(value)}`" for key, value in settings_.items())
            setting += f" ({words} {listed})"
    neutral = "the default" if row.neutral is None else f"`{shown(row.neutral)}`"
    if row.refused:
        cells = [setting, f"refused here: {row.refused}", "", "", f"not shown yet: GPU ({row.gpu})", "", neutral]
    else:
        expected = entry["expected"] + (f"; not shown yet: GPU ({row.gpu})" if row.gpu else "")
        values = [short(entry["without"]), short(entry["with"])]
        if values[0] == values[1] and entry["without"] != entry["with"]:
            values = [str(entry["without"]), str(entry["with"])]
        cells = [setting, row.number.name, *values, expected, row.lora, neutral]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " / ") for cell in cells) + " |"


def short(value: Any) -> str:
    """Return a value for a cell: floats to 4 digits, and the beginning of what is long."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        more = f", ... ({len(value)})" if len(value) > MOST else ""
        return (", ".join(short(one) for one in value[:MOST]) or "none") + more
    text = "none" if value is None else str(value)
    return (text if len(text) <= 60 else f"{text[:57]}...") or "(empty)"
