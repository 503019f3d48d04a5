"""The `init` command: a folder of images to a config with its reasons (torch-free)."""

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
from zimage_train.dataset.images import EXTENSIONS
from zimage_train.dataset.scan import KOHYA_FOLDER, MASK_FOLDER, ImageRecord, kohya_names, scan_entry
from zimage_train.errors import ConfigError, Note, Problem, ZImageTrainError, raise_all
from zimage_train.io import atomic
from zimage_train.io.progress import Progress
from zimage_train.models.locate import cached_only
from zimage_train.planning import forecast, gpus, preflight

RESOLUTIONS = (512, 768, 1024)
FILLS = 0.9
"""An image counts for a resolution if it has this much of its area."""
WORTH_SAYING = {"memory", "memory-peak", "does-not-fit", "time"}
"""Codes of lines of a forecast: `check` says the rest."""
FEW, FEW_STEPS, STEPS, MINIATURE_STEPS = 10, 1800, 3000, 300
USUAL_FIRST_WORDS = {"a", "an", "the", "this", "it", "in", "on", "photo", "photograph", "picture", "image", "portrait"}
MINIATURE_KNOWS = "one coloured shape on a plain background"
MOST_NOTES = 6
TAGS_HAVE = 6
"""Words between two commas, on average, below which a caption is a list of tags."""


@dataclass(frozen=True)
class FolderSummary:
    """What is in a folder of images."""

    folder: str
    images: list[ImageRecord]
    captions: list[str]
    """Own ones, in the order of the images."""
    notes: list[Note]
    problems: list[Problem]
    kohya: tuple[str, ...] = ()
    """What subfolders of kohya's layout call the images."""
    mask: str | None = None
    """A folder of masks among them."""

    @property
    def areas(self) -> list[int]:
        return sorted(image.width * image.height for image in self.images)


@dataclass(frozen=True)
class Answers:
    """What the images do not say."""

    kind: str
    variant: str
    trigger: str
    gpu: str | None
    """A card to plan for; None: the one that is here."""


def summarize_folder(folder: Path, tick: Progress) -> FolderSummary:
    """Look at every image and caption of `folder`.

    Raises:
        DataError: there is no such folder, or nothing in it can be used.
    """
    mask = _mask_folder(folder)
    # Placeholders in captions stand for a trigger that is yet to be chosen.
    scan = scan_entry(DataEntry(folder=str(folder), trigger="any", mask=mask), "FOLDER", tick=tick)
    if not scan.images:
        raise_all(scan.errors)
    problems = [problem for error in scan.errors for problem in error.problems]
    own = [image.raw_captions[0] for image in scan.images if image.raw_captions]
    kohya = kohya_names([image.path for image in scan.images], folder)
    unsaid = {"no-caption", "kohya-folders"} if kohya else {"no-caption"}
    notes = [note for note in scan.notes if note.code not in unsaid]
    return FolderSummary(str(folder), scan.images, own, notes, problems, tuple(kohya), mask)


def _mask_folder(folder: Path) -> str | None:
    """A subfolder called masks with files under the names of images beside it."""
    if not folder.is_dir():
        return None
    stems = {path.stem for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS}
    for path in sorted(folder.iterdir()):
        if MASK_FOLDER.fullmatch(path.name) and path.is_dir():
            names = [one.stem for one in path.iterdir() if one.suffix.lower() in EXTENSIONS]
            return str(path) if names and stems.issuperset(names) else None
    return None


def describe_folder(seen: FolderSummary) -> list[str]:
    """What was seen, for people."""
    images, areas = seen.images, seen.areas
    sides = [round(area**0.5) for area in (areas[0], areas[len(areas) // 2], areas[-1])]
    sizes = f"of {sides[0]} px" if sides[0] == sides[2] else f"of {sides[0]} to {sides[2]} px, half {sides[1]} or more"
    shapes = Counter(_shape(image) for image in images)
    with_captions = f"{len(seen.captions)} of {len(images)} have captions"
    if seen.captions:
        with_captions += f" ({'tags' if are_tags(seen.captions) else 'sentences'}, {_words(seen.captions)} words each)"
    lines = [
        f"{seen.folder}: {len(images)} image{'s' * (len(images) > 1)}; {with_captions}",
        f"as large as squares {sizes}",
        f"shapes: {', '.join(f'{count} {name}' for name, count in shapes.most_common())}",
    ]
    if seen.kohya:
        lines.append("subfolders of kohya's layout: they say how often their images are seen")
    if seen.mask:
        lines.append(f"{sum(one.mask is not None for one in images)} have masks, in {seen.mask}")
    lines += [f"note: {note}" for note in seen.notes[:MOST_NOTES]]
    if (more := len(seen.notes) - MOST_NOTES) > 0:
        lines.append(f"note: and {more} more, which check lists")
    return [*lines, *(f"to mend: {problem}" for problem in seen.problems)]


def advise_for(seen: FolderSummary, kind: str, is_miniature: bool = False) -> list[str]:
    """What people with such images would do."""
    count, (least, most) = len(seen.images), SUBJECT_KINDS[kind].image_range
    lines = []
    if (missing := count - len(seen.captions)) and not seen.kohya:
        command = f"zimage-train caption {shlex.quote(seen.folder)}"
        lines.append(f"{missing} images have no caption and get the trigger alone; `{command}` writes some")
    if is_miniature:
        return [*lines, f"the miniature knows {MINIATURE_KNOWS}: of other images it learns colours more than shapes"]
    if count < least:
        lines.append(f"{count} images are few for a {kind}: {least} to {most} are usual; more that differ help most")
    if count > most:
        lines.append(f"{count} images are more than the usual {least} to {most} for a {kind}: alike ones can go")
    if too_small := sum(area < FILLS * RESOLUTIONS[0] ** 2 for area in seen.areas):
        what = f"{too_small} images have less than {RESOLUTIONS[0]}x{RESOLUTIONS[0]} px"
        lines.append(f"{what}, which the 6 B model draws vaguely: take larger ones if you can")
    return lines


def likely_trigger(captions: Sequence[str], kohya: Sequence[str] = ()) -> str | None:
    """The word that almost all captions begin with, unless any caption may; or kohya's folders' own."""
    if kohya and not captions:
        return Counter(name.split()[0] for name in kohya if name.split()).most_common(1)[0][0]
    firsts = Counter(match[0] for caption in captions if (match := re.match(r"[\w-]+", caption)))
    if len(captions) < 3 or not firsts:
        return None
    word, count = firsts.most_common(1)[0]
    return word if count >= 0.9 * len(captions) and word.lower() not in USUAL_FIRST_WORDS else None


def template_values_for(seen: FolderSummary, answers: Answers, name: str, is_miniature: bool) -> TemplateValues:
    """What a config says of these images."""
    count = len(seen.images)
    header = ("Written by zimage-train init; docs/recipes.md says what to change when.",)
    if is_miniature:
        why = "of the miniature, which knows only small images"
        steps, why_steps, resolution = MINIATURE_STEPS, "a minute on a CPU", (64, 96)
    else:
        resolution, why = _resolutions(seen.areas)
        steps = FEW_STEPS if count < FEW else STEPS
        why_steps = f"for {count} images" + (": so few are soon learned by heart" if count < FEW else "")
    return TemplateValues(
        folder=seen.folder,
        name=name,
        trigger=answers.trigger,
        resolution=resolution,
        resolution_reason=why,
        steps=steps,
        steps_reason=why_steps,
        repeats_by_folder=bool(seen.kohya),
        mask=seen.mask,
        captions=_examples(seen.captions, answers.trigger),
        miniature=(str(mini.TURBO), str(mini.ADAPTER_V1)) if is_miniature else None,
        header=header,
    )


def require_place(path: Path, force: bool) -> None:
    """Require that a config can be written to `path`.

    Raises:
        ConfigError: there is one of that name, or it is none that a file can have.
    """
    if path.is_dir():
        raise ConfigError(Problem(f"--output: {path}", "is a folder", "give the name of a file, such as my.yaml"))
    above = next((one for one in path.parents if one.exists()), path.parent)
    if not above.is_dir():
        raise ConfigError(Problem(f"--output: {path}", f"{above} is not a folder", "choose another place"))
    if path.exists() and not force:
        todo = "give another with -o or --name, or write over it with --force"
        raise ConfigError(Problem(str(path), "exists", todo))


def answer_error(option: str, value: str) -> str | None:
    """Why no config can have this trigger or name, or None."""
    document = {"name": "x", "data": [{"folder": "x", "trigger": "x"}]}
    if option == "--name":
        document["name"] = value
    else:
        document["data"] = [{"folder": "x", "trigger": value}]
    _, problems = load.validate_config(document, lambda key_path: option)
    return "; ".join(filter(None, (problems[0].message, problems[0].hint))) if problems else None


def write_config_file(path: Path, own: TemplateValues, answers: Answers, problems: Sequence[Problem]) -> list[str]:
    """Write the config, and say what a run of it takes, what is to be mended beside `problems`, and how to start it."""
    text = templates.render_template(answers.variant, answers.kind, own)
    config = load.load_document(path, load.parse(path, text), [])
    atomic.write_text(path, text)
    lines, bad = [f"wrote {path}"], list(problems)
    if (run := Path(config.output_dir) / config.name).exists():
        lines.append(f"{run} is there: training goes on in it if it is the same, and --name gives another")
    try:
        checked = preflight.check_run(config, cached_only)
        if own.miniature is None:
            plan = forecast.forecast_lines(checked, answers.gpu, None)
            lines += [line.text for line in plan if line.code in WORTH_SAYING]
    except ZImageTrainError as error:
        bad += [problem for problem in error.problems if problem not in bad]
        lines += [f"to mend first: {problem}" for problem in bad[len(problems) :]]
    quoted = shlex.quote(str(path))
    aside = [f"  zimage-train check {quoted} --quarantine  # moves what cannot be used away"] if problems else []
    return [*lines, "", "next:", *(aside or [f"  zimage-train check {quoted}"]), f"  zimage-train train {quoted}"]


def name_of(folder: Path, output: Path | None) -> str:
    """A run's name from that of its config or its images: signs that every file system takes."""
    if output is not None:
        return re.sub(r"-(?=\d+$)", "_", _plain(output.stem)) or "my_lora"
    match = KOHYA_FOLDER.fullmatch(folder.resolve().name)
    return f"{_plain(match[2] if match else folder.resolve().name) or 'my'}_lora"


def _plain(text: str) -> str:
    return re.sub(r"[^\w+-]+", "_", text).strip("_-+")


def are_tags(captions: Sequence[str]) -> bool:
    """Whether captions are lists of tags: commas in most of them, and few words between two."""
    commas = [caption.count(",") for caption in captions]
    words = sum(len(caption.split()) for caption in captions)
    return sum(count >= 2 for count in commas) * 2 > len(captions) and words / sum(c + 1 for c in commas) < TAGS_HAVE


def local_gpu() -> str | None:
    """The name of this machine's card, if it is one of those that are known."""
    found = gpus.detect_gpu()
    card = gpus.find_gpu(found.name) if found else None
    return card.name if card else None


def _resolutions(areas: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Those that at least half of the images fill."""
    filled = [side for side in RESOLUTIONS if sum(area >= FILLS * side**2 for area in areas) * 2 >= len(areas)]
    if filled == list(RESOLUTIONS):
        return RESOLUTIONS, "1024 alone: fewer samples an epoch, longer steps"
    if filled:
        return tuple(filled), f"half of the images are smaller than {RESOLUTIONS[len(filled)]}, and none is enlarged"
    return RESOLUTIONS[:1], "half of the images are smaller; none is enlarged"


def _examples(captions: Sequence[str], trigger: str) -> tuple[str, ...]:
    """Two captions to draw, with the trigger, which training puts in front where it is missing."""
    short = sorted({caption for caption in captions if len(caption) <= 200}, key=lambda text: (len(text), text))
    chosen = [short[len(short) // 3], short[-1]] if len(short) > 1 else short
    with_trigger = [text.replace("[trigger]", trigger) for text in dict.fromkeys(chosen)]
    return tuple(text if trigger in text else f"{trigger} {text}" for text in with_trigger)


def _shape(image: ImageRecord) -> str:
    ratio = image.width / image.height
    return "square" if 0.95 < ratio < 1.05 else "landscape" if ratio > 1 else "portrait"


def _words(captions: Sequence[str]) -> int:
    return round(sum(len(caption.split()) for caption in captions) / len(captions))
