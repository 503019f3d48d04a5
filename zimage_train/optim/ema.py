"""Exponential moving average of the LoRA weights, kept in fp32."""

from collections.abc import Callable, Mapping
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
    buffer: Tensor
    """The averages, fp32, laid out as the buffer of the trained weights. In bf16 an update by a factor of 1 - decay =
    0.001 would be rounded away."""
    shadow: dict[str, Tensor]
    """Name -> average: views of `buffer`."""

    @torch.no_grad()
    def update(self, trained: Tensor, step: int) -> None:
        """Set s <- d s + (1 - d) w for every average s and weight w of the buffer `trained`, after the `step`."""
        self.buffer.lerp_(trained, 1.0 - decay_at(self.decay, step))

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


def init_ema(decay: float, trained: Tensor, name_views: Callable[[Tensor], dict[str, Tensor]]) -> Ema:
    """Return averages that start as a copy of the buffer `trained`; `name_views` names the parts of such a buffer."""
    buffer = trained.detach().clone()
    return Ema(decay, buffer, name_views(buffer))
