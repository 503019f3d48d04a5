"""The optimizers: their parameters, memory and dependencies (torch-free). Factories are in optim/optimizers.py.

To add an optimizer: its name and `OptimizerSpec` here, its factory there.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

from pydantic import Field

from zimage_train.config.types import ConflictError, Count, PositiveFloat, Share, UpToOne

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
