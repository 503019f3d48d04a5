"""All settings, with type, range, default and description; the references of the docs are generated from them.

Values that cannot be honoured are refused, never ignored.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from zimage_train.config import methods
from zimage_train.config.dataset import DataEntry
from zimage_train.config.lora import LoraSettings, adapter_error
from zimage_train.config.loss import GuidanceSettings, LossSettings, loss_error
from zimage_train.config.methods import MethodName, TeacherSettings
from zimage_train.config.optimizers import OptimizerSettings, ScheduleSettings, optimizer_error
from zimage_train.config.outputs import LogSettings, SaveSettings
from zimage_train.config.sample import BesideLoras, ExtraLora, SampleSettings, trigger_error
from zimage_train.config.slider import SliderSettings, slider_error
from zimage_train.config.timesteps import TimestepSettings
from zimage_train.config.types import (
    RECOMPUTE_MODES,
    AttentionName,
    ConflictError,
    EverySteps,
    NonEmptyPath,
    PathText,
    Pixels,
    Quantization,
    RecomputeMode,
    Section,
    SettingError,
    without_default,
    without_folder,
)
from zimage_train.config.variants import ADAPTERS, VARIANTS, VariantName
from zimage_train.io.dtypes import Precision
from zimage_train.io.operating_system import is_device_name

NAME = r"^\w[\w .+-]*$"
MADE_FOR_TURBO = {*ADAPTERS, *(path.rpartition("/")[2] for path in ADAPTERS.values())}
"""Names of the published training adapters, and of their files."""
MAX_NAME_BYTES = 200
"""File systems allow 255 bytes, and files of a run add a step, an extension and a temporary suffix to its name."""


class ModelSettings(Section):
    variant: VariantName = "turbo"
    """Member of the Z-Image family that is trained."""
    path: NonEmptyPath | None = None
    """Transformer: hub id (`org/repo[@revision]`), diffusers folder or .safetensors file; null: the variant's own."""
    extras: NonEmptyPath | None = None
    """Source of text encoder, tokenizer and VAE; null: `path` if it has them, else the variant's own."""
    text_encoder: NonEmptyPath | None = None
    """Text encoder in place of that of `extras`: hub id, folder or .safetensors, such as qwen_3_4b.safetensors."""
    tokenizer: NonEmptyPath | None = None
    """Tokenizer in place of that of `extras`: hub id or folder."""
    vae: NonEmptyPath | None = None
    """VAE in place of that of `extras`: hub id, folder or .safetensors, such as ae.safetensors."""
    adapter: NonEmptyPath | None = Field(default=None, json_schema_extra=without_default)
    """Training adapter, merged into the frozen weights during training: v1, v2 (both by ostris), a file, org/repo/file,
    or null for none. If left out: v2 for turbo, null for the others."""
    adapter_strength: float = Field(default=1.0, ge=0.0, le=2.0)
    """Factor on the adapter's change to the weights; 1 is the strength that it was made for."""
    dtype: Precision = "bf16"
    """Precision of the frozen weights and of the forward pass; LoRA weights and the loss are always fp32."""
    quantize: Quantization | Literal["auto"] | None = None
    """Quantisation of the frozen weights of attention and feed forward, after the merge, to 8 bits (int8, fp8) or 4
    (nf4); fp8_fast: fp8, and their products in fp8 too, which is faster and less exact and needs a GPU from Ada or
    Hopper on; auto: int8 or nf4, only if `dtype` does not fit into memory; null: none."""
    attention: AttentionName = "auto"
    """What computes attention on a GPU. sdpa: PyTorch, by its own choice; cudnn: cuDNN; flash3, flash4: FlashAttention
    3 or 4, which must be installed; auto: flash4 or flash3 where it is installed and works, else sdpa."""

    @model_validator(mode="before")
    @classmethod
    def _default_adapter(cls, values: Any) -> Any:
        if isinstance(values, dict) and "adapter" not in values:
            name = values.get("variant", "turbo")
            return values | {"adapter": VARIANTS[name].adapter if isinstance(name, str) and name in VARIANTS else None}
        return values

    @model_validator(mode="after")
    def _adapter_belongs(self) -> Self:
        file_name = re.split(r"[\\/]", self.adapter or "")[-1]
        if self.variant != "turbo" and file_name in MADE_FOR_TURBO:
            raise ConflictError(
                f"adapter {self.adapter} was made for Turbo and would harm {self.variant}", "leave it out", ("adapter",)
            )
        return self

    @property
    def label(self) -> str:
        """The variant, hub id or file name of the transformer: what others may read, who have no use for a path."""
        return self.variant if self.path is None else without_folder(self.path)


class CacheSettings(Section):
    folder: NonEmptyPath | None = None
    """Folder of encoded images and captions; null: the user's cache folder."""


class TrainSettings(Section):
    method: MethodName = "sft"
    """sft: train on the images. trajectory_imitation: restore the 8 steps of Turbo for the LoRA of `lora.init_from`, by
    imitation of its own trajectories of many steps (`teacher`). de_distill: train on images that the model draws for
    the captions, as training adapters are made. slider: learn from two prompts (`slider`) a LoRA that moves images
    towards one of them at the weight +1 and towards the other at -1. pairs: learn such a LoRA from
    pairs of images (`data.N.negative`). All but sft and pairs use only captions and sizes of the images in `data`."""
    steps: int = Field(default=3000, ge=1, le=10_000_000)
    """Number of optimizer steps."""
    epochs: float | None = Field(default=None, gt=0.0, le=1_000_000.0)
    """Passes over all samples. If set, the number of steps is computed from it, rounded up, and `steps` is not used."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Samples per forward pass."""
    grad_accumulation: int = Field(default=1, ge=1, le=4096)
    """Forward passes per optimizer step, whose gradients are averaged."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Norm to which larger gradients are clipped; null: no clipping."""
    regularization_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Fraction of the forward passes on regularization images, if `data` has some, independent of their number."""
    beside: BesideLoras = []
    """LoRAs that the new one is to be used with: FILE, FILE=WEIGHT or {file, weight}, or a list of them. They are added
    to the frozen weights for the training, and to the previews; the exported file does not contain them."""
    reproducible: bool = True
    """Whether a GPU adds up in a fixed order, so that a run that is stopped and continued ends with the same bytes. It
    costs time in attention's backward pass, which `check` shows."""


class PreserveSettings(Section):
    kind: Literal["trigger", "blank"] | None = None
    """Second loss that preserves the predictions of the model without the LoRA: for each caption with the trigger
    replaced by `class_word` (trigger; DOP in AI Toolkit), or for the empty prompt (blank); null: off. Costs another
    forward pass, and another forward and backward pass."""
    class_word: str = Field(default="person", min_length=1)
    """Class of the concept, by which the trigger is replaced."""
    weight: float = Field(default=1.0, gt=0.0, le=100.0)
    """Weight of the preservation loss."""


class EmaSettings(Section):
    decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay d of an average s <- d s + (1 - d) w of the weights w, which is exported in addition to them; d rises to
    `decay` as (1 + step) / (10 + step). 0.99 averages over about 100 steps; null: no average."""


class MemorySettings(Section):
    budget_gb: float | Literal["auto"] = "auto"
    """Memory of the device that the run may use, GB; auto: what the device has."""
    checkpointing: bool | Literal["auto"] | RecomputeMode = "auto"
    """Activation checkpointing, which is what the backward pass recomputes: none (or false), elementwise, w1w3,
    attention, full (or true); auto: as little as a batch needs to fit the budget."""
    offload: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = "auto"
    """Fraction of the transformer blocks that is kept in CPU memory and streamed to the GPU; auto: only as much as
    necessary."""

    @property
    def mode(self) -> RecomputeMode | None:
        """The mode of recomputation that `checkpointing` stands for, or None if the planner chooses it."""
        if isinstance(self.checkpointing, bool):
            return "full" if self.checkpointing else "none"
        return None if self.checkpointing == "auto" else self.checkpointing

    @model_validator(mode="after")
    def _streams_with_recomputation(self) -> Self:
        if self.mode == "none" and isinstance(self.offload, float) and self.offload > 0:
            hint = f"set checkpointing to {', '.join(RECOMPUTE_MODES[1:])} or auto"
            raise ConflictError("offload needs recomputation", hint)
        return self

    @field_validator("budget_gb")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 < value <= 10_000:
            raise SettingError(f"is {value:g}", "give a number of GB above 0 and up to 10000, or auto")
        return value


class ValidationSettings(Section):
    folder: NonEmptyPath | None = None
    """Folder of held-out images with captions, read with the settings of the first entry of `data` that shows the
    concept; null: no validation."""
    every: EverySteps = 250
    """Steps between validations, which also run before step 1 and after the last step; null: none."""
    resolution: Pixels = 512
    """Resolution of the held-out images, px."""


class Config(Section):
    name: str = Field(min_length=1, json_schema_extra={"pattern": NAME})
    """Name of the run: its folder is output_dir/name, its LoRA name.safetensors."""
    output_dir: PathText = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of every random number of the run."""
    model: ModelSettings = ModelSettings()
    """The frozen model and its training adapter."""
    data: list[DataEntry] = Field(min_length=1)
    """Images and captions, with an entry for each folder or metadata file."""
    cache: CacheSettings = CacheSettings()
    """Cache of encoded images and captions."""
    lora: LoraSettings = LoraSettings()
    """The LoRA that is trained."""
    train: TrainSettings = TrainSettings()
    """Training method, length and batch size."""
    teacher: TeacherSettings = TeacherSettings()
    """The trajectories that trajectory_imitation imitates."""
    slider: SliderSettings = SliderSettings()
    """The prompts of train.method: slider."""
    timesteps: TimestepSettings = TimestepSettings()
    """Noise of the training: its levels, their loss weights, and an offset."""
    loss: LossSettings = LossSettings()
    """What is made of the error of the prediction."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Changes to the target of the loss."""
    preserve: PreserveSettings = PreserveSettings()
    """Preservation of what the model draws without the LoRA."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer and its hyperparameters."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over the run."""
    ema: EmaSettings = EmaSettings()
    """Exponential moving average of the weights."""
    memory: MemorySettings = MemorySettings()
    """Memory budget, activation checkpointing and offloading."""
    sample: SampleSettings = SampleSettings()
    """Previews: images that are drawn during the run."""
    validation: ValidationSettings = ValidationSettings()
    """Loss on held-out images."""
    save: SaveSettings = SaveSettings()
    """Checkpoints and exported LoRAs."""
    log: LogSettings = LogSettings()
    """Loggers in addition to metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, values: Any) -> Any:
        return methods.fill_method_defaults(values)

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        model = self.model
        error = methods.method_error(self.train.method, model.variant, model.adapter, self.lora.init_from, self.data)
        error = error or loss_error(self.loss, self.guidance, self.timesteps, self.method.imitates_teacher)
        error = error or slider_error(self.slider, self.method.has_prompts) or self._two_sided_error()
        error = error or adapter_error(
            self.lora, model.adapter is not None, bool(self.train.beside), self.method.is_two_sided
        )
        if error is not None:
            raise error
        unused = sorted(self.timesteps.changed) if self.method.imitates_teacher else []
        if unused:
            message = f"has no effect with train.method: {self.train.method}, which trains at Turbo's eight sigmas"
            raise ConflictError(message, "leave it out", ("timesteps", unused[0]))
        return self

    def _two_sided_error(self) -> ConflictError | None:
        """Return the first setting that a method of two weights cannot honour, or None if there is none."""
        if not self.method.is_two_sided:
            return None
        hints = ["slider.guidance is the strength of a slider", "set slider.anchor to a prompt whose images shall stay"]
        if not self.method.has_prompts:
            hints = ["leave it out", "leave it out"]
        refused = (
            (("guidance",), self.guidance != GuidanceSettings(), hints[0]),
            (("preserve", "kind"), self.preserve.kind is not None, hints[1]),
            (("validation", "folder"), self.validation.folder is not None, "leave it out"),
        )
        for key, is_set, hint in refused:
            if is_set:
                return ConflictError(f"has no effect with train.method: {self.train.method}", hint, key)
        for index, entry in enumerate(self.data):
            if entry.regularization:
                hint = hints[1]
                message = f"train.method: {self.train.method} has no regularization"
                return ConflictError(message, hint, ("data", index, "regularization"))
        return None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.preserve.kind == "trigger":
            for index, entry in enumerate(self.data):
                if not entry.trigger and not entry.regularization:
                    hint = f"set data.{index}.trigger, or use blank"
                    message = "preserve.kind: trigger needs the trigger of every concept"
                    raise ConflictError(message, hint, ("preserve", "kind"))
        if all(entry.regularization for entry in self.data):
            raise ConflictError("data: every entry is for regularization", "one must show the concept", ("data",))
        if self.lora.type == "lokr" and self.optimizer.lora_plus != 1.0:
            message = "is for the B of a LoRA, and a LoKr has none"
            raise ConflictError(message, "leave it out", ("optimizer", "lora_plus"))
        error = trigger_error(self.sample, self.triggers)
        error = error or optimizer_error(self.optimizer.name, self.schedule.name, self.ema.decay)
        if error is not None:
            raise error
        if self.sample.weights == "ema" and self.ema.decay is None:
            hint = "set ema.decay, or use raw"
            raise ConflictError("sample.weights: ema needs ema.decay", hint, ("sample", "weights"))
        if self.train.beside and self.train.method != "sft":
            message = f"train.method: {self.train.method} learns from the model alone"
            raise ConflictError(message, "leave train.beside out, or train with sft", ("train", "beside"))
        if self.model.attention == "cudnn" and self.train.reproducible:
            hint = "set train.reproducible: false, or take auto"
            raise ConflictError("model.attention: cudnn has no fixed order of sums", hint, ("model", "attention"))
        return self

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(NAME, value) or value != value.strip() or value.endswith("."):
            hint = (
                "begin with a letter, digit or _, go on with these, spaces, dots, + and -, and end with neither space "
                "nor dot"
            )
            raise SettingError(f"is {value!r}", hint)
        if re.search(r"-\d+$", value):
            raise SettingError(f"is {value!r}", "it may not end in -digits, which marks the LoRA of a step")
        if is_device_name(value):
            raise SettingError(f"is {value!r}", "Windows reserves this name for a device; choose another")
        if len(value.encode()) > MAX_NAME_BYTES:
            raise SettingError(f"has {len(value.encode())} bytes", f"{MAX_NAME_BYTES} are the most")
        return value

    @property
    def method(self) -> methods.TrainingMethod:
        """The properties of `train.method`."""
        return methods.METHODS[self.train.method]

    def slider_prompts(self, prompt: str) -> list[str]:
        """Return the prompts of the slider for an image of `prompt`; none if no slider is trained."""
        return self.slider.prompts_for(prompt) if self.method.has_prompts else []

    @property
    def preview_loras(self) -> list[ExtraLora]:
        """The LoRAs that previews have besides the run's own: those of the training, then those of `sample`."""
        return [*self.train.beside, *self.sample.extra_loras]

    @property
    def preview_weights(self) -> list[float]:
        """The weights of the LoRA at which previews are drawn, from the least on."""
        default = [-1.0, 0.0, 1.0] if self.method.is_two_sided else [1.0]
        return sorted(self.sample.lora_weights or default)

    @property
    def triggers(self) -> list[str]:
        """The triggers of all concepts, each once, in the order of `data`."""
        return list(dict.fromkeys(entry.trigger for entry in self.data if entry.trigger))
