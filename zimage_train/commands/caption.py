"""The `caption` command: write captions with a vision-language model on this machine."""

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

MODEL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
SMALLER_MODEL = "give a smaller model, such as --model Qwen/Qwen3-VL-2B-Instruct"
MEMORY_PER_WEIGHT_BYTE = 1.15
"""Memory of a model as a multiple of its weights: activations of a thousand tokens, and the CUDA context."""


@dataclass(frozen=True)
class CaptionOptions:
    """Options of the command."""

    model: str
    """A folder or a hub id."""
    style: str
    """A key of `CAPTION_STYLES`."""
    kind: str | None
    """A key of `OMITTED_TRAITS`: what the LoRA is to learn, which captions leave out."""
    trigger: str | None
    instruction: str | None
    """Replaces the instruction of the style."""
    extension: str
    force: bool


def caption_folder(folder: Path, options: CaptionOptions, console: Console) -> list[str]:
    """Caption the images of `folder` that have no caption, and return the lines to print.

    Each caption is written as soon as the model has answered, so that an interruption loses none.

    Raises:
        DataError: lists the images that cannot be read or captioned, after the others have been captioned.
        WeightsError: the model cannot be obtained or loaded.
        ConfigError: the model does not fit the device.
    """
    with console.live_progress():
        # Existing captions may contain a placeholder, which only a config with a trigger may have.
        entry = DataEntry(folder=str(folder), caption_ext=options.extension, trigger=options.trigger or "any")
        scan = scan_entry(entry, "FOLDER", progress=console.progress)
    errors = list(scan.errors)
    pairs = _images_to_caption(scan.images, options, errors)
    num_captioned = sum(bool(image.raw_captions) for image in scan.images)
    if num_captioned and not options.force:
        console.info(f"{num_captioned} of {len(scan.images)} images have a caption, which is kept without --force")
    num_written = _write_captions(pairs, options, console, errors) if pairs else 0
    if errors:
        if pairs:
            console.info(f"{num_written} captions written")
        raise_all(errors)
    hint = "; read them: training learns what they say" if num_written else ""
    return [f"{num_written} captions written to {folder}{hint}"]


def _images_to_caption(
    images: list[ImageRecord], options: CaptionOptions, errors: list[ZImageTrainError]
) -> list[tuple[Path, Path]]:
    """Return (image, caption file) for each image to caption; images that share a caption file go into `errors`."""
    images_by_file: dict[Path, list[ImageRecord]] = {}
    for image in images:
        file = image.path.with_name(image.path.stem + options.extension)
        images_by_file.setdefault(file, []).append(image)
    pairs = []
    for file, sharing in images_by_file.items():
        if len(sharing) > 1:
            names = ", ".join(image.path.name for image in sharing)
            what = f"is the caption file of several images ({names})"
            errors.append(DataError(Problem(str(file), what, "rename all but one of them", "ambiguous-caption")))
        elif options.force or not _has_content(file):
            pairs.append((sharing[0].path, file))
    return pairs


def _has_content(file: Path) -> bool:
    """Return whether a caption would replace something, even something that cannot be read as text."""
    return file.exists() and (not file.is_file() or file.read_bytes().strip() != b"")


def _write_captions(
    pairs: list[tuple[Path, Path]], options: CaptionOptions, console: Console, errors: list[ZImageTrainError]
) -> int:
    """Caption each (image, caption file), and return the number of captions; failures go into `errors`."""
    model = _load_model(options.model, console)
    instruction = options.instruction or caption_prompts.caption_instruction(
        options.style, options.kind, options.trigger
    )
    num_written = 0
    with devices.explained_out_of_memory(SMALLER_MODEL), console.live_progress():
        for number, (image, file) in enumerate(pairs, 1):
            caption = _describe(model, instruction, image, options)
            if caption:
                atomic.write_text(file, caption + "\n")
                console.info(f"{image.name}: {caption}")
                num_written += 1
            else:
                hint = "write its caption yourself, or give another --model"
                errors.append(DataError(Problem(str(image), "the model's answer has no caption", hint, "no-caption")))
            console.progress("captions", number, len(pairs), image.name)
    return num_written


def _load_model(name: str, console: Console) -> captioner.CaptionModel:
    folder = locate.repository(name, Location(argument=Argument("--model")), MODEL_FILES)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # `current_accelerator` alone would name the accelerator that torch was built for, even on a machine without it.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    limit = devices.device_limits(device).limit_bytes
    if size * MEMORY_PER_WEIGHT_BYTE > limit:
        what = f"its weights take {format_bytes(size)}, and {device.type} has {format_bytes(limit)}"
        raise ConfigError(Problem(f"--model: {name}", what, SMALLER_MODEL, "does-not-fit"))
    console.info(f"loading {name}, {format_bytes(size)}, on {device.type}")
    return captioner.load_captioner(folder, device)


def _describe(model: captioner.CaptionModel, instruction: str, path: Path, options: CaptionOptions) -> str:
    """Return the caption of an image, or an empty text if the model's answer has none."""
    image = images.load(path, path.read_bytes())
    answer, is_whole = model.answer(image, instruction, caption_prompts.CAPTION_STYLES[options.style].max_tokens)
    return caption_prompts.clean_answer(answer, options.style, is_whole, options.trigger)
