"""Automagic: Adam with a learning rate per tensor, raised while its gradients agree and lowered when they reverse.

This is the multiplicative hypergradient of Baydin et al. 2018 (arXiv 1703.04782), reduced to signs. The derivative of
the loss with respect to the last learning rate is minus the inner product of the gradient and the last update; only the
fraction of elements whose signs agree is used.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Automagic(torch.optim.Optimizer):
    """AdamW with a learning rate per tensor: the group's times a scale, scale <- scale * exp(bump * agreement).

    `agreement`, in [-1, 1], is the mean of sign(gradient) * sign(momentum), with the momentum before this step. The
    resulting rate, before the schedule, is clamped to [`min_lr`, `max_lr`].
    """

    def __init__(
        self,
        params: list[Parameter] | list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bump: float = 0.02,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
    ) -> None:
        # The schedule overwrites `lr` in every step. `base_lr` keeps the initial value, which `_update_scales` needs to
        # express `min_lr` and `max_lr` as limits of the scale.
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bump": bump,
                "min_lr": min_lr,
                "max_lr": max_lr,
            },
        )
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self._advance_state(parameter) for parameter in parameters]
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        scales = [state["scale"] for state in states]
        # Every LoRA factor has a gradient in every step, so all tensors have taken the same number of steps.
        step = states[0]["step"]
        # Before the momentum takes in this gradient: afterwards the two would agree by construction.
        self._update_scales(scales, grads, exp_avgs, group)
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
        # Adam's m_hat / (sqrt(v_hat) + eps), with numerator and denominator multiplied by the correction of sqrt(v), so
        # that no corrected copy of either moment is made.
        correction = math.sqrt(1 - beta2**step)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, group["eps"] * correction)
        updates = torch._foreach_div(exp_avgs, denominators)
        torch._foreach_mul_(updates, correction / (1 - beta1**step))
        weights: list[Tensor] = [parameter.detach() for parameter in parameters]
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        for parameter, update, scale in zip(parameters, updates, scales, strict=True):
            parameter.addcmul_(update, scale.to(update.dtype), value=-group["lr"])

    def _advance_state(self, parameter: Parameter) -> dict[str, Any]:
        """Return the state of `parameter` with its step counted, created in the first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["scale"] = torch.ones((), dtype=torch.float32, device=parameter.device)
        state["step"] += 1
        return state

    def _update_scales(
        self, scales: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], group: dict[str, Any]
    ) -> None:
        """Raise or lower each scale in place, by the agreement of gradient and momentum."""
        signs = torch._foreach_sign(grads)
        # In the first step the momentum is zero, and so is the agreement: the scale stays at 1.
        torch._foreach_mul_(signs, torch._foreach_sign(exp_avgs))
        agreement = torch.stack([sign.mean() for sign in signs]).float()
        min_scale = group["min_lr"] / group["base_lr"]
        max_scale = group["max_lr"] / group["base_lr"]
        updated = torch.stack(scales) * torch.exp(group["bump"] * agreement)
        for scale, value in zip(scales, updated.clamp(min_scale, max_scale), strict=True):
            scale.copy_(value)

    def mean_lr(self) -> float:
        """Return the learning rate of the next step, averaged over the tensors."""
        num_tensors = sum(len(group["params"]) for group in self.param_groups)
        mean = 0.0
        for group in self.param_groups:
            scales = [self.state[parameter]["scale"] for parameter in group["params"] if self.state.get(parameter)]
            scale = float(torch.stack(scales).mean()) if scales else 1.0
            mean += group["lr"] * scale * (len(group["params"]) / num_tensors)
        return mean
