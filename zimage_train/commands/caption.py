"""The `caption` command: a text beside each image that has none, by a vision-language model on this machine."""

from dataclasses import dataclass
from pathlib import Path

import torch

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import caption_prompts, images
from zimage_train.dataset.scan import ImageRecord, scan_entry
from zimage_train.errors import Argument, ConfigError, DataError, Location, Problem, ZImageTrainError, raise_all
from zimage_train.io import atomic
from zimage_train.io.units import format_bytes
from zimage_train.models import captioner, locate
from zimage_train.planning import devices
from zimage_train.report.console import Console

PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
SMALLER = "give a smaller one, such as --model Qwen/Qwen3-VL-2B-Instruct"
BESIDE_WEIGHTS = 1.15
"""What a model takes in all, as a multiple of its weights: states of a thousand tokens, and the CUDA context."""


@dataclass(frozen=True)
class CaptionOptions:
    """Which captions to write."""

    model: str
    """A folder or a hub id."""
    style: str
    kind: str | None
    trigger: str | None
    instruction: str | None
    """Instead of the style's own."""
    extension: str
    force: bool


def caption_folder(folder: Path, wanted: CaptionOptions, console: Console) -> list[str]:
    """Describe every image of `folder` that has no caption, and write each text as soon as it is there.

    Raises:
        DataError: images that cannot be read or described; the others have their captions by then.
        WeightsError, ConfigError: the model cannot be had, or does not fit.
    """
    with console.live_progress():
        # Placeholders in captions that are there stand for any trigger.
        entry = DataEntry(folder=str(folder), caption_ext=wanted.extension, trigger=wanted.trigger or "any")
        scan = scan_entry(entry, "data.0", tick=console.progress)
    errors = list(scan.errors)
    todo = _to_caption(scan.images, wanted, errors)
    kept = sum(bool(image.raw_captions) for image in scan.images)
    if kept and not wanted.force:
        console.info(f"{kept} of {len(scan.images)} images have a caption, which stays; --force writes over it")
    written = _write(todo, wanted, console, errors) if todo else 0
    if errors:
        console.info(f"{written} captions written")
        raise_all(errors)
    return [f"{written} captions written to {folder}" + ("; read them: what they say is learned" if written else "")]


def _to_caption(
    images: list[ImageRecord], wanted: CaptionOptions, errors: list[ZImageTrainError]
) -> list[tuple[Path, Path]]:
    """(Image, its caption file) of those that get one."""
    by_file: dict[Path, list[ImageRecord]] = {}
    for image in images:
        by_file.setdefault(image.path.with_name(image.path.stem + wanted.extension), []).append(image)
    todo = []
    for file, sharing in by_file.items():
        if len(sharing) > 1:
            names = ", ".join(image.path.name for image in sharing)
            errors.append(DataError(Problem(str(file), f"would belong to several images ({names})", "rename them")))
        elif wanted.force or not _holds_something(file):
            todo.append((sharing[0].path, file))
    return todo


def _holds_something(file: Path) -> bool:
    """Whether there is something that a caption would be written over, readable or not."""
    return file.exists() and (not file.is_file() or file.read_bytes().strip() != b"")


def _write(
    todo: list[tuple[Path, Path]], wanted: CaptionOptions, console: Console, errors: list[ZImageTrainError]
) -> int:
    """Caption all of `todo`; how many it were."""
    model = _load(wanted.model, console)
    asked = wanted.instruction or caption_prompts.caption_instruction(wanted.style, wanted.kind, wanted.trigger)
    written = 0
    with devices.explained_out_of_memory(SMALLER), console.live_progress():
        for number, (image, file) in enumerate(todo, 1):
            text = _described(model, asked, image, wanted)
            if text:
                atomic.write_text(file, text + "\n")
                console.info(f"{image.name}: {text}")
                written += 1
            else:
                what, advice = "the model says nothing of it", "write its caption, or give another --model"
                errors.append(DataError(Problem(str(image), what, advice)))
            console.progress("captions", number, len(todo), image.name)
    return written


def _load(name: str, console: Console) -> captioner.CaptionModel:
    folder = locate.repository(name, Location(argument=Argument("--model")), PATTERNS)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    has_gpu = torch.accelerator.is_available()  # the other question answers for the build of torch, not the machine
    device = (torch.accelerator.current_accelerator() if has_gpu else None) or torch.device("cpu")
    room = devices.device_limits(device).limit_bytes
    if size * BESIDE_WEIGHTS > room:
        what = f"its weights take {format_bytes(size)}, and {device.type} has {format_bytes(room)}"
        raise ConfigError(Problem(f"--model: {name}", what, SMALLER))
    console.info(f"reading {name}, {format_bytes(size)}, on {device.type}")
    return captioner.load_captioner(folder, device)


def _described(model: captioner.CaptionModel, asked: str, path: Path, wanted: CaptionOptions) -> str:
    image = images.load(path, path.read_bytes())
    answer, is_whole = model.answer(image, asked, caption_prompts.CAPTION_STYLES[wanted.style].most_tokens)
    return caption_prompts.clean_answer(answer, wanted.style, is_whole, wanted.trigger)
