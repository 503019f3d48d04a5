"""The `prove` command: measure on this machine what the project promises, and write a page that can be sent."""

import base64
import hashlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from zimage_train import __version__
from zimage_train.config.schema import Config
from zimage_train.errors import ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.digests import DigestCache
from zimage_train.io.json_text import parse_json
from zimage_train.measure import records
from zimage_train.measure.proofs import durations, loaders
from zimage_train.measure.proofs.claims import Claim
from zimage_train.measure.proofs.encoders import latent_claims, text_claims
from zimage_train.measure.proofs.plans import memory_claims
from zimage_train.measure.proofs.proof import ClaimRow, MachineRow, ModelRow, PartRow, Proof
from zimage_train.measure.proofs.results import PICTURES, drift_claims, export_claims, picture_claims
from zimage_train.measure.proofs.runs import clear_runs, clear_work, exactness_claims, trained_lora
from zimage_train.measure.proofs.step import step_claims
from zimage_train.measure.proofs.subject import Subject, choose_model
from zimage_train.measure.proofs.times import time_claims
from zimage_train.measure.proofs.weights import weight_claims
from zimage_train.planning import memory
from zimage_train.report import template
from zimage_train.report.console import Console
from zimage_train.training.context import digest_model

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
"""Part -> the project whose own code loads the LoRA of a run in it."""


def prove(config: Config | None, is_quick: bool, folder: Path, projects: dict[str, Path]) -> bool:
    """Measure each part that has not succeeded in `folder` yet, and write prove.json and prove.html there after it.

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
    subject = choose_model(config, is_quick, folder / "prove-work")
    if subject.device.type == "cpu":
        # A model for the CPU is so small that threads wait for each other, and twenty times as long beside other work.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    name = "the miniature" if subject.is_miniature else subject.config.model.label
    console.info(f"measuring {name} in {subject.dtype} on {subject.device.type}")
    proof = _measured_before(folder, begun_proof(subject), console)
    if not proof.parts:
        clear_work(subject)  # a LoRA in it would be that of other versions or another model
    asked = [*PARTS, *projects]
    missing = [part for part in asked if part not in proof.parts or proof.parts[part].has_failed]
    if missing:
        seconds = durations.expected_seconds(subject, missing)
        time_left = f"about {round(seconds / 60)} min" if seconds >= 60 else "under a minute"
        console.info(f"{time_left}{durations.source(subject)}; the same command continues")
    parts = [*PARTS, *(part for part in PROJECTS if part in projects or part in proof.parts)]
    for number, part in enumerate(parts):
        when = "measured before"
        if part in missing:
            console.progress("proving", number, len(parts), part)
            measured = _measure(part, subject, projects, console)
            proof = proof.model_copy(update={"parts": proof.parts | {part: measured}})
            _write(proof, folder, subject)
            when = f"{measured.seconds:.0f} s"
        console.info(f"{part} ({when})")
        for claim in proof.parts[part].claims:
            console.info(f"  {_line(claim)}")
    clear_runs(subject)
    if not (folder / "prove.html").exists():
        _write(proof, folder, subject)
    console.info(f"{folder / 'prove.html'} and prove.json can be sent: they name no path, prompt or person of yours")
    verdicts = proof.verdicts
    console.info(f"claims: {verdicts.count('holds')} hold, {verdicts.count('fails')} fail")
    return "fails" not in verdicts


def format_value(value: float) -> str:
    """Return a measured value for people: all digits of a count, and four of anything else."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def begun_proof(subject: Subject) -> Proof:
    """Return a proof without claims: machine, versions and model, with which all results of a proof are measured."""
    digests = digest_model(subject.paths, DigestCache(subject.digest_file))
    return Proof(
        machine=MachineRow(**records.machine(subject.device)),
        versions=records.versions() | {"zimage-train": __version__, "python": sys.version.split()[0]},
        model=ModelRow(
            variant=subject.config.model.variant,
            is_miniature=subject.is_miniature,
            parameters=memory.parameters_of(subject.shape),
            dtype=subject.dtype,
            digest=hashlib.sha256(repr(digests).encode()).hexdigest(),
        ),
        quick=subject.is_quick,
    )


def _measured_before(folder: Path, begun: Proof, console: Console) -> Proof:
    """Return the proof of an earlier start on the same machine, model and versions, or else `begun`.

    A file that is anything else is kept under another name.
    """
    path = folder / "prove.json"
    if not path.exists():
        return begun
    try:
        proof = Proof.model_validate(parse_json(path.read_bytes()))
    except (OSError, ValueError):
        reason = "cannot be read as a proof"
    else:
        if proof.model_copy(update={"parts": {}}) == begun:
            return proof
        reason = "is of another machine, model, version or form"
    kept = atomic.rename_as_backup(path, ".old")
    if (folder / "prove.html").exists():
        atomic.rename_as_backup(folder / "prove.html", ".old")
    console.info(f"{path}: {reason}; kept as {kept.name}, with its page")
    return begun


def _measure(part: str, subject: Subject, projects: dict[str, Path], console: Console) -> PartRow:
    """Return the claims of a part, and the seconds that it took. An error is a claim that fails."""
    began = time.perf_counter()
    try:
        if subject.device.type == "cuda":
            claims = measure_apart(part, subject, projects)
        else:
            claims = claims_of(part, subject, projects)
    except Exception as error:  # noqa: BLE001  other libraries raise anything, and the other parts can be measured
        # The kind alone is written, since messages name paths of the user.
        kind = error.problems[0].code if isinstance(error, ZImageTrainError) else type(error).__name__
        console.warning(f"{part}: {error}")
        claims = [Claim(f"{part} can be measured", 1, "errors", 0, "equality", kind)]
    rows = [ClaimRow.of(claim, subject.is_miniature) for claim in claims]
    return PartRow(seconds=round(time.perf_counter() - began, 1), claims=rows)


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
    return list(loaders.loader_claims(PROJECTS[part], projects[part], trained_lora(subject), subject.shape))


def _write(proof: Proof, folder: Path, subject: Subject) -> None:
    """Write prove.json and prove.html."""
    atomic.write_json(folder / "prove.json", proof.as_json())
    html = template.render_html("prove.html", proof=proof, pictures=_pictures(subject), format_value=format_value)
    atomic.write_text(folder / "prove.html", html)


def _line(claim: ClaimRow) -> str:
    text = f"{claim.verdict:8}  {claim.promise}"
    if claim.value is not None:
        text = f"{text}: {format_value(claim.value)} {claim.unit}".rstrip()
    if claim.bound is not None:
        text += f" (at most {claim.bound:.3g})"
    return f"{text}; {claim.note}" if claim.note else text


def _pictures(subject: Subject) -> list[dict[str, str]]:
    """Return the pictures that were drawn so far, as addresses that hold their bytes, so that the page is one file."""
    found: list[dict[str, str]] = []
    for name in PICTURES:
        pair = {"name": f"{name} the LoRA"}
        for who in ("ours", "diffusers"):
            path = subject.work / f"{name}-{who}.png"
            if path.exists():
                pair[who] = _embedded(path)
        if len(pair) == 3:
            found.append(pair)
    return found


def _embedded(path: Path) -> str:
    """Return a picture as an address: its pixels alone, as the metadata of ours name the model's folder."""
    content = io.BytesIO()
    with Image.open(path) as image:
        Image.fromarray(np.asarray(image.convert("RGB"))).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
