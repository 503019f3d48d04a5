"""The exponential moving average of the LoRA: a second set of weights, in fp32, that follows the trained ones."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError


def decay_at(decay: float, step: int) -> float:
    """The decay of the update after `step`: it rises to `decay`, so that the start is soon forgotten.

    (1 + step) / (10 + step), as TensorFlow's ExponentialMovingAverage and diffusers' EMAModel.
    """
    return min(decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Ema:
    """Averages by the names of what they average."""

    decay: float
    shadow: dict[str, Tensor]

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor], step: int) -> None:
        """s <- d s + (1 - d) w, after the optimizer's `step`."""
        weight = 1.0 - decay_at(self.decay, step)
        torch._foreach_lerp_(list(self.shadow.values()), [trained[name] for name in self.shadow], weight)

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor, as a checkpoint keeps them."""
        return {f"ema.{name}": shadow for name, shadow in self.shadow.items()}

    def load_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Copy `state` in.

        Raises:
            WeightsError: it is of something else.
        """
        own = self.state()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise WeightsError(Problem(where, "holds no averaged weights of this run", "begin again with --fresh"))
        for name, tensor in own.items():
            tensor.copy_(state[name])


def init_ema(decay: float, trained: Mapping[str, Tensor]) -> Ema:
    """Averages that begin where `trained` stands."""
    return Ema(decay, {name: tensor.detach().float().clone() for name, tensor in trained.items()})
