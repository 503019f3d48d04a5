"""Every setting, its type, its range, its default and what it does: the one place that says so.

A value that this version cannot honour is refused here (`later`), never accepted and ignored.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from zimage_train.model.variants import VARIANTS, VariantName

LORA_GROUPS = ("attention", "feed_forward", "adaln", "refiners")

OPTIMIZER_PARAMS = {
    "adamw": {"betas", "eps"},
    "adamw8bit": {"betas", "eps"},
    "prodigy": {
        "betas",
        "beta3",
        "eps",
        "decouple",
        "use_bias_correction",
        "safeguard_warmup",
        "d0",
        "d_coef",
        "growth_rate",
        "slice_p",
    },
}
SCHEDULE_PARAMS: dict[str, set[str]] = {"constant": set(), "cosine": {"end_factor"}}


def later(neutral: object) -> AfterValidator:
    """Accept only `neutral`: the setting belongs to the design, and this version cannot do it yet."""

    def refuse(value: object) -> object:
        if value != neutral:
            raise ValueError(f"not possible in this version; leave it out (it can only be {_yaml(neutral)})")
        return value

    return AfterValidator(refuse)


def _yaml(value: object) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, repr(value)) if not isinstance(value, list) else "[]"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _as_prompt(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


def _multiple_of_16(value: int) -> int:
    if value % 16:
        raise ValueError(f"must be a multiple of 16; {value // 16 * 16} or {-(-value // 16) * 16} would do")
    return value


def _check_params(params: dict[str, Any], known: set[str], owner: str) -> None:
    unknown = sorted(set(params) - known)
    if unknown:
        choices = f"knows {', '.join(sorted(known))}" if known else "takes none"
        raise ValueError(f"params.{unknown[0]}: {owner} {choices}")


Pixels = Annotated[int, Field(ge=32, le=4096), AfterValidator(_multiple_of_16)]
Every = Annotated[int, Field(ge=1)] | None


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    variant: VariantName = "turbo"
    """Which member of the family is trained."""
    path: str | None = None
    """Transformer: hub id (`org/repo[@revision]`), diffusers folder or .safetensors file; null: the variant's own."""
    extras: str | None = None
    """Where text encoder, tokenizer and VAE come from; null: `path` if it has them, else the variant's own."""
    adapter: str | None = None
    """Training adapter merged while training: v1, v2 (ostris), a file, org/repo/file, or null for none."""
    adapter_strength: float = Field(default=1.0, ge=0.0, le=2.0)
    """How much of the adapter is merged; 1 is what it was made for."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the frozen weights and of the forward pass; LoRA weights and the loss are always fp32."""
    quantize: Annotated[str | None, later(None)] = None
    """Quantisation of the frozen weights."""
    attention: Annotated[str, later("auto")] = "auto"
    """Attention backend."""

    @model_validator(mode="before")
    @classmethod
    def _default_adapter(cls, values: Any) -> Any:
        if isinstance(values, dict) and "adapter" not in values:
            variant = VARIANTS.get(values.get("variant", "turbo"))
            return values | {"adapter": variant.adapter if variant else None}
        return values

    @model_validator(mode="after")
    def _adapter_belongs(self) -> Self:
        if self.variant != "turbo" and self.adapter in ("v1", "v2"):
            raise ValueError(f"adapter {self.adapter} was made for Turbo and would harm {self.variant}; set it to null")
        return self


class Data(Section):
    folder: str | None = None
    """Folder of pictures, searched with its subfolders."""
    metadata: str | None = None
    """A .jsonl or .csv instead: columns image (or file_name) and prompt (or text); paths relative to the file."""
    resolution: Annotated[list[Pixels], BeforeValidator(_as_list), Field(min_length=1)] = [512, 768, 1024]
    """Each picture is trained once at each of these sizes (side of the square of equal area, px); never upscaled."""
    repeats: int = Field(default=1, ge=1, le=1000)
    """How often each picture is seen in an epoch, each time with its own noise."""
    trigger: str | None = Field(default=None, min_length=1)
    """Word that stands for the concept: replaces `[trigger]` in captions, and is put in front where it is missing."""
    default_caption: str = ""
    """Caption of pictures that have none."""
    caption_ext: str = Field(default=".txt", pattern=r"^\.[A-Za-z0-9_.]+$")
    """Extension of the caption files beside the pictures."""
    caption_dropout: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of samples trained with the empty prompt instead of their caption."""
    shuffle_tags: Annotated[bool, later(False)] = False
    keep_tags: Annotated[int, later(0)] = 0
    flip: Annotated[bool, later(False)] = False
    mask: Annotated[str | None, later(None)] = None
    mask_floor: Annotated[float, later(0.1)] = 0.1
    regularisation: Annotated[bool, later(False)] = False
    weight: Annotated[float, later(1.0)] = 1.0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.metadata is None):
            raise ValueError("needs exactly one of folder and metadata")
        return self


class Cache(Section):
    folder: str | None = None
    """Where encoded pictures and captions are kept; null: the user's cache directory."""


class Lora(Section):
    type: Annotated[Literal["lora", "dora", "lokr", "loha", "oft"], later("lora")] = "lora"
    rank: int = Field(default=16, ge=1, le=1024)
    """Capacity of the LoRA; its file grows in proportion."""
    alpha: float | None = Field(default=None, gt=0.0)
    """The change is scaled by alpha / rank; null: alpha = rank, scale 1."""
    targets: list[str] | str = ["attention", "feed_forward"]
    """Which modules: groups of attention, feed_forward, adaln, refiners; or one regular expression of module names."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the LoRA's inputs set to zero in training."""
    init_from: Annotated[str | None, later(None)] = None

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            return value
        unknown = [name for name in value if name not in LORA_GROUPS]
        if unknown or not value:
            raise ValueError(
                f"unknown group {unknown[0]!r}; groups are {', '.join(LORA_GROUPS)}; a regular expression is one string"
                if unknown
                else "names no group, so nothing would be trained"
            )
        return value


class Train(Section):
    method: Annotated[Literal["sft", "trajectory_imitation", "de_distill"], later("sft")] = "sft"
    steps: int = Field(default=3000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Samples in one forward pass."""
    accumulate: int = Field(default=1, ge=1, le=4096)
    """Forward passes in one optimizer step."""
    loss: Literal["mse"] = "mse"
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null: no clipping."""


class Timesteps(Section):
    type: Literal["weighted", "linear", "sigmoid", "shift"] = "weighted"
    """Density of sigma. weighted: uniform, with AI Toolkit's loss weights; linear: uniform; sigmoid: logit-normal;
    shift: uniform, then shifted as the sampler does."""
    bias: Literal["balanced", "high_noise", "low_noise"] = "balanced"
    """high_noise favours composition and style, low_noise favours detail."""
    min: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Smallest sigma that is trained (0 = the picture)."""
    max: float = Field(default=1.0, gt=0.0, le=1.0)
    """Largest sigma that is trained (1 = pure noise)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"min {self.min} must be below max {self.max}")
        return self


class Guidance(Section):
    differential: float | None = Field(default=None, gt=0.0, le=100.0)
    """Scale s: the target is moved to pred + s (target - pred), which multiplies the gradient by s."""
    contrastive: Annotated[float | None, later(None)] = None


class Preserve(Section):
    kind: Annotated[Literal["trigger", "blank"] | None, later(None)] = None
    class_word: Annotated[str, later("person")] = "person"
    weight: Annotated[float, later(1.0)] = 1.0


class Optimizer(Section):
    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw8bit"
    lr: float = Field(default=1.0e-4, gt=0.0, le=10.0)
    """Learning rate; for prodigy a factor on the rate it finds itself (1; less than 0.1 is raised to 1 and said so)."""
    weight_decay: float = Field(default=1.0e-4, ge=0.0, le=1.0)
    params: dict[str, Any] = {}
    """More parameters of the optimizer, by its own names."""

    @model_validator(mode="after")
    def _known_params(self) -> Self:
        _check_params(self.params, OPTIMIZER_PARAMS[self.name], self.name)
        betas = self.params.get("betas")
        if betas is not None and not (
            isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, float) and 0 <= b < 1 for b in betas)
        ):
            raise ValueError("params.betas must be a list of two numbers in [0, 1)")
        return self


class Schedule(Section):
    name: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: the same, or falling along half a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    params: dict[str, Any] = {}
    """cosine: end_factor, the share of the learning rate left at the last step (0)."""

    @model_validator(mode="after")
    def _known_params(self) -> Self:
        _check_params(self.params, SCHEDULE_PARAMS[self.name], self.name)
        end = self.params.get("end_factor", 0.0)
        if isinstance(end, bool) or not isinstance(end, int | float) or not 0 <= end <= 1:
            raise ValueError("params.end_factor must be between 0 and 1")
        return self


class Ema(Section):
    decay: Annotated[float | None, later(None)] = None


class Memory(Section):
    budget_gb: float | Literal["auto"] = "auto"
    """Memory the run may take; auto: what the device has."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass; auto: when they would not fit the budget."""
    offload: Annotated[str, later("auto")] = "auto"
    compile: Annotated[bool | Literal["auto"], later("auto")] = "auto"

    @field_validator("budget_gb")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float | int) and value <= 0:
            raise ValueError("must be above 0")
        return value


class Prompt(Section):
    prompt: str
    negative: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    width: Pixels | None = None
    height: Pixels | None = None


class Sample(Section):
    every: Every = 250
    """Steps between previews; null: none."""
    first: bool = True
    """Also before step 1."""
    prompts: list[Annotated[Prompt, BeforeValidator(_as_prompt)]] = []
    """A prompt is a string or {prompt, negative, seed, width, height}."""
    negative: str = ""
    """Negative prompt, used where guidance is above 0."""
    width: Pixels = 1024
    height: Pixels = 1024
    steps: int | Literal["auto"] = "auto"
    """Sampling steps; auto: 8 for turbo, 25 for deturbo, 30 for base."""
    guidance: float | Literal["auto"] = "auto"
    """Guidance g (CFG scale - 1); auto: 0 for turbo, 2 for deturbo, 3 for base."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Prompt i is drawn with seed + i."""
    extra_loras: Annotated[list[str], later([])] = []
    also: Annotated[str | None, later(None)] = None

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not isinstance(self.steps, str) and not 1 <= self.steps <= 1000:
            raise ValueError("steps must be between 1 and 1000")
        if not isinstance(self.guidance, str) and not 0 <= self.guidance <= 50:
            raise ValueError("guidance must be between 0 and 50")
        return self


class Validation(Section):
    folder: Annotated[str | None, later(None)] = None
    every: Annotated[int, later(250)] = 250


class Save(Section):
    every: Every = 250
    """Steps between saves; null: at the end only."""
    keep: int = Field(default=8, ge=1)
    """Exported LoRA files kept, the last ones; the two newest checkpoints are always kept."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the exported LoRA."""


class Log(Section):
    tensorboard: bool = True
    wandb: Annotated[str | None, later(None)] = None


class Config(Section):
    name: str = Field(pattern=r"^[\w][\w .+-]*$", max_length=100)
    """Name of the run: its folder is output/name, its LoRA name.safetensors."""
    output: str = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Everything random follows from it."""
    model: Model = Model()
    data: list[Data] = Field(min_length=1)
    cache: Cache = Cache()
    lora: Lora = Lora()
    train: Train = Train()
    timesteps: Timesteps = Timesteps()
    guidance: Guidance = Guidance()
    preserve: Preserve = Preserve()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    memory: Memory = Memory()
    sample: Sample = Sample()
    validation: Validation = Validation()
    save: Save = Save()
    log: Log = Log()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if re.search(r"-\d+$", value):
            raise ValueError("may not end in -digits, which marks the LoRA of a step")
        if value != value.strip() or value.endswith("."):
            raise ValueError("may not begin or end with a space, nor end with a dot")
        return value
