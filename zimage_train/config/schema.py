"""Every setting, its type, its range, its default and what it does: the one place that says so.

A value that cannot be honoured is refused here, never accepted and ignored.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zimage_train.config import methods
from zimage_train.config.dataset import DataEntry
from zimage_train.config.methods import MethodName, TeacherSettings
from zimage_train.config.module_groups import TARGET_GROUPS
from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName
from zimage_train.config.sample import SampleSettings
from zimage_train.config.types import (
    SCHEDULE_PARAMS,
    ConflictError,
    EverySteps,
    Pixels,
    Quantization,
    RecomputeMode,
    ScheduleName,
    Section,
    SettingError,
    check_params,
)
from zimage_train.config.variants import VARIANTS, VariantName
from zimage_train.io.dtypes import Precision
from zimage_train.io.operating_system import is_device_name

NAME = r"^\w[\w .+-]*$"
NAME_BYTES = 200
"""With a step, an extension and a temporary suffix around it, a name must be one that file systems take."""


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class ModelSettings(Section):
    variant: VariantName = "turbo"
    """Which member of the family is trained."""
    path: str | None = Field(default=None, min_length=1)
    """Transformer: hub id (`org/repo[@revision]`), diffusers folder or .safetensors file; null: the variant's own."""
    extras: str | None = Field(default=None, min_length=1)
    """Where text encoder, tokenizer and VAE come from; null: `path` if it has them, else the variant's own."""
    adapter: str | None = Field(default=None, min_length=1, json_schema_extra=_without_default)
    """Training adapter merged while training: v1, v2 (ostris), a file, org/repo/file, or null for none; left out, it is
    v2 for turbo and null for the others."""
    adapter_strength: float = Field(default=1.0, ge=0.0, le=2.0)
    """How much of the adapter is merged; 1 is what it was made for."""
    dtype: Precision = "bf16"
    """Precision of the frozen weights and of the forward pass; LoRA weights and the loss are always fp32."""
    quantize: Quantization | Literal["auto"] | None = None
    """Frozen weights of attention and feed forward in 8 bits (int8, fp8) or 4 (nf4), after the merge; auto: only if
    `dtype` does not fit; null: never."""

    @model_validator(mode="before")
    @classmethod
    def _default_adapter(cls, values: Any) -> Any:
        if isinstance(values, dict) and "adapter" not in values:
            name = values.get("variant", "turbo")
            return values | {"adapter": VARIANTS[name].adapter if isinstance(name, str) and name in VARIANTS else None}
        return values

    @model_validator(mode="after")
    def _adapter_belongs(self) -> Self:
        if self.variant != "turbo" and self.adapter in ("v1", "v2"):
            raise ConflictError(
                f"adapter {self.adapter} was made for Turbo and would harm {self.variant}", "leave it out"
            )
        return self


class CacheSettings(Section):
    folder: str | None = Field(default=None, min_length=1)
    """Where encoded images and captions are kept; null: the user's cache directory."""


class LoraSettings(Section):
    rank: int = Field(default=16, ge=1, le=1024)
    """Capacity of the LoRA; its file grows in proportion."""
    alpha: float | None = Field(default=None, gt=0.0)
    """The change is scaled by alpha / rank; null: alpha = rank, scale 1."""
    targets: list[str] | str = ["attention", "feed_forward"]
    """Which modules: groups of attention, feed_forward, adaln, refiners; or one regular expression of module names."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the LoRA's inputs set to zero in training."""
    init_from: str | None = Field(default=None, min_length=1)
    """A LoRA to begin with instead of a fresh one, of this rank and on these modules: a file, or org/repo/file."""

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise SettingError(f"not a regular expression: {error}") from None
            return value
        unknown = [name for name in value if name not in TARGET_GROUPS]
        if unknown or not value:
            if not unknown:
                raise SettingError("names no group, so nothing would be trained")
            choices = f"groups are {', '.join(TARGET_GROUPS)}; a regular expression is one string"
            raise SettingError(f"unknown group {unknown[0]!r}", choices)
        return value


class TrainSettings(Section):
    method: MethodName = "sft"
    """sft: learn from the images. trajectory_imitation: give the LoRA of `lora.init_from` its 8 steps back, by the
    way that it takes itself in many (`teacher`). de_distill: learn from images that the model draws for the captions,
    as training adapters are made. The last two use only captions and sizes of the images in `data`."""
    steps: int = Field(default=3000, ge=1, le=10_000_000)
    """Optimizer steps."""
    epochs: float | None = Field(default=None, gt=0.0, le=1_000_000.0)
    """How often each sample is seen; the number of steps follows, rounded up, and `steps` is not used."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Samples in one forward pass."""
    grad_accumulation: int = Field(default=1, ge=1, le=4096)
    """Forward passes in one optimizer step."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null: no clipping."""
    regularization_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the forward passes that regularization images get, where `data` has some, however many there are."""


class TimestepSettings(Section):
    type: Literal["weighted", "linear", "sigmoid", "uniform_shift"] = "weighted"
    """Density of sigma. weighted: uniform, with AI Toolkit's loss weights; linear: uniform; sigmoid: logit-normal;
    uniform_shift: uniform, then shifted as the sampler does."""
    bias: Literal["balanced", "high_noise", "low_noise"] = "balanced"
    """high_noise favours composition and style, low_noise favours detail."""
    min: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Smallest sigma that is trained (0 = the image)."""
    max: float = Field(default=1.0, gt=0.0, le=1.0)
    """Largest sigma that is trained (1 = pure noise)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min >= self.max:
            raise ConflictError(f"min {self.min} must be below max {self.max}")
        return self


class GuidanceSettings(Section):
    differential: float | None = Field(default=None, gt=0.0, le=100.0)
    """Scale s: the target is moved to pred + s (target - pred), which multiplies the gradient by s."""
    contrastive: float | None = Field(default=None, gt=0.0, le=100.0)
    """Scale g: the target is moved to u + g (target - u), away from what the model makes of the empty prompt."""


class PreserveSettings(Section):
    kind: Literal["trigger", "blank"] | None = None
    """Hold the model to what it draws without the LoRA: for each caption with the trigger replaced by `class_word`
    (trigger; AI Toolkit's DOP), or for the empty prompt (blank). Costs one more pass
    forward, and one more forward and backward."""
    class_word: str = Field(default="person", min_length=1)
    """The word that the trigger stands in for."""
    weight: float = Field(default=1.0, gt=0.0, le=100.0)
    """Factor on the loss of preservation."""


class OptimizerSettings(Section):
    name: OptimizerName = "adamw8bit"
    """adamw8bit: AdamW with 8-bit state; adamw: fp32 state; prodigy: finds its learning rate itself; automagic: one
    learning rate a tensor, raised while updates agree. docs/optimizers.md says which library each one comes from."""
    lr: float = Field(default=1.0e-4, gt=0.0, le=10.0)
    """Learning rate; for prodigy a factor on the rate it finds itself (1; less than 0.1 is raised to 1 and said so)."""
    weight_decay: float = Field(default=1.0e-4, ge=0.0, le=1.0)
    """Pull of the weights towards zero."""
    params: dict[str, Any] = {}
    """More parameters of the optimizer, by its own names."""

    @field_validator("params")
    @classmethod
    def _known_params(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        checked = check_params(value, OPTIMIZERS[name].params, name) if name else value
        if checked.get("min_lr", 0.0) > checked.get("max_lr", 1.0):
            raise SettingError("min_lr is above max_lr")
        return checked


class ScheduleSettings(Section):
    name: ScheduleName = "constant"
    """Learning rate over the run, after the warm-up. linear, polynomial, cosine and rex fall; step falls by jumps."""
    warmup_steps: int = Field(default=0, ge=0, le=10_000_000)
    """Steps over which the learning rate rises from zero."""
    params: dict[str, Any] = {}
    """cosine, linear, polynomial, rex: end_factor, the share of the learning rate left after the last step (0).
    polynomial: power (1). cosine_with_restarts: cycles (1), end_factor. step: every (steps), factor (0.1). one_cycle:
    peak_at (share of the run, 0.3), start_factor (0.04), end_factor (0)."""

    @field_validator("params")
    @classmethod
    def _known_params(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        return check_params(value, SCHEDULE_PARAMS[name], name) if name else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.name == "constant_with_warmup" and self.warmup_steps == 0:
            raise ConflictError("constant_with_warmup needs warmup_steps")
        if self.name == "one_cycle" and self.warmup_steps:
            raise ConflictError("one_cycle rises by itself", "leave warmup_steps out, and set params.peak_at")
        if self.name == "step" and "every" not in self.params:
            raise ConflictError("step needs params: {every: steps}")
        return self


class EmaSettings(Section):
    decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Weights averaged over the steps, s <- d s + (1 - d) w, are exported beside the raw ones; d rises to `decay` by
    (1 + step) / (10 + step). null: none. 0.99 averages over about 100 steps."""


class MemorySettings(Section):
    budget_gb: float | Literal["auto"] = "auto"
    """Memory the run may take; auto: what the device has."""
    checkpointing: bool | Literal["auto"] | RecomputeMode = "auto"
    """What the backward pass computes again: none (or false), elementwise, w1w3, attention, full (or true); auto: the
    least by which a batch fits the budget."""
    offload: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = "auto"
    """Share of the blocks that wait in main memory and are streamed; auto: as many as must."""

    @property
    def mode(self) -> RecomputeMode | None:
        """What is recomputed; None: the planner decides."""
        if isinstance(self.checkpointing, bool):
            return "full" if self.checkpointing else "none"
        return None if self.checkpointing == "auto" else self.checkpointing

    @model_validator(mode="after")
    def _streams_with_recomputation(self) -> Self:
        if self.mode == "none" and isinstance(self.offload, float) and self.offload > 0:
            raise ConflictError("offload needs recomputation: set checkpointing to elementwise, full or auto")
        return self

    @field_validator("budget_gb")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 < value <= 10_000:
            raise SettingError(f"is {value:g}", "give a number of GB above 0 and up to 10000, or auto")
        return value


class ValidationSettings(Section):
    folder: str | None = Field(default=None, min_length=1)
    """Images that are held out, with their captions; read as the first folder of the concept is."""
    every: EverySteps = 250
    """Steps between validations; also before step 1 and after the last; null: none."""
    resolution: Pixels = 512
    """Size at which they are judged, px."""


class SaveSettings(Section):
    every: EverySteps = 250
    """Steps between saves; null: at the end only."""
    keep: int = Field(default=8, ge=1, le=100_000)
    """Exported LoRA files kept, the last ones; the two newest checkpoints are always kept."""
    dtype: Precision = "bf16"
    """Precision of the exported LoRA."""


class LogSettings(Section):
    tensorboard: bool = True
    """Write loss and learning rate for TensorBoard."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project on Weights & Biases; needs `pip install wandb`, and WANDB_MODE=offline logs to disk only."""


class Config(Section):
    name: str = Field(min_length=1, json_schema_extra={"pattern": NAME})
    """Name of the run: its folder is output/name, its LoRA name.safetensors."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Everything random follows from it."""
    model: ModelSettings = ModelSettings()
    """Which model is trained, and with which training adapter."""
    data: list[DataEntry] = Field(min_length=1)
    """Images and captions: one entry a folder, or a metadata file."""
    cache: CacheSettings = CacheSettings()
    """Encoded images and captions."""
    lora: LoraSettings = LoraSettings()
    """What is trained."""
    train: TrainSettings = TrainSettings()
    """How long and in which portions."""
    teacher: TeacherSettings = TeacherSettings()
    """What trajectory_imitation imitates."""
    timesteps: TimestepSettings = TimestepSettings()
    """Which noise levels are trained, and how much each of them counts."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Changes to the target of the loss."""
    preserve: PreserveSettings = PreserveSettings()
    """Keeping what the model knows."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How weights follow gradients."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over the run."""
    ema: EmaSettings = EmaSettings()
    """Averaged weights."""
    memory: MemorySettings = MemorySettings()
    """What may be spent to fit the device."""
    sample: SampleSettings = SampleSettings()
    """Previews."""
    validation: ValidationSettings = ValidationSettings()
    """Loss on images that are held out."""
    save: SaveSettings = SaveSettings()
    """Checkpoints and exported LoRAs."""
    log: LogSettings = LogSettings()
    """Where numbers go besides metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, values: Any) -> Any:
        return methods.fill_method_defaults(values)

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        model = self.model
        if why := methods.method_error(self.train.method, model.variant, model.adapter, self.lora.init_from, self.data):
            raise why
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        without = [i for i, entry in enumerate(self.data) if not entry.trigger and not entry.regularization]
        if self.preserve.kind == "trigger" and without:
            where = f"data.{without[0]}.trigger"
            raise ConflictError("preserve.kind: trigger replaces the trigger", f"set {where}, or use blank")
        if all(entry.regularization for entry in self.data):
            raise ConflictError("data: every folder is for regularization", "one must show the concept")
        literal = [i for i, one in enumerate(self.sample.prompts) if "[trigger]" in one.prompt]
        if literal:
            raise ConflictError(
                f"sample.prompts.{literal[0]} has [trigger], which is for captions", "write the word itself"
            )
        if self.sample.weights == "ema" and self.ema.decay is None:
            raise ConflictError("sample.weights: ema needs ema.decay")
        return self

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(NAME, value) or value != value.strip() or value.endswith("."):
            raise SettingError(
                f"is {value!r}",
                "begin with a letter, digit or _, go on with these, spaces, dots, + and -, and end with neither space "
                "nor dot",
            )
        if re.search(r"-\d+$", value):
            raise SettingError(f"is {value!r}", "it may not end in -digits, which marks the LoRA of a step")
        if is_device_name(value):
            raise SettingError(f"is {value!r}", "Windows keeps this name for a device, so no folder there can have it")
        if len(value.encode()) > NAME_BYTES:
            raise SettingError(f"has {len(value.encode())} bytes", f"{NAME_BYTES} are the most")
        return value

    @property
    def method(self) -> methods.TrainingMethod:
        """Return what is known of `train.method`."""
        return methods.METHODS[self.train.method]

    @property
    def triggers(self) -> list[str]:
        """Every word that stands for a concept, once, in the order of `data`."""
        return list(dict.fromkeys(entry.trigger for entry in self.data if entry.trigger))
