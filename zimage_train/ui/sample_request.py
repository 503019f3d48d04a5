"""Requests of the page and of programs for images, resolved to model, LoRAs and sampling request (torch-free)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from zimage_train.config.load import read_config
from zimage_train.config.schema import Config, ModelSettings
from zimage_train.config.triggers import insert_triggers
from zimage_train.config.types import Pixels
from zimage_train.config.variants import VARIANTS, VariantName
from zimage_train.diffusion.request import SamplingRequest, preview_requests
from zimage_train.errors import (
    ConfigError,
    DataError,
    Location,
    Problem,
    ZImageTrainError,
    collect_errors,
    raise_all,
)
from zimage_train.io.dtypes import Precision
from zimage_train.models import locate
from zimage_train.training import run_dir
from zimage_train.training.run_dir import RunDir
from zimage_train.ui.lora_files import find_lora, newest_lora
from zimage_train.ui.workspace import Workspace

DEFAULT_SIZE, DEFAULT_SEED = 1024, 42
LARGEST_WEIGHT = 100.0


class SampleLora(BaseModel):
    """A LoRA and its strength."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    file: str = Field(
        description="Name of a run, for its newest LoRA; or a file in the folder of the runs or in a folder of the "
        "page."
    )
    weight: float = Field(default=1.0, ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT, description="Its change is times this.")


class SampleRequest(BaseModel):
    """An image to draw. The same request gives the same image."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {"run": "my_run", "prompt": "a photo of zorb on a beach", "seed": 7},
                {
                    "model": "turbo",
                    "prompt": "a lighthouse at dusk",
                    "width": 1024,
                    "height": 768,
                    "loras": [{"file": "my_run", "weight": 0.8}, {"file": "lora-files/other.safetensors"}],
                    "base": True,
                },
            ]
        },
    )

    prompt: str = Field(default="", description="[trigger] stands for the trigger of `run`.")
    negative: str = Field(default="", description="Negative prompt; has an effect at a guidance above 0.")
    run: str | None = Field(
        default=None,
        description="Draw as this run draws its previews: with its model, precision, quantisation, steps, guidance, "
        "size and, unless `loras` is given, its newest LoRA. With the request of a preview it equals the preview.",
    )
    model: str = Field(default="turbo", description="turbo, deturbo, base, a hub id, or a path; `run` comes before it.")
    variant: VariantName = Field(
        default="turbo", description="Variant of a model given as path or hub id, for steps, guidance and shift."
    )
    dtype: Precision = Field(default="bf16", description="Precision of `model`: bf16 or fp32.")
    seed: int = Field(default=DEFAULT_SEED, ge=0, lt=2**63, description="Seed of the noise.")
    width: Pixels | None = Field(default=None, description="Default: 1024, or as the previews of `run`.")
    height: Pixels | None = Field(default=None, description="Default: 1024, or as the previews of `run`.")
    steps: int | None = Field(default=None, ge=1, le=1000, description="Default: as the variant needs, or `run` has.")
    guidance: float | None = Field(
        default=None, ge=0, le=50, description="Guidance g; the usual CFG scale is g + 1. Default: as `steps`."
    )
    loras: list[SampleLora] | None = Field(
        default=None, max_length=16, description="Default: with `run`, the LoRAs of its previews; otherwise none."
    )
    base: bool = Field(default=False, description="Also draw without LoRAs, from the same seed.")


class Drawing(BaseModel):
    """A resolved request."""

    model_config = ConfigDict(frozen=True)

    model: dict[str, Any]
    """The settings of the model."""
    loras: list[tuple[str, float]]
    """(file, weight), in the order in which their changes are added."""
    request: dict[str, Any]
    """The sampling request."""

    @property
    def settings(self) -> ModelSettings:
        return ModelSettings.model_validate(self.model)

    @property
    def sampling(self) -> SamplingRequest:
        return SamplingRequest.from_json(json.dumps(self.request))


def resolve(asked: SampleRequest, workspace: Workspace) -> Drawing:
    """Return the model, the LoRAs and the sampling request that a request stands for.

    Raises:
        ZImageTrainError: there is no such run or LoRA, or it is outside the folders of the page.
    """
    config = None if asked.run is None else config_of(workspace, asked.run)
    own = [] if asked.run is None or config is None else run_loras(workspace, asked.run, config)
    loras = [(lora.file, lora.weight) for lora in own]
    if asked.loras is not None:
        # Those of the run's config may be anywhere, since the run has read them.
        loras = _find_loras(workspace, asked.loras, {lora.file for lora in own})
    if config is None or asked.run is None:
        model = _named_model(asked)
    else:
        model = _model_of_run(workspace.run(asked.run), config)
    request = asdict(_sampling_request(asked, model, config))
    return Drawing(model=model.model_dump(mode="json"), loras=loras, request=request)


def _find_loras(workspace: Workspace, asked: list[SampleLora], known: set[str]) -> list[tuple[str, float]]:
    errors: list[ZImageTrainError] = []
    loras: list[tuple[str, float]] = []
    for lora in asked:
        with collect_errors(errors):
            file = lora.file if lora.file in known else str(find_lora(workspace, lora.file))
            loras.append((file, lora.weight))
    raise_all(errors)
    return loras


def config_of(workspace: Workspace, name: str) -> Config:
    """Return the config of a run.

    Raises:
        DataError: there is no such run, or it has not begun.
        ConfigError: its config cannot be read.
    """
    path = workspace.run(name) / "config.yaml"
    if not path.exists():
        raise DataError(Problem(f"run {name}", "has no config.yaml", "choose a run that has begun", "missing-file"))
    return read_config(path)


def run_loras(workspace: Workspace, name: str, config: Config) -> list[SampleLora]:
    """Return the LoRAs of a run's previews: its newest own, if it has saved one, and those beside it."""
    newest = newest_lora(workspace.run(name), is_average=config.sample.weights == "ema")
    loras = [] if newest is None else [SampleLora(file=str(newest))]
    for extra in config.preview_loras:
        path = locate.lora_at(extra.file, Location(key="sample.extra_loras"))
        loras.append(SampleLora(file=str(path), weight=extra.weight))
    return loras


def previews_of_run(workspace: Workspace, name: str) -> list[SamplingRequest]:
    """Return the requests of a run's previews."""
    return preview_requests(config_of(workspace, name))


def _model_of_run(folder: Path, config: Config) -> ModelSettings:
    """Return the model that the previews of a run are drawn on: without its training adapter, quantised as it was."""
    quantize = config.model.quantize
    if quantize == "auto":
        plan = run_dir.read_facts(RunDir(folder, folder.name)).get("plan")
        quantize = plan.get("kind") if isinstance(plan, dict) else None
    return config.model.model_copy(update={"adapter": None, "quantize": quantize})


def _named_model(asked: SampleRequest) -> ModelSettings:
    if not asked.model:
        hint = "give turbo, deturbo, base, a hub id or a path"
        raise ConfigError(Problem("model", "is empty", hint, "bad-argument"))
    values: dict[str, str | None] = {"variant": asked.variant, "path": asked.model}
    if asked.model in VARIANTS:
        values = {"variant": asked.model, "path": None}
    return ModelSettings.model_validate({**values, "adapter": None, "dtype": asked.dtype, "attention": "sdpa"})


def _sampling_request(asked: SampleRequest, model: ModelSettings, config: Config | None) -> SamplingRequest:
    variant, triggers = VARIANTS[model.variant], [] if config is None else config.triggers
    width, height, steps, guidance = DEFAULT_SIZE, DEFAULT_SIZE, variant.steps, variant.guidance
    if config is not None:
        sample = config.sample
        width, height = sample.width, sample.height
        steps = variant.steps if sample.steps == "auto" else sample.steps
        guidance = variant.guidance if sample.guidance == "auto" else sample.guidance
    return SamplingRequest(
        prompt=insert_triggers(asked.prompt, triggers),
        negative=insert_triggers(asked.negative, triggers),
        seed=asked.seed,
        width=asked.width or width,
        height=asked.height or height,
        steps=asked.steps or steps,
        guidance=guidance if asked.guidance is None else asked.guidance,
        shift=variant.shift,
    )


def invalid_request(errors: Sequence[Any]) -> ConfigError:
    """Return the errors of pydantic in a request as problems."""
    problems: list[Problem] = []
    for error in errors:
        where = ".".join(str(part) for part in error["loc"] if part != "body") or "body"
        hint = str(error["msg"]).removeprefix("Value error, ")
        found = f"is {error['input']!r:.80}" if isinstance(error["input"], str | int | float) else "is not valid"
        if error["type"] == "json_invalid":
            where, found, hint = "body", "is no JSON", f"character {where}: {error['ctx']['error']}"
        problems.append(Problem(where, found, hint[:1].lower() + hint[1:], "bad-value"))
    return ConfigError(*problems)
