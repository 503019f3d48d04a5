"""The command `publish`: a folder with a LoRA, its model card and its previews, and its upload (torch-free)."""

import re
from dataclasses import dataclass
from pathlib import Path

from zimage_train.commands import compare
from zimage_train.config.load import read_config
from zimage_train.config.schema import Config
from zimage_train.config.triggers import has_any_trigger
from zimage_train.diffusion import comfyui_canvas
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ConfigError, DiskError, Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.units import format_bytes
from zimage_train.models.hub import client
from zimage_train.report import model_card, preview_images
from zimage_train.training import run_dir
from zimage_train.training.run_dir import RunDir

FOLDER = "publish"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PublishedLora:
    """What is published of a run."""

    config: Config
    folder: RunDir
    path: Path
    step: int
    images: list[tuple[Path, SamplingRequest]]
    """The previews that this LoRA drew, first those with a trigger."""


def publish_run(run: Path, license_name: str | None, repository: str | None, output: Path | None) -> list[str]:
    """Write the folder of the run's LoRA, and upload it to `repository` if that is given; return the lines to print.

    Raises:
        ConfigError: `run` is no run folder, the license is missing or not valid, or there is no token to upload with.
        WeightsError: the run has exported no LoRA, or it cannot be uploaded.
        DiskError: the folder cannot be written.
    """
    _require_arguments(license_name, repository)
    published = _find_lora(run)
    target = output if output is not None else run / FOLDER
    atomic.require_writable_folder(target, "--output")
    earlier = set(target.glob("README.md.old*"))
    files = _write_folder(published, license_name, repository, target)
    size = format_bytes(sum((target / name).stat().st_size for name in files))
    lines = [f"{target}: {published.path.name} of step {published.step}, README.md, {len(published.images)} images"]
    if license_name is None:
        lines.append("note: the card names no license; give --license, which --to requires")
    for kept in set(target.glob("README.md.old*")) - earlier:
        lines.append(f"note: the README.md that was there differed, and is now {kept.name}")
    if not published.images:
        lines.append(f"note: there are no previews of step {published.step}, so the card has no gallery")
    if repository is None:
        return [*lines, f"nothing was uploaded ({size}); --to ORG/REPO does"]
    url = client.upload_files(target, files, repository)
    return [*lines, f"uploaded {size}: {url}"]


def _require_arguments(license_name: str | None, repository: str | None) -> None:
    problems: list[Problem] = []
    if license_name is not None and not LICENSE.fullmatch(license_name):
        hint = "give an identifier of the hub, such as apache-2.0, cc-by-nc-4.0 or other"
        problems.append(Problem("--license", f"is {license_name!r}", hint, "bad-argument"))
    if repository is not None:
        if not REPOSITORY.fullmatch(repository):
            problems.append(Problem("--to", f"is {repository!r}", "give ORG/REPO or USER/REPO", "bad-argument"))
        if license_name is None:
            hint = "say under which license others may use it, e.g. --license apache-2.0"
            problems.append(Problem("--license", "is missing, which --to requires", hint, "missing-argument"))
        problems += client.upload_problems()
    if problems:
        raise ConfigError(*problems)


def _find_lora(run: Path) -> PublishedLora:
    """Return the last LoRA of a run: the averaged LoRA if that drew the previews."""
    compare.require_run(run, "give output/NAME of a run")
    config = read_config(run / "config.yaml")
    folder = RunDir(run, config.name)
    is_ema = config.sample.weights == "ema"
    path = folder.lora(is_ema=is_ema)
    if not path.exists():
        saved = re.compile(re.escape(config.name) + r"-\d{6,}\.safetensors")
        exports = [file for file in path.parent.glob("*.safetensors") if saved.fullmatch(file.name)]
        if not exports:
            what = "has exported no LoRA yet"
            raise WeightsError(Problem(str(run), what, "train until the first save (save.every)", "missing-file"))
        path = max(exports, key=lambda file: int(file.stem.rpartition("-")[2]))
    step = _step_of(path, config)
    table = preview_images.preview_table(folder.samples)
    images: list[tuple[Path, SamplingRequest]] = []
    for image, request in zip(table.rows.get(step, []), table.requests, strict=False):
        if image is not None:
            images.append((image, request))
    images.sort(key=lambda image: not has_any_trigger(image[1].prompt, config.triggers))
    return PublishedLora(config, folder, path, step, images)


def _step_of(path: Path, config: Config) -> int:
    """Return the step of an export: from its header, or else its name; the last file has the last step."""
    text = read_header(path).metadata.get("ss_steps", "") or path.stem.removeprefix(config.name).lstrip("-")
    return int(text) if text.isdecimal() else config.train.steps


def _write_folder(
    published: PublishedLora, license_name: str | None, repository: str | None, target: Path
) -> list[str]:
    """Write all files into `target`, and return their names; images of an earlier call are removed."""
    lora = published.path
    files = [lora.name, "README.md"]
    atomic.write(target / lora.name, [lora.read_bytes()])
    workflow = comfyui_canvas.canvas_path(lora)
    if workflow.exists():
        atomic.write(target / workflow.name, [workflow.read_bytes()])
        files.append(workflow.name)
    gallery: list[tuple[str, SamplingRequest]] = []
    for image, request in published.images:
        name = model_card.gallery_path(image)
        try:
            preview_images.copy_preview(image, request, target / name)
        except OSError as error:
            hint = "remove it, or let the run draw it again"
            raise DiskError(Problem(str(image), f"cannot be read ({error})", hint, "unreadable-file")) from None
        gallery.append((name, request))
        files.append(name)
    for old in (target / "images").glob("*.png"):
        if preview_images.NAME.fullmatch(old.name) and f"images/{old.name}" not in files:
            atomic.remove(old)
    dataset = run_dir.read_facts(published.folder).get("dataset", {})
    content = model_card.CardContent(
        config=published.config,
        lora=lora.name,
        step=published.step,
        images=gallery,
        workflow=workflow.name if workflow.exists() else None,
        num_pictures=dataset.get("pictures"),
    )
    _write_card(target / "README.md", model_card.model_card(content, license_name, repository))
    return files


def _write_card(path: Path, card: str) -> None:
    """Write the card; another text that is there, which somebody may have edited, is kept beside it."""
    if path.exists() and path.read_bytes() != card.encode():
        atomic.rename_as_backup(path, ".old")
    atomic.write_text(path, card)
