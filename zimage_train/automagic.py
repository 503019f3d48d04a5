"""Automagic: Adam with one learning rate a tensor, raised while its gradients agree and lowered when they turn back.

The multiplicative hypergradient of Baydin et al. 2018 (arXiv 1703.04782) on signs: the derivative of the loss by the
last step's rate is minus the product of gradient and last update, and of that only the share of agreeing signs counts.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Automagic(torch.optim.Optimizer):
    """AdamW whose rate of each tensor is the group's times a scale: scale <- scale * exp(bump * agreement).

    `agreement`, from -1 to 1, is the mean of sign(gradient) * sign(momentum) before this step. The resulting rate stays
    between `min_lr` and `max_lr` where the group's own rate is.
    """

    def __init__(
        self,
        params: list[Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bump: float = 0.02,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "base_lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bump": bump,
                "min_lr": min_lr,
                "max_lr": max_lr,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every tensor that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["scale"] = torch.ones((), dtype=torch.float32, device=parameter.device)
        state["step"] += 1
        (beta1, beta2), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        agreement = (grad.sign() * mean.sign()).mean()
        least, most = (max(group[name], 1e-30) / group["base_lr"] for name in ("min_lr", "max_lr"))
        state["scale"].mul_(torch.exp(group["bump"] * agreement)).clamp_(min(least, 1.0), max(most, 1.0))
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        rate = group["lr"] * state["scale"]
        eps = group["eps"] * math.sqrt(1 - beta2 ** state["step"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(rate * correction * (mean / (square.sqrt() + eps)))

    def mean_lr(self) -> float:
        """The rate of the next step, the mean over the tensors."""
        scales = [state["scale"] for state in self.state.values()]
        scale = float(torch.stack(scales).mean()) if scales else 1.0
        return self.param_groups[0]["lr"] * scale
