"""The `prove` command: measure on this machine what the project promises, and write a page that can be sent."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import transformers

from zimage_train import __version__
from zimage_train.config.schema import Config
from zimage_train.errors import ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json
from zimage_train.measure import records
from zimage_train.measure.proofs.claims import Claim
from zimage_train.measure.proofs.encoders import latent_claims, text_claims
from zimage_train.measure.proofs.runs import drift_claims, run_claims
from zimage_train.measure.proofs.step import step_claims
from zimage_train.measure.proofs.subject import Subject, choose_model
from zimage_train.measure.proofs.weights import weight_claims
from zimage_train.report import template
from zimage_train.report.console import Console

PARTS: dict[str, Callable[[Subject], Iterator[Claim]]] = {
    "weights": weight_claims,
    "text": text_claims,
    "latents": latent_claims,
    "step": step_claims,
    "runs": run_claims,
    "drift": drift_claims,
}
"""Part -> what yields its claims, in the order in which they are measured."""


def prove(config: Config | None, is_quick: bool, folder: Path) -> bool:
    """Measure every part that `folder` does not hold yet, and write prove.json and prove.html there after each.

    Nothing personal is written: no path, prompt or name of a user. A part that fails to run is a claim that fails.

    Returns:
        Whether every claim that was tried holds.
    """
    console = Console(is_main=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    subject = choose_model(config, "bf16", is_quick)
    machine = {
        "machine": records.machine(subject.device),
        "versions": records.versions() | {"zimage-train": __version__},
        "model": {
            "is_miniature": subject.is_miniature,
            "parameters": sum(math.prod(size) for size in subject.shape.parameters.values()),
            "dtype": subject.dtype,
        },
    }
    found = _earlier(folder / "prove.json", machine)
    for number, (part, claims) in enumerate(PARTS.items()):
        if part not in found:
            console.progress("proving", number, len(PARTS), part)
            found[part] = [claim.as_json(subject.is_miniature) for claim in _claims_of(claims, subject, part)]
        for row in found[part]:
            console.info(_line(row))
        atomic.write_json(folder / "prove.json", machine | {"parts": found})
        atomic.write_text(folder / "prove.html", template.render_html("prove.html", **machine, parts=found))
    console.info(f"{folder / 'prove.html'} and prove.json can be sent: they name no path, prompt or person")
    return all(row["verdict"] != "fails" for rows in found.values() for row in rows)


def _claims_of(claims: Callable[[Subject], Iterator[Claim]], subject: Subject, part: str) -> Iterator[Claim]:
    try:
        yield from claims(subject)
    except ZImageTrainError as error:
        # The code alone, since messages name paths of the user.
        yield Claim(f"{part} can be measured", 1, "errors", 0, "equality", error.problems[0].code)


def _earlier(path: Path, machine: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the parts that an earlier start measured on the same machine, model and versions."""
    try:
        content = parse_json(path.read_bytes())
        is_same = all(content[name] == value for name, value in json.loads(json.dumps(machine)).items())
        return {part: content["parts"][part] for part in PARTS if part in content["parts"]} if is_same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _line(row: dict[str, Any]) -> str:
    bound = f" (at most {row['bound']:.3g})" if "bound" in row else ""
    value = f": {row['value']:.4g} {row.get('unit', '')}{bound}".rstrip() if "value" in row else ""
    note = f"; {row['note']}" if "note" in row else ""
    return f"{row['verdict']:8} {row['promise']}{value}{note}"
