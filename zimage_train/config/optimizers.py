"""The optimizers: their parameters, memory and dependencies (torch-free). Factories are in optim/optimizers.py.

To add an optimizer: its name and `OptimizerSpec` here, its factory there.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

from pydantic import Field

from zimage_train.config.types import Count, PositiveFloat, Share, UpToOne

OptimizerName = Literal[
    "adam", "adamw", "adam8bit", "adamw8bit", "paged_adamw8bit", "ademamix", "ademamix8bit", "lion", "lion8bit",
    "prodigy", "prodigy8bit", "adafactor", "adagrad", "automagic",
]  # fmt: skip


@dataclass(frozen=True)
class OptimizerSpec:
    """The properties of an optimizer that are needed without its library."""

    state_bytes: float
    """Optimizer state per trained parameter, bytes, including temporaries of the update."""
    params: dict[str, Any] = field(default_factory=dict)
    """Keys that `optimizer.params` may have, with their types."""
    needs: str | None = None
    """Package that it needs and that is not installed on every platform."""
    state_block: int | None = 1
    """Number of neighbouring elements that share a number of the state; None: the update of an element depends on its
    whole tensor. An optimizer with a number treats all factors of a LoRA as a single tensor."""
    finds_lr: bool = False
    """Whether it estimates the learning rate, so that `optimizer.lr` is a factor on its estimate."""


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
_BNB = "bitsandbytes"

OPTIMIZERS: dict[OptimizerName, OptimizerSpec] = {
    "adam": OptimizerSpec(8, _ADAM),
    "adamw": OptimizerSpec(8, _ADAM),
    "adam8bit": OptimizerSpec(2.1, _ADAM, needs=_BNB, state_block=256),
    "adamw8bit": OptimizerSpec(2.1, _ADAM, needs=_BNB, state_block=256),
    "paged_adamw8bit": OptimizerSpec(2.1, _ADAM, needs=_BNB, state_block=256),
    "ademamix": OptimizerSpec(12, _ADEMAMIX, needs=_BNB),
    "ademamix8bit": OptimizerSpec(3.1, _ADEMAMIX, needs=_BNB, state_block=256),
    "lion": OptimizerSpec(4, _TWO_BETAS, needs=_BNB),
    "lion8bit": OptimizerSpec(1.1, _TWO_BETAS, needs=_BNB, state_block=256),
    "prodigy": OptimizerSpec(16, _PRODIGY, state_block=None, finds_lr=True),
    "prodigy8bit": OptimizerSpec(7.1, _PRODIGY, needs=_BNB, state_block=None, finds_lr=True),
    # The state itself is small, but the update is a temporary of the size of the parameters.
    "adafactor": OptimizerSpec(4, _ADAFACTOR, state_block=None),
    "adagrad": OptimizerSpec(4, _ADAGRAD),
    "automagic": OptimizerSpec(8, _AUTOMAGIC, state_block=None),
}
