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

    `agreement`, from -1 to 1, is the mean of sign(gradient) * sign(momentum) before this step. The resulting rate,
    before the schedule, stays between `min_lr` and `max_lr`.
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
        """One update of every tensor that has a gradient, all of them in few calls."""
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        grads = [one.grad for one in parameters if one.grad is not None]
        states = [self._state_of(one) for one in parameters]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        count = states[0]["step"]
        scales = self._scaled([state["scale"] for state in states], grads, means, group)
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        root = math.sqrt(1 - beta2**count)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_add_(sizes, group["eps"] * root)
        updates = torch._foreach_div(means, sizes)
        torch._foreach_mul_(updates, root / (1 - beta1**count))
        weights: list[Tensor] = [one.detach() for one in parameters]
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        for parameter, update, scale in zip(parameters, updates, scales, strict=True):
            parameter.addcmul_(update, scale.to(update.dtype), value=-group["lr"])

    def _state_of(self, parameter: Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["scale"] = torch.ones((), dtype=torch.float32, device=parameter.device)
        state["step"] += 1
        return state

    def _scaled(
        self, scales: list[Tensor], grads: list[Tensor], means: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """Raise or lower every scale by how far gradient and momentum agree."""
        signs = torch._foreach_sign(grads)
        torch._foreach_mul_(signs, torch._foreach_sign(means))
        agreement = torch.stack([one.mean() for one in signs]).float()
        least, most = (group[name] / group["base_lr"] for name in ("min_lr", "max_lr"))
        changed = torch.stack(scales) * torch.exp(group["bump"] * agreement)
        for scale, now in zip(scales, changed.clamp(least, most), strict=True):
            scale.copy_(now)
        return scales

    def mean_lr(self) -> float:
        """The rate of the next step, the mean over the tensors."""
        scales = [state["scale"] for state in self.state.values()]
        scale = float(torch.stack(scales).mean()) if scales else 1.0
        return self.param_groups[0]["lr"] * scale
