"""The `compare` command for LoRA files: each drawn at each strength, on each model, from the same noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from zimage_train.lora.lora_file import Lora
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import ModelPaths
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
Given = TypeVar("Given")


@dataclass(frozen=True)
class GridSpec:
    """What is drawn: every combination."""

    models: Sequence[ModelSettings]
    loras: Sequence[Path]
    strengths: Sequence[float]
    samplings: Sequence[Sampling]
    """None given: each model's own."""
    prompts: Sequence[str]
    asked: SamplingOptions

    @property
    def applied(self) -> list[WeightedLora | None]:
        """Each LoRA at each strength; None, the bare model, comes first where a strength is 0."""
        found = [WeightedLora(path, strength) for path in self.loras for strength in self.strengths if strength != 0]
        return [None, *found] if 0 in self.strengths else [*found]

    def recipes(self, model: ModelSettings) -> list[SamplingRequest]:
        """What is drawn on `model` with each of them: every prompt in every way of sampling."""
        pairs = self.samplings or [(None, None)]
        each = [replace(self.asked, steps=steps, guidance=guidance) for steps, guidance in pairs]
        return [
            recipe
            for asked in each
            for recipe in sample.requests_for(asked, model, list(map(PromptSpec, self.prompts)))
        ]

    @property
    def columns(self) -> str:
        """The first axis along which there is more than one value."""
        counts = {LORA: self.loras, STRENGTH: self.strengths, SAMPLING: self.samplings, MODEL: self.models}
        return next((axis for axis, values in counts.items() if len(values) > 1), PROMPT)


@dataclass(frozen=True)
class DrawnImage:
    """An image that was drawn, and by what."""

    path: Path
    recipe: SamplingRequest
    model: str
    applied: WeightedLora | None


def parse_strengths(text: str) -> list[float]:
    """Take `0,0.5,1`.

    Raises:
        ConfigError: something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(abs(one) <= LARGEST_WEIGHT for one in found):
        what = f"is no list of numbers from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        raise ConfigError(Problem(f"--strength {text}", what, "write for example 0,0.5,1"))
    return _once(f"--strength {text}", found)


def parse_samplings(text: str) -> list[Sampling]:
    """Take `8:0,30:1`: steps and guidance g.

    Raises:
        ConfigError: something else.
    """
    try:
        found = [(int(steps), float(guidance)) for steps, guidance in (part.split(":") for part in text.split(","))]
    except ValueError:
        found = [(0, 0.0)]
    if not all(1 <= steps <= 1000 and 0 <= guidance <= 50 for steps, guidance in found):
        what = "is no list of STEPS:G with 1 to 1000 steps and g from 0 to 50"
        raise ConfigError(Problem(f"--sampling {text}", what, "write for example 8:0,30:1"))
    return _once(f"--sampling {text}", found)


def _once(where: str, values: list[Given]) -> list[Given]:
    if len(set(values)) < len(values):
        raise ConfigError(Problem(where, "has a value twice", "leave one out"))
    return values


def lora_files(paths: Sequence[Path]) -> list[Path]:
    """The LoRA files that `paths` mean: themselves, or the finished LoRAs of run folders.

    Raises:
        ZImageTrainError: lists what is neither.
    """
    errors: list[ZImageTrainError] = []
    found: list[Path] = []
    for path in paths:
        with collect_errors(errors):
            found += [path] if path.is_file() else [_finished(folder) for folder in compare.run_folders(path)]
    raise_all(errors)
    compare.require_once(found)
    return found


def _finished(folder: Path) -> Path:
    lora = RunDir(folder, compare.settings_of(folder)["name"]).lora()
    if not lora.exists():
        todo = "finish it, or give one of the files in its lora folder"
        raise WeightsError(Problem(str(folder), "has no finished LoRA", todo))
    return lora


def draw_grid(wanted: GridSpec, by: str | None, output: Path) -> list[str]:
    """Draw everything that is `wanted` into the folder `output`, and compare it there; returns what to tell.

    Raises:
        ZImageTrainError: a model or a LoRA cannot be used, in whole, or `output` cannot be written to.
    """
    atomic.require_writable_folder(output)
    axes = [axis for axis in AXES if axis != SAMPLING or wanted.samplings]
    columns = comparison.find_axis(MODEL if by == "variant" else by, axes) if by else wanted.columns
    console = Console()
    with devices.explained_out_of_memory("give a smaller --width and --height"), console.live_progress():
        drawn = _draw_all(wanted, output, console)
    return compare.written(output, _compared(wanted, drawn, columns))


def _draw_all(wanted: GridSpec, output: Path, console: Console) -> list[DrawnImage]:
    """Every image, model by model; all LoRAs are held against all models before the first of them is loaded."""
    errors: list[ZImageTrainError] = []
    ready: list[tuple[ModelSettings, ModelPaths, TransformerShape]] = []
    for model in wanted.models:
        with collect_errors(errors):
            ready.append((model, *sample.locate_model(model)))
    raise_all(errors)
    loras: dict[Path, Lora] = {}
    for path in wanted.loras:
        with collect_errors(errors):
            loras[path] = lora_args.read_weighted_lora(path, *(shape for _, _, shape in ready))
            console.info(f"{path}: matched {len(loras[path])}/{len(loras[path])} modules")
    raise_all(errors)
    largest = max(loras.values(), key=lambda lora: sum(one.a.numel() + one.b.numel() for one in lora.values()))
    names = comparison.short_names([Path(model.path or model.variant) for model in wanted.models])
    drawn: list[DrawnImage] = []
    for name, (model, found, shape) in zip(names, ready, strict=True):
        loaded = sample.load_model(model, found, shape, largest, wanted.recipes(model), console)
        for applied in wanted.applied:
            what = f"{applied.path.stem}-{applied.weight:g}" if applied else NO_LORA
            for recipe, image in _images(loaded, wanted.recipes(model), applied, loras, f"{name}, {what}", console):
                path = output / IMAGES / f"{len(drawn):03d}-{comparison.slug(what)}.png"
                preview_images.save_preview(path, image, recipe, sample.drawn_by(model, [applied] if applied else []))
                drawn.append(DrawnImage(path, recipe, name, applied))
        del loaded  # before the next one comes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return drawn


def _images(
    loaded: LoadedModel,
    recipes: list[SamplingRequest],
    applied: WeightedLora | None,
    loras: dict[Path, Lora],
    what: str,
    out: Console,
) -> list[tuple[SamplingRequest, Image]]:
    factors = arithmetic.stack_loras([(loras[applied.path], applied.weight)]) if applied else {}
    with swap.with_lora(loaded.frozen.model, factors):
        images = loaded.draw(recipes, lambda done, total: out.progress(f"drawing on {what}", done, total))
    return list(zip(recipes, images, strict=True))


def _compared(wanted: GridSpec, drawn: Sequence[DrawnImage], columns: str) -> Comparison:
    bare = [path.with_suffix("") if path.suffix == ".safetensors" else path for path in wanted.loras]
    names = dict(zip(wanted.loras, comparison.short_names(bare), strict=True))
    shots = []
    for one in drawn:
        lora, strength = (names[one.applied.path], one.applied.weight) if one.applied else (NO_LORA, 0.0)
        values = {LORA: lora, STRENGTH: f"{strength:g}", MODEL: one.model, PROMPT: _prompt(wanted, one.recipe)}
        if wanted.samplings:
            values[SAMPLING] = comparison.sampling_label(one.recipe)
        shots += [
            ComparisonImage(one.path, one.recipe, values, place)
            for place in _places(one, columns, wanted, list(names.values()))
        ]
    return Comparison(
        title=" against ".join(names.values()),
        images=shots,
        columns=columns,
        rows=[
            axis for axis in (PROMPT, LORA, STRENGTH, SAMPLING, MODEL) if axis in shots[0].values and axis != columns
        ],
        subjects=[Subject(name, _facts(path)) for path, name in names.items()],
        remarks=[],
    )


def _places(one: DrawnImage, columns: str, wanted: GridSpec, names: list[str]) -> list[dict[str, str]]:
    """Where an image stands for others: the bare model is every LoRA at strength 0, and a column beside each."""
    if one.applied is None and columns == STRENGTH:
        return [{LORA: name} for name in names]
    strengths = [f"{strength:g}" for strength in wanted.strengths if strength != 0]
    if one.applied is None and columns == LORA and strengths:
        return [{STRENGTH: strength} for strength in strengths]
    return [{}]


def _prompt(wanted: GridSpec, recipe: SamplingRequest) -> str:
    """The prompt, with its seed if it is asked for several times."""
    text = recipe.prompt or comparison.EMPTY
    return f"{text} (seed {recipe.seed})" if list(wanted.prompts).count(recipe.prompt) > 1 else text


def _facts(path: Path) -> dict[str, str]:
    steps = read_header(path).metadata.get("ss_steps")
    return {"file": str(path)} | ({"trained steps": steps} if steps else {})
