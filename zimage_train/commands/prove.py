"""The `prove` command: measure on this machine what the project promises, and write a page that can be sent."""

import base64
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from zimage_train import __version__
from zimage_train.config.schema import Config
from zimage_train.errors import ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json
from zimage_train.measure import records
from zimage_train.measure.proofs import durations, loaders
from zimage_train.measure.proofs.claims import Claim, Verdict
from zimage_train.measure.proofs.encoders import latent_claims, text_claims
from zimage_train.measure.proofs.plans import memory_claims
from zimage_train.measure.proofs.results import PICTURES, drift_claims, export_claims, picture_claims
from zimage_train.measure.proofs.runs import RUNS, exactness_claims, trained_lora
from zimage_train.measure.proofs.step import step_claims
from zimage_train.measure.proofs.subject import Subject, choose_model
from zimage_train.measure.proofs.times import time_claims
from zimage_train.measure.proofs.weights import weight_claims
from zimage_train.planning import memory
from zimage_train.report import template
from zimage_train.report.console import Console

ClaimsFn = Callable[[Subject], Iterator[Claim]]
PARTS: dict[str, ClaimsFn] = {
    "weights": weight_claims,
    "text": text_claims,
    "latents": latent_claims,
    "step": step_claims,
    "memory": memory_claims,
    "time": time_claims,
    "exactness": exactness_claims,
    "export": export_claims,
    "pictures": picture_claims,
    "drift": drift_claims,
}
"""Part -> the function that yields its claims, in the order in which they are measured."""
PROJECTS = {"comfyui": loaders.COMFYUI, "aitoolkit": loaders.AI_TOOLKIT}
LOADERS = {"comfyui": loaders.comfyui_claims, "aitoolkit": loaders.aitoolkit_claims}
"""Part -> the same for another project's own code, given its folder and the LoRA of a run."""


def prove(config: Config | None, is_quick: bool, folder: Path, projects: dict[str, Path]) -> bool:
    """Measure every part that `folder` does not hold yet, and write prove.json and prove.html there after each.

    Nothing personal is written: no path, prompt or name of a user. A part that cannot be measured fails.

    Args:
        projects: the folders of other projects whose loaders are tried, by part.

    Returns:
        Whether every claim that was tried holds.

    Raises:
        ZImageTrainError: the model is not complete, or a folder is not what it should be.
    """
    console = Console(is_main=True)
    for part, path in projects.items():
        loaders.require_project(PROJECTS[part], path)
    atomic.require_writable_folder(folder, "--output")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    subject = choose_model(config, is_quick, folder / "work")
    if subject.device.type == "cpu":
        # A model for the CPU is so small that threads wait for each other, and twenty times as long beside other work.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    facts = facts_of(subject)
    parts = [*PARTS, *projects]
    found = _measured_before(folder / "prove.json", facts, parts)
    if not found:
        atomic.remove_folder(subject.work)  # a LoRA in it would be that of other versions or another model
    if len(found) < len(parts):
        missing = durations.expected_seconds(subject, [part for part in parts if part not in found])
        console.info(f"about {max(round(missing / 60), 1)} min{durations.source(subject)}; the same command continues")
    for number, part in enumerate(parts):
        if part in found:
            _print_part(console, part, found[part])
            continue
        console.progress("proving", number, len(parts), part)
        found[part] = _measure(part, subject, projects, console)
        _print_part(console, part, found[part])
        atomic.write_json(folder / "prove.json", facts | {"parts": found})
        pictures, verdicts = _pictures(subject), _verdicts(found)
        html = template.render_html(
            "prove.html", **facts, parts=found, pictures=pictures, verdicts=verdicts, format_value=format_value
        )
        atomic.write_text(folder / "prove.html", html)
    for run in RUNS:
        atomic.remove_folder(subject.work / run)
    console.info(f"{folder / 'prove.html'} and prove.json can be sent: they name no path, prompt or person of yours")
    verdicts = _verdicts(found)
    console.info(f"claims: {verdicts.count('holds')} hold, {verdicts.count('fails')} fail")
    return "fails" not in verdicts


def format_value(value: float) -> str:
    """Return a measured value for people: all digits of a count, and four of anything else."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def facts_of(subject: Subject) -> dict[str, Any]:
    """Return the machine, the versions and the model, which are the same wherever results may be put together."""
    return {
        "machine": records.machine(subject.device),
        "versions": records.versions() | {"zimage-train": __version__, "python": sys.version.split()[0]},
        "model": {
            "variant": subject.config.model.variant,
            "is_miniature": subject.is_miniature,
            "parameters": memory.parameters_of(subject.shape),
            "dtype": subject.dtype,
        },
        "quick": subject.is_quick,
    }


def _measure(part: str, subject: Subject, projects: dict[str, Path], console: Console) -> dict[str, Any]:
    """Return the claims of a part as JSON, and the seconds that it took. An error is a claim that fails."""
    began, claims = time.perf_counter(), list[Claim]()
    try:
        if subject.device.type == "cuda":
            measured = measure_apart(part, subject, projects)
        else:
            measured = claims_of(part, subject, projects)
        claims += measured
    except Exception as error:  # noqa: BLE001  other libraries raise anything, and the other parts can be measured
        # The kind alone is written, since messages name paths of the user.
        kind = error.problems[0].code if isinstance(error, ZImageTrainError) else type(error).__name__
        console.warning(f"{part}: {error}")
        claims.append(Claim(f"{part} can be measured", 1, "errors", 0, "equality", kind))
    rows = [claim.as_json(subject.is_miniature) for claim in claims]
    return {"seconds": round(time.perf_counter() - began, 1), "claims": rows}


def measure_apart(part: str, subject: Subject, projects: dict[str, Path]) -> list[Claim]:
    """Return the claims of a part from a process of its own.

    A GPU's memory is free for it and for the processes that it starts, and it can crash alone.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(claims_of, part, subject, projects).result()


def claims_of(part: str, subject: Subject, projects: dict[str, Path]) -> list[Claim]:
    """Return the claims of a part."""
    if part in PARTS:
        return list(PARTS[part](subject))
    return list(LOADERS[part](projects[part], trained_lora(subject), subject.shape))


def _measured_before(path: Path, facts: dict[str, Any], parts: list[str]) -> dict[str, dict[str, Any]]:
    """Return the parts that an earlier start measured on the same machine, model and versions."""
    try:
        content = parse_json(path.read_bytes())
        is_same = all(content[name] == value for name, value in json.loads(json.dumps(facts)).items())
        found = {part: content["parts"][part] for part in parts if part in content["parts"]}
        return found if is_same and all(map(_is_complete, found.values())) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_complete(part: dict[str, Any]) -> bool:
    return bool(part["claims"]) and all("verdict" in claim and "promise" in claim for claim in part["claims"])


def _print_part(console: Console, part: str, measured: dict[str, Any]) -> None:
    console.info(f"{part} ({measured['seconds']:.0f} s)")
    for claim in measured["claims"]:
        console.info(f"  {_line(claim)}")


def _line(claim: dict[str, Any]) -> str:
    text = f"{claim['verdict']:8}  {claim['promise']}"
    if "value" in claim:
        text = f"{text}: {format_value(claim['value'])} {claim.get('unit', '')}".rstrip()
    if "bound" in claim:
        text += f" (at most {claim['bound']:.3g})"
    return f"{text}; {claim['note']}" if "note" in claim else text


def _verdicts(parts: dict[str, dict[str, Any]]) -> list[Verdict]:
    return [claim["verdict"] for part in parts.values() for claim in part["claims"]]


def _pictures(subject: Subject) -> list[dict[str, str]]:
    """Return the pictures that were drawn so far, as addresses that hold their bytes, so that the page is one file."""
    found: list[dict[str, str]] = []
    for name in PICTURES:
        pair = {"name": f"{name} the LoRA"}
        for who in ("ours", "diffusers"):
            path = subject.work / f"{name}-{who}.png"
            if path.exists():
                pair[who] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        if len(pair) == 3:
            found.append(pair)
    return found
