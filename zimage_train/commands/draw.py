"""The `compare` command for LoRA files: draw each at each strength, on each model, from the same noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL.Image import Image

from zimage_train.commands import compare, lora_args, sample
from zimage_train.commands.lora_args import LARGEST_WEIGHT, WeightedLora
from zimage_train.commands.sample import LoadedModel, SamplingOptions
from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion.prompts import PromptSpec
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ConfigError, Problem, WeightsError, ZImageTrainError, collect_errors, raise_all
from zimage_train.io import atomic
from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import arithmetic, swap
from zimage_train.lora.deltas import Deltas
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ModelPaths
from zimage_train.planning import devices
from zimage_train.report import comparison, preview_images
from zimage_train.report.comparison import IMAGES, MODEL, PROMPT, SAMPLING, Comparison, ComparisonImage, Subject
from zimage_train.report.console import Console
from zimage_train.training.run_dir import RunDir

LORA, STRENGTH = "LoRA", "strength"
AXES = (LORA, STRENGTH, SAMPLING, MODEL, PROMPT)
NO_LORA = "no LoRA"

Sampling = tuple[int, float]
"""Steps and guidance g."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class GridSpec:
    """Values to draw images with, in all combinations."""

    models: Sequence[ModelSettings]
    loras: Sequence[Path]
    strengths: Sequence[float]
    samplings: Sequence[Sampling]
    """Empty for the default of each model."""
    prompts: Sequence[str]
    options: SamplingOptions

    @property
    def applied_loras(self) -> list[WeightedLora | None]:
        """Each LoRA at each strength; if a strength is 0, None comes first and stands for the model without LoRA."""
        applied: list[WeightedLora | None] = [None] if 0 in self.strengths else []
        for path in self.loras:
            applied += [WeightedLora(path, strength) for strength in self.strengths if strength != 0]
        return applied

    def requests(self, model: ModelSettings) -> list[SamplingRequest]:
        """Return what is drawn on `model` with each LoRA: every prompt with every way of sampling."""
        specs = [PromptSpec(prompt) for prompt in self.prompts]
        requests = []
        for steps, guidance in self.samplings or [(None, None)]:
            options = replace(self.options, steps=steps, guidance=guidance)
            requests += sample.requests_for(options, model, specs)
        return requests

    @property
    def default_columns(self) -> str:
        """The first axis with more than one value."""
        values = {LORA: self.loras, STRENGTH: self.strengths, SAMPLING: self.samplings, MODEL: self.models}
        for axis, axis_values in values.items():
            if len(axis_values) > 1:
                return axis
        return PROMPT


@dataclass(frozen=True)
class DrawnImage:
    """An image on disk, with the request, the model and the LoRA that it was drawn with."""

    path: Path
    request: SamplingRequest
    model: str
    lora: WeightedLora | None


def parse_strengths(text: str) -> list[float]:
    """Parse weights such as `0,0.5,1`.

    Raises:
        ConfigError: it is not a list of numbers, or a number is too large or given twice.
    """
    try:
        strengths = [float(part) for part in text.split(",")]
    except ValueError:
        strengths = [math.nan]
    if not all(abs(strength) <= LARGEST_WEIGHT for strength in strengths):  # NaN is refused as well
        what = f"is not a list of numbers from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        raise ConfigError(Problem(f"--strength {text}", what, "write for example 0,0.5,1", "bad-argument"))
    return _require_different(f"--strength {text}", strengths)


def parse_samplings(text: str) -> list[Sampling]:
    """Parse pairs of steps and guidance g such as `8:0,30:1`.

    Raises:
        ConfigError: it is not a list of such pairs, a value is out of range, or a pair is given twice.
    """
    samplings: list[Sampling] = []
    try:
        for part in text.split(","):
            steps, guidance = part.split(":")
            samplings.append((int(steps), float(guidance)))
    except ValueError:
        samplings = [(0, 0.0)]
    if not all(1 <= steps <= 1000 and 0 <= guidance <= 50 for steps, guidance in samplings):  # NaN is refused as well
        what = "is not a list of STEPS:G with 1 to 1000 steps and g from 0 to 50"
        raise ConfigError(Problem(f"--sampling {text}", what, "write for example 8:0,30:1", "bad-argument"))
    return _require_different(f"--sampling {text}", samplings)


def _require_different(where: str, values: list[Value]) -> list[Value]:
    if len(set(values)) < len(values):
        raise ConfigError(Problem(where, "has a value twice", "give each value once", "set-twice"))
    return values


def lora_files(paths: Sequence[Path]) -> list[Path]:
    """Return the LoRA files at `paths`; a run folder stands for its finished LoRA.

    Raises:
        ZImageTrainError: lists the paths that are neither, and files that are given twice.
    """
    errors: list[ZImageTrainError] = []
    files: list[Path] = []
    for path in paths:
        with collect_errors(errors):
            if path.is_file():
                files.append(path)
            else:
                files += [_finished_lora(folder) for folder in compare.run_folders(path)]
    raise_all(errors)
    compare.require_distinct(files)
    return files


def _finished_lora(folder: Path) -> Path:
    lora = RunDir(folder, compare.settings_of(folder)["name"]).lora()
    if not lora.exists():
        hint = "finish it, or give a file in its lora folder"
        raise WeightsError(Problem(str(folder), "has no finished LoRA", hint, "missing-file"))
    return lora


def draw_grid(spec: GridSpec, by: str | None, output: Path) -> list[str]:
    """Draw the images of `spec` into the folder `output`, compare them there, and return the lines to print.

    Args:
        by: the axis of the columns; by default the first axis with more than one value.

    Raises:
        ZImageTrainError: a model or a LoRA cannot be used, or `output` cannot be written to.
    """
    atomic.require_writable_folder(output, "--output")
    columns = spec.default_columns
    if by is not None:
        axes = [axis for axis in AXES if axis != SAMPLING or spec.samplings]
        columns = comparison.find_axis(MODEL if by == "variant" else by, axes)
    console = Console()
    with devices.explained_out_of_memory("give a smaller --width and --height"), console.live_progress():
        images = _draw_all(spec, output, console)
    return compare.save_comparison(output, _compare_images(spec, images, columns))


def _draw_all(spec: GridSpec, output: Path, console: Console) -> list[DrawnImage]:
    """Draw every image, model by model; every LoRA is matched with every model before the first model is loaded."""
    models = _locate_models(spec.models)
    loras = _read_loras(spec.loras, [shape for _, _, shape in models], console)
    largest = max(loras.values(), key=sample.num_parameters)
    names = comparison.short_names([Path(model.path or model.variant) for model in spec.models])
    drawn: list[DrawnImage] = []
    for name, (model, paths, shape) in zip(names, models, strict=True):
        requests = spec.requests(model)
        loaded = sample.load_model(model, paths, shape, largest, requests, console)
        for lora in spec.applied_loras:
            label = f"{lora.path.stem}-{lora.weight:g}" if lora else NO_LORA
            stacked = arithmetic.sum_deltas([(loras[lora.path], lora.weight)]) if lora else {}
            source = sample.drawn_by(model, [lora] if lora else [])
            for request, image in _draw(loaded, requests, stacked, f"drawing on {name}, {label}", console):
                path = output / IMAGES / f"{len(drawn):03d}-{comparison.slug(label)}.png"
                preview_images.save_preview(path, image, request, source)
                drawn.append(DrawnImage(path, request, name, lora))
        del loaded  # its memory is needed for the next model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return drawn


def _locate_models(models: Sequence[ModelSettings]) -> list[tuple[ModelSettings, ModelPaths, TransformerShape]]:
    """Return each model with its paths and its shape.

    Raises:
        WeightsError: lists every model that cannot be obtained.
    """
    errors: list[ZImageTrainError] = []
    located = []
    for model in models:
        with collect_errors(errors):
            located.append((model, *sample.locate_model(model, "--model")))
    raise_all(errors)
    return located


def _read_loras(paths: Sequence[Path], shapes: Sequence[TransformerShape], console: Console) -> dict[Path, Deltas]:
    """Read LoRAs that must fit models of all `shapes`.

    Raises:
        WeightsError: lists every LoRA that cannot be read or does not fit.
    """
    errors: list[ZImageTrainError] = []
    loras: dict[Path, Deltas] = {}
    for path in paths:
        with collect_errors(errors):
            loras[path] = lora_args.read_weighted_lora(path, *shapes)
            console.info(f"{path}: matched {len(loras[path])}/{len(loras[path])} modules")
    raise_all(errors)
    return loras


def _draw(
    loaded: LoadedModel, requests: list[SamplingRequest], lora: Deltas, task: str, console: Console
) -> list[tuple[SamplingRequest, Image]]:
    with swap.with_lora(loaded.frozen.model, lora):
        images = loaded.draw(requests, partial(console.progress, task))
    return list(zip(requests, images, strict=True))


def _compare_images(spec: GridSpec, drawn: Sequence[DrawnImage], columns: str) -> Comparison:
    stems = []
    for path in spec.loras:  # a hub id has no suffix to remove
        stems.append(path.with_suffix("") if path.suffix == ".safetensors" else path)
    names = dict(zip(spec.loras, comparison.short_names(stems), strict=True))
    images: list[ComparisonImage] = []
    for image in drawn:
        lora, strength = (names[image.lora.path], image.lora.weight) if image.lora else (NO_LORA, 0.0)
        prompt = _prompt_label(spec, image.request)
        values = {LORA: lora, STRENGTH: f"{strength:g}", MODEL: image.model, PROMPT: prompt}
        if spec.samplings:
            values[SAMPLING] = comparison.sampling_label(image.request)
        for position in _positions(image, columns, spec, list(names.values())):
            images.append(ComparisonImage(image.path, image.request, values, position))
    rows = (PROMPT, LORA, STRENGTH, SAMPLING, MODEL)
    return Comparison(
        title=" against ".join(names.values()),
        images=images,
        columns=columns,
        rows=[axis for axis in rows if axis in images[0].values and axis != columns],
        subjects=[Subject(name, _lora_facts(path)) for path, name in names.items()],
        remarks=[],
    )


def _positions(image: DrawnImage, columns: str, spec: GridSpec, lora_names: Sequence[str]) -> list[dict[str, str]]:
    """Return where an image is placed: axis -> value, on axes where that is not the image's own value.

    The image without LoRA is placed several times: as the strength 0 of every LoRA, or as a column beside the LoRAs at
    every strength.
    """
    if image.lora is None and columns == STRENGTH:
        return [{LORA: name} for name in lora_names]
    strengths = [strength for strength in spec.strengths if strength != 0]
    if image.lora is None and columns == LORA and strengths:
        return [{STRENGTH: f"{strength:g}"} for strength in strengths]
    return [{}]


def _prompt_label(spec: GridSpec, request: SamplingRequest) -> str:
    """Return the prompt, with its seed if the prompt is given repeatedly."""
    text = request.prompt or comparison.EMPTY
    return f"{text} (seed {request.seed})" if list(spec.prompts).count(request.prompt) > 1 else text


def _lora_facts(path: Path) -> dict[str, str]:
    facts = {"file": str(path)}
    if steps := read_header(path).metadata.get("ss_steps"):
        facts["trained steps"] = steps
    return facts
