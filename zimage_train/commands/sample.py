"""The `sample` command: draw images with a Z-Image model and any number of LoRAs."""

import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from pydantic import ValidationError
from torch import Tensor

from zimage_train.commands import lora_args
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.config.schema import Config, ModelSettings
from zimage_train.config.types import Quantization
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset.encoding import prompt_encoder
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.diffusion.prompts import PromptSpec
from zimage_train.diffusion.render import render_images, split_into_batches
from zimage_train.diffusion.request import SamplingRequest, preview_requests, prompts_to_encode
from zimage_train.errors import (
    Argument,
    ConfigError,
    Location,
    Problem,
    WeightsError,
    ZImageTrainError,
    collect_errors,
    raise_all,
)
from zimage_train.io import atomic
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.progress import StepProgress
from zimage_train.io.units import format_bytes
from zimage_train.lora import arithmetic, swap
from zimage_train.lora.deltas import Deltas
from zimage_train.models import components, locate
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ModelPaths
from zimage_train.planning import devices, planner
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import PlanConstraints
from zimage_train.planning.workload import Workload
from zimage_train.report import preview_images
from zimage_train.report.console import Console
from zimage_train.training import distributed

BATCHES_IN_MEMORY = 16
"""Number of batches to draw before their images are written."""
DEFAULT_SEED, DEFAULT_SIZE = 42, 1024
PART_OPTIONS = {"model.text_encoder": "--text-encoder", "model.tokenizer": "--tokenizer", "model.vae": "--vae"}
"""Setting -> the option that stands for it here."""


@dataclass(frozen=True)
class SamplingOptions:
    """Options that apply to all images; None where the image's own value or that of the variant applies."""

    negative: str | None
    seed: int | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    count: int = 1
    """Number of images of each prompt, whose seeds follow each other."""

    def given(self) -> dict[str, Any]:
        """Return the fields of a request that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "count"}


@dataclass(frozen=True)
class BatchLimit:
    """Limits of a forward pass."""

    max_batch: int = 1
    """Number of images, all of equal size."""
    budget_gb: float | None = None
    """Memory, GB; None for all that the device has."""


def sample_images(
    model: ModelSettings,
    loras: list[WeightedLora],
    requests: list[SamplingRequest],
    limit: BatchLimit,
    output: Path,
) -> None:
    """Write an image for each of `requests` into the folder `output`, and print its path.

    Raises:
        ZImageTrainError: the model or a LoRA cannot be used, the images need more than `limit` allows, or `output`
            cannot be written to.
    """
    with devices.explained_out_of_memory("give a smaller --width, --height or --batch"):
        _sample(model, loras, requests, limit, output)


def _sample(
    model: ModelSettings,
    loras: list[WeightedLora],
    requests: list[SamplingRequest],
    limit: BatchLimit,
    output: Path,
) -> None:
    console = Console()
    atomic.require_writable_folder(output, "--output")
    paths, shape = locate_model(model)
    stacked = read_loras(loras, shape, console)
    loaded = load_model(model, paths, shape, stacked, requests, console, limit)
    # Images are written after each chunk, so that an interruption does not lose a thousand of them.
    chunk = BATCHES_IN_MEMORY * limit.max_batch
    with console.live_progress(), swap.with_lora(loaded.frozen.model, stacked):
        for start in range(0, len(requests), chunk):
            chunk_requests = requests[start : start + chunk]
            task = "sampling"
            if len(requests) > chunk:
                task = f"sampling from image {start + 1} of {len(requests)}"
            images = loaded.draw(chunk_requests, partial(console.progress, task), limit.max_batch)
            for image, request in zip(images, chunk_requests, strict=True):
                path = _free_path(output, request.seed)
                preview_images.save_preview(path, image, request, drawn_by(model, loras))
                console.info(f"{path}  {request.summary()}")


def read_loras(loras: Sequence[WeightedLora], shape: TransformerShape, console: Console) -> Deltas:
    """Read LoRAs for a model of `shape`, report that each matches, and return their weighted sum.

    Raises:
        WeightsError: a LoRA cannot be obtained, is not a LoRA, or has a module that does not fit the model.
    """
    weighted: list[tuple[Deltas, float]] = []
    for argument in loras:
        weighted.append((lora_args.read_weighted_lora(argument.path, shape), argument.weight))
    for argument, (lora, _) in zip(loras, weighted, strict=True):
        console.info(lora_args.match_message(argument, lora))
    return arithmetic.sum_deltas(weighted)


def num_parameters(deltas: Deltas) -> int:
    """Return the number of values of all factors."""
    return sum(delta.numel for delta in deltas.values())


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to draw, with its prompts encoded."""

    frozen: FrozenTransformer
    vae_path: Path
    """Folder or file of the VAE."""
    embeds: Mapping[str, Tensor]
    """Prompt -> its encoding."""

    def draw(self, requests: list[SamplingRequest], progress: StepProgress, max_batch: int = 1) -> list[Image]:
        """Return an image for each of `requests`, drawn with the LoRA that is attached."""
        return render_images(self.frozen, self.vae_path, requests, self.embeds, progress, max_batch)


def locate_model(model: ModelSettings, flag: str = "MODEL") -> tuple[ModelPaths, TransformerShape]:
    """Return the paths of the parts of `model`, after downloading what is missing, and its shape.

    Args:
        flag: the argument or option that gives `model.path`, for error messages.

    Raises:
        WeightsError: a part cannot be obtained, or is not what it should be.
    """
    if model.path is not None and Path(model.path).is_file():
        # Refuses a file that is not a transformer before a text encoder of gigabytes is downloaded.
        locate.transformer_tensors(Path(model.path))
    try:
        paths = locate.locate(model.model_copy(update={"adapter": None}))
    except WeightsError as error:
        problems = [_as_problem_of_option(problem, flag) for problem in error.problems]
        raise type(error)(*problems) from None
    shape = locate.transformer_tensors(paths.transformer)[0]
    components.require_components(paths.extras, shape.cap_feat_dim)
    return paths, shape


def _as_problem_of_option(problem: Problem, flag: str) -> Problem:
    """Return a problem of a config key as a problem of the option or argument that stands for the key here."""
    place = problem.place
    if place.key == "model.extras":
        what = problem.message
        if place.source is not None:
            what = f"the text encoder and VAE of {place.source} {what}"
        location = Location(argument=Argument("--extras"))
        hint = "give a folder or hub id that has them, or --text-encoder, --tokenizer and --vae"
        return Problem(location, what, hint, problem.code)
    if place.key in PART_OPTIONS:
        return replace(problem, location=replace(place, key=None, argument=Argument(PART_OPTIONS[place.key])))
    if place.key == "model.path":
        return replace(problem, location=replace(place, key=None, argument=Argument(flag)))
    return problem


def load_model(
    model: ModelSettings,
    paths: ModelPaths,
    shape: TransformerShape,
    largest: Deltas,
    requests: list[SamplingRequest],
    console: Console,
    limit: BatchLimit = BatchLimit(),
) -> LoadedModel:
    """Encode the prompts of `requests` and load the transformer, with memory left for a LoRA as large as `largest`.

    Raises:
        ConfigError: the images need more memory than `limit` allows.
    """
    device = distributed.init().device
    placement = place_weights(shape, model, largest, requests, device, limit)
    # The text encoder is freed before the transformer is loaded: both together would not fit.
    encode = prompt_encoder(paths.extras, device, model.dtype)
    embeds = dict(encode(prompts_to_encode(requests), lambda done, total: None))
    del encode
    if placement.streamed:
        console.info(f"{placement.streamed} of {shape.n_layers} blocks are streamed, to fit this GPU")
    frozen = load_frozen(paths.transformer, None, model.dtype, device, placement.quantization, placement.streamed)
    return LoadedModel(frozen, paths.extras.vae, embeds)


def drawn_by(model: ModelSettings, loras: list[WeightedLora]) -> str:
    """Return the model and the LoRAs that draw an image, as the text that its metadata gets."""
    names = " and ".join(f"{lora.path.name}={lora.weight:g}" for lora in loras) or "no LoRA"
    return f"{model.label} in {model.dtype} with {names}"


def requests_for(options: SamplingOptions, model: ModelSettings, specs: Sequence[PromptSpec]) -> list[SamplingRequest]:
    """Return the requests of prompts: values of a prompt override `options`, which override the variant's defaults.

    Raises:
        ConfigError: lists the values of prompts that no request can have.
    """
    common = default_fields(model) | options.given()
    errors: list[ZImageTrainError] = []
    requests: list[SamplingRequest] = []
    for index, spec in enumerate(specs):
        fields = common | {"prompt": spec.prompt, "seed": common["seed"] + index * options.count} | spec.overrides
        with collect_errors(errors):
            for number in range(options.count):
                requests.append(make_request(fields | {"seed": fields["seed"] + number}, spec.location))
    raise_all(errors)
    return requests


def default_fields(model: ModelSettings) -> dict[str, Any]:
    """Return the fields of a request that neither a prompt nor an option gives."""
    variant = VARIANTS[model.variant]
    return {
        "negative": "",
        "seed": DEFAULT_SEED,
        "width": DEFAULT_SIZE,
        "height": DEFAULT_SIZE,
        "steps": variant.steps,
        "guidance": variant.guidance,
        "shift": variant.shift,
    }


def make_request(fields: Mapping[str, Any], location: Location | None) -> SamplingRequest:
    """Return the request of a prompt.

    Raises:
        ConfigError: lists the values that no request can have.
    """
    try:
        return SamplingRequest.from_json(json.dumps(fields))
    except ValidationError as error:
        problems: list[Problem] = []
        for details in error.errors():
            name = ".".join(map(str, details["loc"]))
            where = replace(location or Location(source=repr(fields["prompt"][:40])), key=name)
            hint = details["msg"].lower().removeprefix("value error, ")
            problems.append(Problem(where, f"is {details['input']!r}", hint, "bad-value"))
        raise ConfigError(*problems) from None


def command_for(config: Config, lora: Path) -> str:
    """Return the command line that draws the first preview of a finished run again, quoted for a shell."""
    program = ["zimage-train"] if shutil.which("zimage-train") else [sys.executable, "-m", "zimage_train"]
    model = config.model
    words = [*program, "sample", model.path or model.variant, "--lora", str(lora)]
    for extra in config.preview_loras:
        words += ["--lora", extra.file if extra.weight == 1 else f"{extra.file}={extra.weight!r}"]
    if model.path is not None and model.variant != "turbo":
        words += ["--variant", model.variant]
    for flag, source in (
        ("--extras", model.extras),
        ("--text-encoder", model.text_encoder),
        ("--tokenizer", model.tokenizer),
        ("--vae", model.vae),
    ):
        if source is not None:
            words += [flag, source]
    if model.dtype != "bf16":
        words += ["--dtype", model.dtype]
    requests = preview_requests(config)
    if not requests:
        return shlex.join([*words, "--prompt", "..."])
    first, variant = requests[0], VARIANTS[model.variant]
    words += ["--prompt", first.prompt, "--seed", str(first.seed)]
    words += ["--width", str(first.width), "--height", str(first.height)]
    if first.steps != variant.steps:
        words += ["--steps", str(first.steps)]
    if first.guidance != variant.guidance:
        words += ["--guidance", repr(first.guidance)]
    if first.guidance > 0 and first.negative:
        words += ["--negative", first.negative]
    return shlex.join(words)


def quantization_of(model: ModelSettings) -> Quantization | None:
    """Return the format that the weights are drawn in; `auto` is a choice of trainings, and stands for none here."""
    return None if model.quantize == "auto" else model.quantize


def place_weights(
    shape: TransformerShape,
    model: ModelSettings,
    lora: Deltas,
    requests: list[SamplingRequest],
    device: torch.device,
    limit: BatchLimit,
) -> WeightPlacement:
    """Choose how many blocks are streamed, so that the model fits the device while it draws `requests`.

    The weights are quantised as `model.quantize` says, where that names a format.

    Raises:
        ConfigError: `limit` has a budget, and no number of streamed blocks keeps within it.
    """
    device_limits = devices.device_limits(device)
    workload = Workload(
        shape=shape,
        dtype=model.dtype,
        # Counted as a LoRA in training, with its optimizer: an upper bound.
        trained=num_parameters(lora),
        optimizer="adamw8bit",
        sizes=Counter(),
        batch_size=1,
        caption_tokens=0,
        previews=tuple(requests),
        gpu=device.type == "cuda",
        previews_at_once=max(map(len, split_into_batches(requests, limit.max_batch))),
    )
    limit_bytes = device_limits.limit_bytes
    if limit.budget_gb is not None:
        limit_bytes = min(limit_bytes, limit.budget_gb * 1e9)
    quantization = quantization_of(model)
    constraints = PlanConstraints(quantizations=(quantization,), mode=None, streamed=None)
    plan = planner.choose_plan(workload, constraints, limit_bytes, main_memory_bytes(), device_limits.card)
    if limit.budget_gb is not None and not plan.fits:
        what = f"is {limit.budget_gb:g}, and these images take {format_bytes(plan.peak.total)} (predicted)"
        hint = "give more, or a smaller --width, --height or --batch"
        raise ConfigError(Problem("--budget-gb", what, hint, "does-not-fit"))
    return plan.placement


def _free_path(folder: Path, seed: int) -> Path:
    """Return `folder`/sample-SEED.png, or with -1, -2, ... after the seed the first path that is free."""
    path = folder / f"sample-{seed}.png"
    number = 0
    while path.exists():
        number += 1
        path = folder / f"sample-{seed}-{number}.png"
    return path
