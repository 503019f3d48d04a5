"""The optimizers and schedules: their settings, parameters, memory and dependencies (torch-free).

Factories are in optim/optimizers.py, the schedules in optim/schedules.py.

To add an optimizer: its name and `OptimizerSpec` here, its factory there.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zimage_train.config.module_groups import require_patterns
from zimage_train.config.types import (
    SCHEDULE_PARAMS,
    ConflictError,
    Count,
    LrFactor,
    PositiveFloat,
    ScheduleName,
    Section,
    SettingError,
    Share,
    UpToOne,
    check_params,
)

OptimizerName = Literal[
    "adam", "adamw", "adam8bit", "adamw8bit", "paged_adamw8bit", "ademamix", "ademamix8bit", "lion", "lion8bit",
    "prodigy", "prodigy8bit", "adafactor", "adagrad", "automagic", "adamw_schedulefree", "stable_adamw", "adopt",
    "came", "muon",
]  # fmt: skip


@dataclass(frozen=True)
class OptimizerSpec:
    """The properties of an optimizer that are needed without its library."""

    state_bytes: float
    """Optimizer state per trained parameter, bytes."""
    params: dict[str, Any] = field(default_factory=dict)
    """Keys that `optimizer.params` may have, with their types."""
    needs: str | None = None
    """Package that it needs and that is not installed on every platform."""
    state_block: int | None = 1
    """Number of neighbouring elements that share a number of the state; None: the update of an element depends on its
    whole tensor. An optimizer with a number treats all factors of a LoRA as a single tensor."""
    finds_lr: bool = False
    """Whether it estimates the learning rate, so that `optimizer.lr` is a factor on its estimate."""
    update_bytes: float = 0.0
    """Temporaries of an update that handles all tensors together, per trained parameter, bytes."""
    averages_weights: bool = False
    """Whether it trains at one point and averages another, which is the result (`optimizers.averaged_weights`)."""


_TWO_BETAS: dict[str, Any] = {"betas": Annotated[list[Share], Field(min_length=2, max_length=2)]}
_ADAM = _TWO_BETAS | {"eps": PositiveFloat}
_ADEMAMIX = {
    "betas": Annotated[list[Share], Field(min_length=3, max_length=3)],
    "eps": PositiveFloat,
    "alpha": PositiveFloat,
    "t_alpha": Count,
    "t_beta3": Count,
}
_PRODIGY = _ADAM | {
    "beta3": Optional[Share],  # noqa: UP045  pyright rejects Annotated with the operator
    "decouple": bool,
    "use_bias_correction": bool,
    "safeguard_warmup": bool,
    "d0": PositiveFloat,
    "d_coef": PositiveFloat,
    "growth_rate": Annotated[float, Field(gt=1.0)],
    "slice_p": Annotated[int, Field(ge=1)],
}
_ADAFACTOR = {"beta1": Share, "decay_rate": Annotated[float, Field(lt=0.0)], "clip_threshold": PositiveFloat}
_ADAGRAD = {"eps": PositiveFloat, "lr_decay": UpToOne, "initial_accumulator_value": UpToOne}
_AUTOMAGIC = _ADAM | {"bump": UpToOne, "min_lr": PositiveFloat, "max_lr": PositiveFloat}
_CAME = {
    "betas": Annotated[list[Share], Field(min_length=3, max_length=3)],
    "eps1": PositiveFloat,
    "eps2": PositiveFloat,
    "clip_threshold": PositiveFloat,
}
_MUON = {"momentum": Share, "nesterov": bool, "ns_steps": Annotated[int, Field(ge=1, le=20)]}
_INNER = Annotated[float, Field(gt=0.0, lt=1.0)]
_SCHEDULEFREE = {
    "betas": Annotated[list[_INNER], Field(min_length=2, max_length=2)],  # it divides by the first
    "eps": PositiveFloat,
    "r": UpToOne,
    "weight_lr_power": Annotated[float, Field(ge=0.0, le=10.0)],
}
_BNB = "bitsandbytes"

OPTIMIZERS: dict[OptimizerName, OptimizerSpec] = {
    "adam": OptimizerSpec(8, _ADAM, update_bytes=4),
    "adamw": OptimizerSpec(8, _ADAM, update_bytes=4),
    "adam8bit": OptimizerSpec(2.1, _ADAM, needs=_BNB, state_block=256),
    "adamw8bit": OptimizerSpec(2.1, _ADAM, needs=_BNB, state_block=256),
    "paged_adamw8bit": OptimizerSpec(2.1, _ADAM, needs=_BNB, state_block=256),
    "ademamix": OptimizerSpec(12, _ADEMAMIX, needs=_BNB),
    "ademamix8bit": OptimizerSpec(3.1, _ADEMAMIX, needs=_BNB, state_block=256),
    "lion": OptimizerSpec(4, _TWO_BETAS, needs=_BNB),
    "lion8bit": OptimizerSpec(1.1, _TWO_BETAS, needs=_BNB, state_block=256),
    "prodigy": OptimizerSpec(16, _PRODIGY, state_block=None, finds_lr=True, update_bytes=0.21),
    "prodigy8bit": OptimizerSpec(7.1, _PRODIGY, needs=_BNB, state_block=None, finds_lr=True, update_bytes=12.2),
    # Rows and columns of each matrix, which is 0.25 bytes at rank 16 and 4 at rank 1.
    "adafactor": OptimizerSpec(4, _ADAFACTOR, state_block=None, update_bytes=0.31),
    "adagrad": OptimizerSpec(4, _ADAGRAD, update_bytes=8),
    "automagic": OptimizerSpec(8, _AUTOMAGIC, state_block=None, update_bytes=8),
    "adamw_schedulefree": OptimizerSpec(8, _SCHEDULEFREE, update_bytes=8, averages_weights=True),
    "stable_adamw": OptimizerSpec(8, _ADAM, state_block=None, update_bytes=4.1),
    "adopt": OptimizerSpec(8, _ADAM, update_bytes=8),
    # A momentum and, for each matrix, two rows and two columns: 0.5 bytes at rank 16.
    "came": OptimizerSpec(4.6, _CAME, state_block=None, update_bytes=8.4),
    "muon": OptimizerSpec(4, _MUON, state_block=None, update_bytes=8.3),
}


def optimizer_error(name: OptimizerName, schedule: str, ema_decay: float | None) -> ConflictError | None:
    """Return the first setting that has no use beside the averages of the optimizer, or None if there is none."""
    if not OPTIMIZERS[name].averages_weights:
        return None
    if schedule not in ("constant", "constant_with_warmup"):
        hint = "use constant or constant_with_warmup"
        return ConflictError(f"{name} needs no schedule, since it averages the weights", hint, ("schedule", "name"))
    if ema_decay is not None:
        message = f"{name} exports an average already"
        return ConflictError(message, "leave ema.decay out", ("ema", "decay"))
    return None


class OptimizerSettings(Section):
    name: OptimizerName = "adamw8bit"
    """adamw8bit: AdamW with 8-bit state; adamw: with fp32 state; prodigy: estimates the learning rate; automagic: a
    learning rate per tensor, raised while its updates agree; muon: for matrices; docs/optimizers.md lists all."""
    lr: float = Field(default=1.0e-4, gt=0.0, le=10.0)
    """Learning rate; for prodigy a factor on its estimate, usually 1 (less than 0.1 is raised to 1, with a note)."""
    weight_decay: float = Field(default=1.0e-4, ge=0.0, le=1.0)
    """Weight decay of the optimizer."""
    params: dict[str, Any] = {}
    """Further parameters of the optimizer, by the names in its library."""
    lr_factors: dict[str, LrFactor] = {}
    """Factors on the learning rate of modules, by group or by a regular expression for full module names: {attention:
    0.5, "layers.[0-4][.].+": 2}. Each must match a module, and no module may match two; others have 1."""
    lora_plus: LrFactor = 1.0
    """Factor on the learning rate of each B of a LoRA, which LoRA+ (arXiv 2402.12354) sets to about 16 with a lower
    `lr`; 1: B and A learn at the same rate."""

    @field_validator("lr_factors")
    @classmethod
    def _known_patterns(cls, value: dict[str, float]) -> dict[str, float]:
        require_patterns(value)
        return value

    @model_validator(mode="after")
    def _has_one_rate(self) -> Self:
        if OPTIMIZERS[self.name].finds_lr:
            for key, factors in (("lr_factors", list(self.lr_factors.values())), ("lora_plus", [self.lora_plus])):
                if any(factor != 1.0 for factor in factors):
                    hint = "leave it out, or use another optimizer"
                    raise ConflictError(f"{self.name} estimates a single learning rate for all", hint, (key,))
        return self

    @field_validator("params")
    @classmethod
    def _known_params(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is None:  # unknown, which is an error of its own
            return value
        checked = check_params(value, OPTIMIZERS[name].params, name)
        if checked.get("min_lr", 0.0) > checked.get("max_lr", 1.0):
            raise SettingError("min_lr is above max_lr", "swap them")
        return checked


class ScheduleSettings(Section):
    name: ScheduleName = "constant"
    """Shape of the learning rate after the warm-up: linear, polynomial, cosine and rex decrease, step decreases in
    jumps, one_cycle increases and decreases. docs/optimizers.md has the formulas."""
    warmup_steps: int = Field(default=0, ge=0, le=10_000_000)
    """Steps over which the learning rate increases linearly from zero."""
    params: dict[str, Any] = {}
    """Parameters of the schedule, with their defaults. cosine, linear, polynomial, rex: end_factor, the factor on the
    learning rate after the last step (0). polynomial: power (1). cosine_with_restarts: cycles (1), end_factor. step:
    every (steps), factor (0.1). one_cycle: peak_at (fraction of the run, 0.3), start_factor (0.04), end_factor (0)."""

    @field_validator("params")
    @classmethod
    def _known_params(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        return check_params(value, SCHEDULE_PARAMS[name], name) if name else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.name == "constant_with_warmup" and self.warmup_steps == 0:
            raise ConflictError("constant_with_warmup needs warmup_steps", "set it, or use constant")
        if self.name == "one_cycle" and self.warmup_steps:
            raise ConflictError("one_cycle rises by itself", "leave warmup_steps out, or set params.peak_at instead")
        if self.name == "step" and "every" not in self.params:
            raise ConflictError("step needs params: {every: steps}")
        return self
