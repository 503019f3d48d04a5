"""The `init` command: write a config for a folder of images, with the reasons for its settings (torch-free)."""

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_train import mini
from zimage_train.config import load, templates
from zimage_train.config.dataset import DataEntry
from zimage_train.config.templates import SUBJECT_KINDS, TemplateValues
from zimage_train.dataset.captions import compose_prompt
from zimage_train.dataset.images import EXTENSIONS
from zimage_train.dataset.scan import ImageRecord, scan_entry
from zimage_train.dataset.sources import KOHYA_FOLDER, MASK_FOLDER, kohya_names
from zimage_train.errors import ConfigError, Note, Problem, ZImageTrainError, raise_all
from zimage_train.io import atomic
from zimage_train.io.progress import Progress
from zimage_train.models.locate import cached_only
from zimage_train.planning import forecast, gpus, preflight

RESOLUTIONS = (512, 768, 1024)
MIN_AREA_FRACTION = 0.9
"""An image is large enough for a resolution if it has this fraction of the resolution's area."""
FORECAST_CODES = {"memory", "memory-peak", "does-not-fit", "time"}
"""Codes of the lines of a forecast that are printed; `check` prints the others."""
FEW_IMAGES = 10
STEPS, STEPS_FOR_FEW_IMAGES, STEPS_FOR_MINIATURE = 3000, 1800, 300
USUAL_FIRST_WORDS = {"a", "an", "the", "this", "it", "in", "on", "photo", "photograph", "picture", "image", "portrait"}
"""First words of captions that are not a trigger."""
MINIATURE_IMAGES = "one coloured shape on a plain background"
MAX_NOTES = 6
MAX_WORDS_PER_TAG = 6
"""Captions with fewer words between two commas, on average, are lists of tags."""
MAX_EXAMPLE_LENGTH = 200
"""Characters of a caption that may become a preview prompt."""


@dataclass(frozen=True)
class FolderSummary:
    """Contents of a folder of images."""

    folder: str
    images: list[ImageRecord]
    captions: list[str]
    """Captions of the captioned images, in the order of the images."""
    notes: list[Note]
    problems: list[Problem]
    """Files that cannot be used."""
    kohya: tuple[str, ...] = ()
    """Names in the subfolders of kohya's layout: `ohwx man` for `10_ohwx man`."""
    mask: str | None = None
    """Subfolder of masks."""

    @property
    def areas(self) -> list[int]:
        """Pixels of each image, ascending."""
        return sorted(image.width * image.height for image in self.images)


@dataclass(frozen=True)
class Answers:
    """What the images alone do not determine: options, answers to questions, or defaults."""

    kind: str
    variant: str
    trigger: str
    gpu: str | None
    """A GPU to plan for; None for this machine's."""


def summarize_folder(folder: Path, progress: Progress) -> FolderSummary:
    """Read every image and caption of `folder`.

    Raises:
        DataError: the folder does not exist, or none of its files can be used.
    """
    mask = _mask_folder(folder)
    # A trigger is not chosen yet, but captions with a placeholder need it.
    entry = DataEntry(folder=str(folder), trigger="any", mask=mask)
    scan = scan_entry(entry, "FOLDER", progress=progress)
    if not scan.images:
        raise_all(scan.errors)
    problems = [problem for error in scan.errors for problem in error.problems]
    captions = [image.raw_captions[0] for image in scan.images if image.raw_captions]
    kohya = kohya_names([image.path for image in scan.images], folder)
    # `describe_folder` reports the first two in its own words, and the third is of the trigger above.
    omitted_codes = {"no-caption", "kohya-folders", "trigger-case"} if kohya else {"no-caption", "trigger-case"}
    notes = [note for note in scan.notes if note.code not in omitted_codes]
    return FolderSummary(str(folder), scan.images, captions, notes, problems, tuple(kohya), mask)


def _mask_folder(folder: Path) -> str | None:
    """Return the subfolder called masks if all of its images have the names of images in `folder`."""
    if not folder.is_dir():
        return None
    names = _image_names(folder)
    for path in sorted(folder.iterdir()):
        if MASK_FOLDER.fullmatch(path.name) and path.is_dir():
            mask_names = _image_names(path)
            return str(path) if mask_names and mask_names <= names else None
    return None


def _image_names(folder: Path) -> set[str]:
    """Return the names of the images in `folder`, without extension."""
    return {path.stem for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS}


def describe_folder(summary: FolderSummary) -> list[str]:
    """Return the lines that describe the images and captions, with notes and problems."""
    images, captions = summary.images, summary.captions
    overview = f"{summary.folder}: {len(images)} image{'s' * (len(images) > 1)}"
    overview += f"; {len(captions)} of {len(images)} have captions"
    if captions:
        mean_words = round(sum(len(caption.split()) for caption in captions) / len(captions))
        overview += f" ({'tags' if are_tags(captions) else 'sentences'}, {mean_words} words each)"

    shapes = Counter(_shape(image) for image in images)
    lines = [
        overview,
        _size_line(summary.areas),
        f"shapes: {', '.join(f'{count} {shape}' for shape, count in shapes.most_common())}",
    ]
    if summary.kohya:
        lines.append("subfolders of kohya's layout: their numbers are used as repeats")
    if summary.mask:
        num_masks = sum(image.mask is not None for image in images)
        lines.append(f"{num_masks} have masks, in {summary.mask}")
    lines += [f"note: {note}" for note in summary.notes[:MAX_NOTES]]
    if len(summary.notes) > MAX_NOTES:
        lines.append(f"note: and {len(summary.notes) - MAX_NOTES} more, which check lists")
    return lines + [f"to fix: {problem}" for problem in summary.problems]


def _size_line(areas: Sequence[int]) -> str:
    """Return the line on the sizes of images, as sides of squares of equal area; `areas` are ascending."""
    smallest, median, largest = (round(area**0.5) for area in (areas[0], areas[len(areas) // 2], areas[-1]))
    if smallest == largest:
        return f"sizes: as large as squares of {smallest} px"
    return f"sizes: as large as squares of {smallest} to {largest} px, half of them {median} px or more"


def advise_for(summary: FolderSummary, kind: str, is_miniature: bool = False) -> list[str]:
    """Return advice on missing captions, and on too few, too many or too small images."""
    count = len(summary.images)
    lines = []
    num_missing = count - len(summary.captions)
    if num_missing and not summary.kohya:
        command = f"zimage-train caption {shlex.quote(summary.folder)}"
        lines.append(f"{num_missing} images have no caption and get the trigger alone; `{command}` writes captions")
    if is_miniature:
        known = f"the miniature knows {MINIATURE_IMAGES}: of other images it learns colours rather than shapes"
        return [*lines, known]
    fewest, most = SUBJECT_KINDS[kind].image_range
    if count < fewest:
        lines.append(f"{count} images are few for a {kind}: {fewest} to {most} are usual; add images that differ")
    if count > most:
        lines.append(f"{count} images are more than the usual {fewest} to {most} for a {kind}: similar images can go")
    num_small = sum(area < MIN_AREA_FRACTION * RESOLUTIONS[0] ** 2 for area in summary.areas)
    if num_small:
        what = f"{num_small} images have less than {RESOLUTIONS[0]}x{RESOLUTIONS[0]} px"
        lines.append(f"{what}, at which the 6 B model is blurry: use larger images if you can")
    return lines


def likely_trigger(captions: Sequence[str], kohya: Sequence[str] = ()) -> str | None:
    """Return the first word of nearly all captions, unless that word is common, or the word in kohya's folder names.

    None if there is no such word, or if there are fewer than three captions to judge by.
    """
    if kohya and not captions:
        words = Counter(name.split()[0] for name in kohya if name.split())
        return words.most_common(1)[0][0] if words else None
    first_words: Counter[str] = Counter()
    for caption in captions:
        if match := re.match(r"[\w-]+", caption):
            first_words[match[0]] += 1
    if len(captions) < 3 or not first_words:
        return None
    word = first_words.most_common(1)[0][0]
    count = sum(number for other, number in first_words.items() if other.casefold() == word.casefold())
    is_usual = word.lower() in USUAL_FIRST_WORDS
    return word if count >= 0.9 * len(captions) and not is_usual else None


def template_values_for(summary: FolderSummary, answers: Answers, name: str, is_miniature: bool) -> TemplateValues:
    """Return the values that the template of a config needs."""
    count = len(summary.images)
    if is_miniature:
        steps, why_steps = STEPS_FOR_MINIATURE, "a minute on a CPU"
        resolution, why_resolution = (64, 96), "the miniature knows only small images"
    else:
        steps, why_steps = STEPS, f"for {count} images"
        if count < FEW_IMAGES:
            steps, why_steps = STEPS_FOR_FEW_IMAGES, f"for {count} images: so few are soon learned by heart"
        resolution, why_resolution = _choose_resolutions(summary.areas)
    return TemplateValues(
        folder=summary.folder,
        name=name,
        trigger=answers.trigger,
        resolution=resolution,
        resolution_reason=why_resolution,
        steps=steps,
        steps_reason=why_steps,
        repeats_by_folder=bool(summary.kohya),
        mask=summary.mask,
        captions=_example_prompts(summary.captions, answers.trigger),
        miniature=(str(mini.TURBO), str(mini.ADAPTER_V1)) if is_miniature else None,
        header=("Written by zimage-train init; docs/recipes.md says what to change when.",),
    )


def require_place(path: Path, force: bool) -> None:
    """Require that a config can be written to `path`, before anything else is done.

    Raises:
        ConfigError: the path is a folder, is below a file, or exists and `force` is not set.
    """
    if path.is_dir():
        hint = "give the name of a file, such as my.yaml"
        raise ConfigError(Problem(f"--output: {path}", "is a folder", hint, "not-a-file"))
    parent = next((parent for parent in path.parents if parent.exists()), path.parent)
    if not parent.is_dir():
        what = f"{parent} is not a folder"
        raise ConfigError(Problem(f"--output: {path}", what, "choose another place", "not-a-folder"))
    if path.exists() and not force:
        hint = "give another with -o or --name, or replace it with --force"
        raise ConfigError(Problem(str(path), "exists", hint, "file-exists"))


def answer_error(option: str, value: str) -> str | None:
    """Return why a config cannot have this value of `--trigger` or `--name`, or None if it can."""
    document = {"name": "x", "data": [{"folder": "x", "trigger": "x"}]}
    if option == "--name":
        document["name"] = value
    else:
        document["data"] = [{"folder": "x", "trigger": value}]
    _, problems = load.validate_config(document, lambda key_path: option)
    if not problems:
        return None
    return "; ".join(filter(None, (problems[0].message, problems[0].hint)))


def write_config_file(path: Path, values: TemplateValues, answers: Answers, problems: Sequence[Problem]) -> list[str]:
    """Write the config, and return lines on memory and time, on what to fix, and on the next commands.

    Args:
        problems: of the folder, which are already printed; lines are added for further problems.
    """
    text = templates.render_template(answers.variant, answers.kind, values)
    config = load.load_document(path, load.parse(path, text), [])
    atomic.write_text(path, text)
    lines = [f"wrote {path}"]
    run_folder = Path(config.output_dir) / config.name
    if run_folder.exists():
        lines.append(f"{run_folder} exists: training continues it if the settings are the same; --name gives another")
    try:
        spec = preflight.check_run(config, cached_only)
        if values.miniature is None:
            forecast_lines = forecast.forecast_lines(spec, answers.gpu, None)
            lines += [line.text for line in forecast_lines if line.code in FORECAST_CODES]
    except ZImageTrainError as error:
        lines += [f"to fix first: {problem}" for problem in error.problems if problem not in problems]
    quoted = shlex.quote(str(path))
    check = f"  zimage-train check {quoted}"
    if problems:
        check += " --quarantine  # moves unusable images away"
    return [*lines, "", "next:", check, f"  zimage-train train {quoted}"]


def name_of(folder: Path, output: Path | None) -> str:
    """Return a name for the run from that of its config or else its folder, in characters that all systems allow."""
    if output is not None:
        # A name may not end in -digits, which would look like the step of a LoRA.
        return re.sub(r"-(?=\d+$)", "_", _slug(output.stem)) or "my_lora"
    folder_name = folder.resolve().name
    if match := KOHYA_FOLDER.fullmatch(folder_name):
        folder_name = match[2]
    return f"{_slug(folder_name) or 'my'}_lora"


def _slug(text: str) -> str:
    return re.sub(r"[^\w+-]+", "_", text).strip("_-+")


def are_tags(captions: Sequence[str]) -> bool:
    """Return whether captions are lists of tags: most have two commas or more, with few words between them."""
    num_commas = [caption.count(",") for caption in captions]
    num_with_commas = sum(count >= 2 for count in num_commas)
    words_per_part = sum(len(caption.split()) for caption in captions) / sum(count + 1 for count in num_commas)
    return num_with_commas * 2 > len(captions) and words_per_part < MAX_WORDS_PER_TAG


def local_gpu() -> str | None:
    """Return the name of this machine's GPU, or None if there is none or its data are not known."""
    detected = gpus.detect_gpu()
    spec = gpus.find_gpu(detected.name) if detected else None
    return spec.name if spec else None


def _choose_resolutions(areas: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Return the resolutions for which at least half of the images are large enough, and the comment beside them."""
    chosen = []
    for side in RESOLUTIONS:
        num_large_enough = sum(area >= MIN_AREA_FRACTION * side**2 for area in areas)
        if num_large_enough * 2 >= len(areas):
            chosen.append(side)
    if len(chosen) == len(RESOLUTIONS):
        return RESOLUTIONS, "1024 alone: fewer samples an epoch, longer steps"
    if not chosen:
        return RESOLUTIONS[:1], "half of the images are smaller; none is enlarged"
    return tuple(chosen), f"half of the images are smaller than {RESOLUTIONS[len(chosen)]}, and none is enlarged"


def _example_prompts(captions: Sequence[str], trigger: str) -> tuple[str, ...]:
    """Return up to two captions as preview prompts; the trigger is put in front where it is missing, as in training."""
    short = {caption for caption in captions if len(caption) <= MAX_EXAMPLE_LENGTH}
    by_length = sorted(short, key=lambda caption: (len(caption), caption))
    examples = by_length if len(by_length) < 2 else [by_length[len(by_length) // 3], by_length[-1]]
    prompts = []
    for caption in dict.fromkeys(examples):
        prompts.append(compose_prompt(caption, "", trigger))
    return tuple(prompts)


def _shape(image: ImageRecord) -> str:
    ratio = image.width / image.height
    if 0.95 < ratio < 1.05:
        return "square"
    return "landscape" if ratio > 1 else "portrait"
