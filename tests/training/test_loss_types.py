"""The kinds of loss in a step, with masks, priors and guidance: each against float64 arithmetic of the whole loss."""

import math
from typing import Any

import pytest
import torch
from loss_inputs import batch, raw_velocity, trainable, with_extras, without_b

from zimage_train.config.loss import GuidanceSettings, LossSettings
from zimage_train.config.schema import Config
from zimage_train.training.batches import Batch, mask_weights, outside_weights
from zimage_train.training.loss import losses, preservation_loss, sft_loss


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


KINDS: dict[str, dict[str, Any]] = {
    "mae": {"type": "mae"},
    "huber": {"type": "huber", "delta": 0.7},
    "huber as it is": {"type": "huber"},
    "pseudo_huber": {"type": "pseudo_huber", "delta": 0.3},
    "pseudo_huber as it is": {"type": "pseudo_huber"},
    "details": {"detail": 3.0},
    "no details": {"detail": 0.0},
    "details of huber": {"type": "huber", "delta": 0.7, "detail": 0.25},
    "min_snr": {"min_snr": 5.0},
    "min_snr with a floor": {"min_snr": 1.0, "min_snr_floor": 0.4, "type": "mae"},
}


def elements(error: torch.Tensor, kind: dict[str, Any]) -> torch.Tensor:
    """The loss of each place of an error (16, h, w) in float64, block by block."""
    error = error.clone()
    weight = math.sqrt(kind.get("detail", 1.0))
    for row in range(0, error.shape[1], 2):
        for column in range(0, error.shape[2], 2):
            block = error[:, row : row + 2, column : column + 2]
            mean = block.sum(dim=(1, 2), keepdim=True) / 4
            error[:, row : row + 2, column : column + 2] = weight * block + (1 - weight) * mean
    size, type = error.abs(), kind.get("type", "mse")
    if type == "mae":
        return size
    if type == "huber":
        delta = kind.get("delta", 0.1)
        over = (size - delta).clamp(min=0)
        return size**2 - over**2
    if type == "pseudo_huber":
        delta = kind.get("delta", 0.01)
        return torch.hypot(size, torch.full_like(size, delta)) - delta
    return size**2


def level_weight(sigma: float, kind: dict[str, Any]) -> float:
    gamma = kind.get("min_snr")
    if gamma is None:
        return 1.0
    top = 1 / (1 + math.sqrt(gamma))
    weight = min((1 - sigma) ** 2, gamma * sigma**2) / (1 - top) ** 2
    return max(weight, kind.get("min_snr_floor", 0.1))


def expected_loss(data: Batch, error: torch.Tensor, kind: dict[str, Any], places: torch.Tensor | None = None) -> float:
    """The mean over the samples of weight, weight of the noise level, and mean over the places."""
    total = 0.0
    for index in range(len(error)):
        values = elements(error[index], kind)
        if places is not None:
            values = values * places[index].double()
        weight = float(data.weight[index]) * level_weight(float(data.sigma[index]), kind)
        total += weight * float(values.sum()) / values.numel()
    return total / len(error)


@pytest.mark.parametrize("differential", [None, 2.0])
@pytest.mark.parametrize("name", KINDS)
def test_loss_of_each_kind(name: str, differential: float | None):
    """Each kind is its formula; differential guidance multiplies the error before it; the plain loss is logged."""
    frozen, _ = trainable()
    data, kind = batch(3), KINDS[name]
    error = raw_velocity(frozen, data, data.prompts) - (data.noise - data.x0).double()
    loss = sft_loss(frozen.model, data, GuidanceSettings(differential=differential), LossSettings(**kind))
    expected = expected_loss(data, (differential or 1.0) * error, kind)
    assert float(loss.objective.detach()) == pytest.approx(expected, rel=1e-4)
    assert loss.plain.requires_grad is False
    assert torch.equal(loss.plain, sft_loss(frozen.model, data).plain)


@pytest.mark.parametrize("name", KINDS)
def test_kind_with_mask_and_prior(name: str):
    """The mask weights the losses of places; outside of it the prior is held by the same kind, without guidance."""
    frozen, attached = trainable()
    data, kind = batch(2), KINDS[name]
    mask = torch.zeros(1, 8, 12)
    mask[:, :, :5] = 1.0  # within a block of 2 x 2
    weights = mask_weights([mask, None], [0.2, 0.2], data.x0.shape)
    outside = outside_weights([mask, None], [0.5, 0.5], data.x0.shape)
    own = raw_velocity(frozen, data, data.prompts)
    prior = without_b(attached, lambda: raw_velocity(frozen, data, data.prompts))
    expected = expected_loss(data, own - (data.noise - data.x0).double(), kind, weights)
    held = expected_loss(data, own - prior, kind, outside)
    loss = sft_loss(frozen.model, with_extras(data, mask=weights, outside=outside), loss=LossSettings(**kind))
    assert held > 1e-7
    assert float(loss.objective.detach()) == pytest.approx(expected + held, rel=1e-4)
    alone = sft_loss(frozen.model, with_extras(data, mask=weights), loss=LossSettings(**kind))
    # The distance to the prior is small beside the loss, so its part is looked at by itself.
    assert float((loss.objective - alone.objective).detach()) == pytest.approx(held, rel=2e-2, abs=2e-6)
    assert torch.equal(loss.plain, sft_loss(frozen.model, with_extras(data, mask=weights)).plain)


@pytest.mark.parametrize("schedule", ["constant", "sigma"])
@pytest.mark.parametrize("cfg_zero", [False, True])
@pytest.mark.parametrize("kind", [{}, {"type": "pseudo_huber", "delta": 0.3}])
def test_contrastive_guidance(schedule: Any, cfg_zero: bool, kind: dict[str, Any]):
    """The scale may follow the noise level, and the prediction for the empty prompt be projected on the target."""
    frozen, _ = trainable()
    data = batch(2)
    empty = torch.randn(8, 64)
    own = raw_velocity(frozen, data, data.prompts)
    u = raw_velocity(frozen, data, [empty, empty])
    target = (data.noise - data.x0).double()
    moved = []
    for index in range(2):
        base, aim = u[index].flatten(), target[index].flatten()
        if cfg_zero:
            base = base * (torch.dot(base, aim) / torch.dot(base, base))
        scale = 3.0 if schedule == "constant" else 1.0 + 2.0 * float(data.sigma[index])
        moved.append(((1 - scale) * base + scale * aim).view_as(target[index]))
    guidance = GuidanceSettings(contrastive=3.0, contrastive_schedule=schedule, cfg_zero=cfg_zero)
    loss = sft_loss(frozen.model, with_extras(data, empty_prompt=empty), guidance, LossSettings(**kind))
    expected = expected_loss(data, own - torch.stack(moved), kind)
    assert float(loss.objective.detach()) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(loss.plain, sft_loss(frozen.model, data).plain)


def test_priors_are_unguided():
    """No guidance of the target moves that of samples held to the prior, whatever the loss."""
    frozen, attached = trainable()
    data, kind = batch(2), {"type": "mae"}
    prior = without_b(attached, lambda: raw_velocity(frozen, data, data.prompts))
    error = raw_velocity(frozen, data, data.prompts) - prior
    extras = with_extras(data, to_prior=torch.tensor([True, True]), empty_prompt=torch.randn(8, 64))
    guidance = GuidanceSettings(contrastive=3.0, contrastive_schedule="sigma", cfg_zero=True)
    loss = sft_loss(frozen.model, extras, guidance, LossSettings(type="mae"))
    assert float(loss.objective.detach()) == pytest.approx(expected_loss(data, error, kind), rel=1e-3)


def test_preservation_stays_mse():
    """The kind and the weights of the loss leave the preservation loss as it is."""
    frozen, _ = trainable()
    held = [torch.randn(20, 64)]
    data = with_extras(batch(1), preserve_prompts=held)
    settings = {"type": "mae", "detail": 2.0, "min_snr": 5.0}
    values = {"name": "a", "data": [{"folder": "x"}], "loss": settings, "timesteps": {"type": "linear"}}
    config = Config.model_validate(values | {"preserve": {"kind": "blank"}})
    _, found = list(losses(frozen.model, data, config))
    assert torch.equal(found.objective, preservation_loss(frozen.model, data, held, 1.0).objective)


NEUTRAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "guidance 1": ({"differential": 1.0, "contrastive": 1.0}, {}),
    "details 1": ({}, {"detail": 1.0}),
    "min_snr_floor 1": ({}, {"min_snr": 5.0, "min_snr_floor": 1.0}),
    "huber that is wide": ({}, {"type": "huber", "delta": 100.0}),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values(name: str):
    """A neutral value gives the loss and the gradient of leaving it out, to the bit."""
    frozen, attached = trainable()
    data = with_extras(batch(2), empty_prompt=torch.randn(8, 64))
    guidance, loss = NEUTRAL[name]
    found = []
    for settings in ((GuidanceSettings(), LossSettings()), (GuidanceSettings(**guidance), LossSettings(**loss))):
        value = sft_loss(frozen.model, data, *settings)
        grads = torch.autograd.grad(value.objective, attached.parameters())
        found.append([value.objective.detach(), value.plain, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
