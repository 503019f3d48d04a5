"""The table of the laboratory: from single scores to means with intervals, and from those to a page and an image."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zimage_train import mini

from laboratory.schemes import Recipe
from laboratory.scoring import USES
from laboratory.statistics import Interval, interval, rank_correlation

SCORES = (
    "concept",
    "concept_paraphrase",
    "leakage",
    "drift",
    "fidelity_8",
    "sharpness_8",
    "fidelity_30",
    "sharpness_30",
)
UNTRAINED = "turbo"
FLOOR = 0.02
"""A drift below this counts as this much where drifts are compared."""

Table = dict[str, dict[str, Interval]]


def with_drift(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each score with its drift: what is missing of Turbo's quality with the same noise."""
    turbo = {score["shot"]: score["quality_8"] for score in scores.values() if score["use"] == UNTRAINED}
    return [{**score, "drift": 1 - score["quality_8"] / turbo[score["shot"]]} for score in scores.values()]


def table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """By use and score: mean, low and high. What is independent is a training, or for Turbo itself a set of noise."""
    rows = with_drift(scores)
    found: Table = {}
    for use in USES:
        own = [row for row in rows if row["use"] == use.name]
        key = "seed" if use.trained else "shot"
        groups = [[row for row in own if row[key] == value] for value in sorted({row[key] for row in own})]
        found[use.name] = {
            name: interval([sum(row[name] for row in group) / len(group) for group in groups]) for name in SCORES
        }
    return found


def claims(found: Table) -> dict[str, dict[str, Any]]:
    """What the laboratory is to show, as a figure and whether it holds."""
    drift = {name: row["drift"][0] for name, row in found.items()}
    adapter = max(FLOOR, min(drift["adapter_v1"], drift["adapter_v2"]))
    concepts = {use.name: found[use.name]["concept"][0] for use in USES if use.trained}
    back = {name: 1 - drift[name] / drift["direct"] for name in ("imitation", "distillpatch")}
    lowest = min(concepts, key=lambda name: concepts[name])
    return {
        "the least concept of a trained scheme is at least 0.5": _claim(concepts[lowest], concepts[lowest] >= 0.5),
        "direct training's drift is at least 0.15": _claim(drift["direct"], drift["direct"] >= 0.15),
        "it is at least 3 times that of the better adapter": _claim(
            drift["direct"] / adapter, drift["direct"] >= 3 * adapter
        ),
        "imitation wins back at least half of it": _claim(back["imitation"], back["imitation"] >= 0.5),
        "DistillPatch wins back at least half of it": _claim(back["distillpatch"], back["distillpatch"] >= 0.5),
    }


def _claim(value: float, holds: bool) -> dict[str, Any]:
    return {"found": round(value, 3), "holds": holds}


def meter_against(scores: Mapping[str, Mapping[str, Any]], deviations: Mapping[str, float]) -> dict[str, Any]:
    """The meter's reading and the true drift of each LoRA on Turbo, and their rank correlation."""
    rows = with_drift(scores)
    true: dict[str, float] = {}
    for key in deviations:
        own = [row["drift"] for row in rows if f"{row['use']}, {row['seed']}" == key]
        true[key] = sum(own) / len(own)
    each = {key: {"deviation": round(deviations[key], 4), "drift": round(true[key], 4)} for key in deviations}
    found = rank_correlation([deviations[key] for key in each], [true[key] for key in each])
    return {"rank_correlation": round(found, 3), "loras": each}


def write(
    output: Path,
    found: Table,
    scores: Mapping[str, Mapping[str, Any]],
    recipe: Recipe,
    shipped: Mapping[str, Mapping[int, Path]],
    meter: Mapping[str, Any],
) -> None:
    """Writes lab.json, and the tables of lab.md between their marks."""
    files = {
        f"{name}-s{seed}": {"sha256": digest(path)} for name, each in shipped.items() for seed, path in each.items()
    }
    content = {
        "schemes": {
            name: {score: [round(value, 4) for value in each] for score, each in row.items()}
            for name, row in found.items()
        },
        "claims": claims(found),
        "meter": meter,
        "recipe": asdict(recipe),
        "family": digest(mini.HERE / "manifest.json"),
        "loras": files,
        "scores": [{key: _short(value) for key, value in row.items()} for row in scores.values()],
    }
    (output / "lab.json").write_text(json.dumps(content, indent=1) + "\n")
    page = output / "lab.md"
    text = page.read_text() if page.exists() else "<!-- table -->\n<!-- claims -->\n<!-- meter -->\n"
    for mark, lines in (("table", as_table(found)), ("claims", as_claims(found)), ("meter", as_readings(meter))):
        text = filled(text, mark, lines)
    page.write_text(text)


def digest(path: Path) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def filled(text: str, mark: str, lines: Sequence[str]) -> str:
    """The page with `lines` after its mark, in place of the table that stood there."""
    pattern = re.compile(rf"<!-- {mark} -->\n(\n?\|.*\n)*")
    return pattern.sub(lambda _: f"<!-- {mark} -->\n\n" + "\n".join(lines) + "\n", text)


def as_table(found: Table) -> list[str]:
    """Every use with its scores."""
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in SCORES)} |", f"|{'---|' * (len(SCORES) + 1)}"]
    for name, row in found.items():
        cells = [f"{row[score][0]:.2f} ({row[score][1]:.2f} to {row[score][2]:.2f})" for score in SCORES]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def as_claims(found: Table) -> list[str]:
    """What was to be shown, and whether it is."""
    rows = [
        f"| {said} | {claim['found']:.2f} | {'yes' if claim['holds'] else 'no'} |"
        for said, claim in claims(found).items()
    ]
    return ["| | found | holds |", "|---|---|---|", *rows]


def as_readings(meter: Mapping[str, Any]) -> list[str]:
    """The meter beside the truth, LoRA by LoRA."""
    rows = sorted(meter["loras"].items(), key=lambda item: item[1]["deviation"])
    lines = [f"| `{name}` | {row['deviation']:.3f} | {row['drift']:.3f} |" for name, row in rows]
    return ["| LoRA, training seed | deviation | drift |", "|---|---|---|", *lines]
