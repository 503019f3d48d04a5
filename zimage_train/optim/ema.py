"""Exponential moving average of the LoRA weights, kept in fp32."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError


def decay_at(decay: float, step: int) -> float:
    """Return the decay of the update after `step`, with warm-up: min(decay, (1 + step) / (10 + step)).

    Source: TensorFlow's ExponentialMovingAverage; diffusers' EMAModel without `use_ema_warmup` has the same formula.
    """
    # With a constant 0.999, the initial weights (B = 0) would still make up 37% of the average after 1000 steps. With
    # the warm-up, the average spans about the last tenth of the steps until `decay` is reached.
    return min(decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Ema:
    """Averaged weights, keyed by the names of the trained weights."""

    decay: float
    shadow: dict[str, Tensor]
    """Name -> average, fp32: in bf16 an update by a factor of 1 - decay = 0.001 would be rounded away."""

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor], step: int) -> None:
        """Set s <- d s + (1 - d) w for every average s and weight w, after the optimizer's `step`."""
        weight = 1.0 - decay_at(self.decay, step)
        torch._foreach_lerp_(list(self.shadow.values()), [trained[name] for name in self.shadow], weight)

    def state(self) -> dict[str, Tensor]:
        """Return name -> tensor, as a checkpoint stores them."""
        return {f"ema.{name}": shadow for name, shadow in self.shadow.items()}

    def load_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Copy `state` into the averages.

        Raises:
            WeightsError: its names or shapes are not those of this run.
        """
        current = self.state()
        if current.keys() != state.keys() or any(current[name].shape != state[name].shape for name in current):
            raise WeightsError(
                Problem(
                    where, "holds no averaged weights of this run", "begin again with --fresh", "damaged-checkpoints"
                )
            )
        for name, tensor in current.items():
            tensor.copy_(state[name])


def init_ema(decay: float, trained: Mapping[str, Tensor]) -> Ema:
    """Return averages that start as copies of `trained`."""
    return Ema(decay, {name: tensor.detach().float().clone() for name, tensor in trained.items()})
