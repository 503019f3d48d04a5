"""The `sample` command: images of any Z-Image model with any number of LoRAs, each counted."""

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
from zimage_train.lora.lora_file import Lora
from zimage_train.models import locate
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import ModelPaths
from zimage_train.planning import devices, planner
from zimage_train.planning.memory import WeightPlacement, Workload
from zimage_train.planning.planner import PlanConstraints
from zimage_train.report import preview_images
from zimage_train.report.console import Console
from zimage_train.training import distributed

AT_ONCE_IN_MEMORY = 16
"""Batches of images that are drawn before they are written."""


@dataclass(frozen=True)
class SamplingOptions:
    """What was asked for of every image; None: the image's or the variant's own."""

    negative: str | None
    seed: int | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    count: int = 1
    """Images of each prompt, whose seeds follow each other."""

    def given(self) -> dict[str, Any]:
        """Recipe fields that are not to have their default."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "count"}


@dataclass(frozen=True)
class BatchLimit:
    """How many images go through the model at once, and the GB to stay within; None: what the card has."""

    at_once: int = 1
    budget_gb: float | None = None


def sample_images(
    model: ModelSettings, loras: list[WeightedLora], recipes: list[SamplingRequest], room: BatchLimit, output: Path
) -> None:
    """Write one image a recipe into the folder `output`.

    Raises:
        ZImageTrainError: the model or a LoRA cannot be used, in whole, or `output` cannot be written to.
    """
    with devices.explained_out_of_memory("give a smaller --width, --height or --batch"):
        _sample(model, loras, recipes, room, output)


def _sample(
    model: ModelSettings, loras: list[WeightedLora], recipes: list[SamplingRequest], room: BatchLimit, output: Path
) -> None:
    console = Console()
    atomic.require_writable_folder(output)
    found, shape = locate_model(model)
    read = [(lora_args.read_weighted_lora(one.path, shape), one.weight) for one in loras]
    for one, (lora, _) in zip(loras, read, strict=True):
        console.info(lora_args.match_message(one, lora))
    stacked = arithmetic.stack_loras(read)
    loaded = load_model(model, found, shape, stacked, recipes, console, room)
    many = AT_ONCE_IN_MEMORY * room.at_once
    with console.live_progress(), swap.with_lora(loaded.frozen.model, stacked):
        for start in range(0, len(recipes), many):
            some = recipes[start : start + many]
            what = "sampling" if len(recipes) <= many else f"sampling from image {start + 1} of {len(recipes)}"
            images = loaded.draw(some, partial(console.progress, what), room.at_once)
            for image, recipe in zip(images, some, strict=True):
                path = _free_path(output, recipe.seed)
                preview_images.save_preview(path, image, recipe, drawn_by(model, loras))
                console.info(f"{path}  {recipe.summary()}")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to draw, and the prompts that it may be asked for."""

    frozen: FrozenTransformer
    extras: Path
    embeds: Mapping[str, Tensor]

    def draw(self, recipes: list[SamplingRequest], tick: StepProgress, at_once: int = 1) -> list[Image]:
        """One image a recipe, with the LoRA that is attached now."""
        return render_images(self.frozen, self.extras, recipes, self.embeds, tick, at_once)


def locate_model(model: ModelSettings) -> tuple[ModelPaths, TransformerShape]:
    """Where the parts of `model` are, downloaded if need be, and its shape.

    Raises:
        WeightsError: a part of it is not to be had, or is something else.
    """
    try:
        found = locate.locate(model.model_copy(update={"adapter": None}))
    except WeightsError as error:
        raise type(error)(*map(_as_options, error.problems)) from None
    return found, locate.transformer_tensors(found.transformer)[0]


def _as_options(problem: Problem) -> Problem:
    """`problem` of a setting as one of the option that stands for it here."""
    place = problem.place
    if place.key == "model.extras":
        what = f"the text encoder and VAE of {place.source or ''} {problem.message}"
        location = Location(argument=Argument("--extras"))
        return Problem(location, what, "give a folder or hub id that has them", problem.code)
    if place.key == "model.path":
        return replace(problem, location=replace(place, key=None, argument=Argument("MODEL")))
    return problem


def load_model(
    model: ModelSettings,
    found: ModelPaths,
    shape: TransformerShape,
    largest: Lora,
    recipes: list[SamplingRequest],
    console: Console,
    room: BatchLimit = BatchLimit(),
) -> LoadedModel:
    """Encode the prompts of `recipes`, then load the transformer, so that LoRAs up to `largest` fit the device too.

    Raises:
        ConfigError: the budget takes less than the images need.
    """
    device = distributed.init().device
    form = _form(shape, model, largest, recipes, device, room)
    encode = prompt_encoder(found.extras, device, model.dtype)
    embeds = dict(encode(prompts_to_encode(recipes), lambda done, total: None))
    del encode
    if form.streamed:
        console.info(f"{form.streamed} of {shape.n_layers} blocks are streamed, to fit this card")
    return LoadedModel(
        load_frozen(found.transformer, None, model.dtype, device, None, form.streamed), found.extras, embeds
    )


def drawn_by(model: ModelSettings, loras: list[WeightedLora]) -> str:
    """What an image says of the model and the LoRAs that drew it."""
    used = " and ".join(f"{one.path.name}={one.weight:g}" for one in loras) or "no LoRA"
    return f"{model.path or model.variant} in {model.dtype} with {used}"


def requests_for(asked: SamplingOptions, model: ModelSettings, wishes: Sequence[PromptSpec]) -> list[SamplingRequest]:
    """Recipes of `wishes`: what one says itself, what is asked for of all, and the rest from the variant.

    Raises:
        ConfigError: lists what a wish says that no image can have.
    """
    variant = VARIANTS[model.variant]
    given = {"negative": "", "seed": 42, "width": 1024, "height": 1024} | asked.given()
    rest = {"steps": variant.steps, "guidance": variant.guidance, "shift": variant.shift} | given
    errors: list[ZImageTrainError] = []
    recipes: list[SamplingRequest] = []
    for index, wish in enumerate(wishes):
        first = wish.overrides.get("seed", rest["seed"] + index * asked.count)
        fields = {"prompt": wish.prompt, **rest, **wish.overrides}
        with collect_errors(errors):
            recipes += [_request(fields | {"seed": first + number}) for number in range(asked.count)]
    raise_all(errors)
    return recipes


def _request(fields: Mapping[str, Any]) -> SamplingRequest:
    try:
        return SamplingRequest.from_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{fields['prompt'][:40]!r}: {'.'.join(map(str, first['loc']))}"
        raise ConfigError(Problem(where, f"is {first['input']!r}", first["msg"].lower(), "bad-value")) from None


def said_of(drawn: list[Path]) -> list[str]:
    """What drew each of the images, which their recipes do not hold: model and LoRAs are given anew."""
    known = ((path, preview_images.drawn_by(path)) for path in drawn)
    return [
        f"{path} was drawn by {text}; this command uses the model and the --lora given to it"
        for path, text in known
        if text
    ]


def requests_of(asked: SamplingOptions, drawn: list[Path]) -> list[SamplingRequest]:
    """Recipes of images, with what is asked for in place of their own.

    Raises:
        DataError: an image was not made by this trainer.
    """
    return [_request(asdict(preview_images.request_of(path)) | asked.given()) for path in drawn]


def command_for(config: Config, lora: Path) -> str:
    """The command line that draws the first preview of a finished run again, to be pasted into a shell."""
    program = ["zimage-train"] if shutil.which("zimage-train") else [sys.executable, "-m", "zimage_train"]
    model = config.model
    words = [*program, "sample", model.path or model.variant, "--lora", str(lora)]
    for one in config.sample.extra_loras:
        words += ["--lora", one.file if one.weight == 1 else f"{one.file}={one.weight!r}"]
    if model.path is not None and model.variant != "turbo":
        words += ["--variant", model.variant]
    if model.extras is not None:
        words += ["--extras", model.extras]
    if model.dtype != "bf16":
        words += ["--dtype", model.dtype]
    recipes = preview_requests(config)
    if not recipes:
        return shlex.join([*words, "--prompt", "..."])
    first, variant = recipes[0], VARIANTS[model.variant]
    words += ["--prompt", first.prompt, "--seed", str(first.seed)]
    words += ["--width", str(first.width), "--height", str(first.height)]
    if first.steps != variant.steps:
        words += ["--steps", str(first.steps)]
    if first.guidance != variant.guidance:
        words += ["--guidance", repr(first.guidance)]
    if first.guidance > 0 and first.negative:
        words += ["--negative", first.negative]
    return shlex.join(words)


def _form(
    shape: TransformerShape,
    model: ModelSettings,
    lora: Lora,
    recipes: list[SamplingRequest],
    device: torch.device,
    room: BatchLimit,
) -> WeightPlacement:
    """How the model fits the device while `recipes` are drawn; the LoRA is taken for a trained one, to be safe."""
    here = devices.device_limits(device)
    job = Workload(
        shape=shape,
        dtype=model.dtype,
        trained=sum(factors.a.numel() + factors.b.numel() for factors in lora.values()),
        optimizer="adamw8bit",
        sizes=Counter(),
        batch_size=1,
        caption_tokens=0,
        previews=tuple(recipes),
        gpu=device.type == "cuda",
        previews_at_once=max(map(len, split_into_batches(recipes, room.at_once))),
    )
    limit = here.limit_bytes if room.budget_gb is None else min(here.limit_bytes, room.budget_gb * 1e9)
    plan = planner.choose_plan(job, PlanConstraints((None,), None, None), limit, main_memory_bytes(), here.card)
    if room.budget_gb is not None and not plan.fits:
        what = f"is {room.budget_gb:g}, and these images take {format_bytes(plan.peak.total)} (predicted)"
        todo = "give more, or a smaller --width, --height or --batch"
        raise ConfigError(Problem("--budget-gb", what, todo, "does-not-fit"))
    return plan.form


def _free_path(folder: Path, seed: int) -> Path:
    number = 0
    while (path := folder / f"sample-{seed}{f'-{number}' if number else ''}.png").exists():
        number += 1
    return path
