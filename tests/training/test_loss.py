"""The step: its loss and gradient against independent float64 arithmetic, batching, checkpointing, dropout."""

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from loss_inputs import batch, raw_velocity, trainable, with_extras, without_b
from torch.utils.checkpoint import checkpoint

from zimage_train.config.loss import GuidanceSettings
from zimage_train.config.schema import Config
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.lora.layers import LoraLayers
from zimage_train.training.batches import Batch, mask_weights, outside_weights
from zimage_train.training.loss import losses, preservation_loss, prior_velocity, sft_loss


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def single(whole: Batch, index: int) -> Batch:
    cut = slice(index, index + 1)
    return Batch(whole.x0[cut], whole.noise[cut], whole.sigma[cut], whole.weight[cut], whole.prompts[cut])


def gradient(
    frozen: FrozenTransformer, attached: LoraLayers, data: Batch, differential: float | None = None
) -> torch.Tensor:
    guidance = GuidanceSettings(differential=differential)
    grads = torch.autograd.grad(sft_loss(frozen.model, data, guidance).objective, attached.parameters())
    return torch.cat([grad.flatten() for grad in grads])


def test_loss_equals_float64():
    """The loss is the weighted mean square of an independent calculation."""
    frozen, _ = trainable()
    data = batch(3)
    total = 0.0
    for index in range(3):
        sigma = float(data.sigma[index])
        x = (1 - sigma) * data.x0[index].double() + sigma * data.noise[index].double()
        with torch.no_grad():
            raw = frozen.model(
                [x.float().unsqueeze(1)], torch.tensor([1 - sigma]), [data.prompts[index]], return_dict=False
            )[0][0]
        # The model predicts x0 - noise.
        error = raw.squeeze(1).double() - (data.x0[index].double() - data.noise[index].double())
        total += float(data.weight[index]) * float((error**2).mean())
    assert float(sft_loss(frozen.model, data).objective.detach()) == pytest.approx(total / 3, rel=1e-5)


def test_batch_gradient_is_the_mean():
    """The gradient of a batch is the mean of single gradients, with captions of any length."""
    frozen, attached = trainable()
    data = batch(4)
    together = gradient(frozen, attached, data)
    apart = torch.stack([gradient(frozen, attached, single(data, index)) for index in range(4)]).mean(dim=0)
    assert float((together - apart).norm() / apart.norm()) < 1e-4


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_differential_guidance_gradient(scale: float):
    """Differential guidance makes the gradient larger by exactly its scale."""
    frozen, attached = trainable()
    data = batch(2)
    plain, guided = gradient(frozen, attached, data), gradient(frozen, attached, data, scale)
    assert torch.allclose(guided, scale * plain, rtol=1e-4, atol=1e-7)
    loss = sft_loss(frozen.model, data, GuidanceSettings(differential=scale))
    assert float(loss.objective.detach()) == pytest.approx(scale**2 * float(loss.plain), rel=1e-5)
    assert float(loss.plain) == pytest.approx(float(sft_loss(frozen.model, data).objective.detach()), rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_gradient(dropout: float):
    """Recomputing activations changes no gradient."""
    frozen, attached = trainable(dropout)
    data = batch(2)
    torch.manual_seed(9)
    kept = gradient(frozen, attached, data)
    frozen.model.enable_gradient_checkpointing(
        partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout > 0, determinism_check="none")
    )
    torch.manual_seed(9)
    assert torch.equal(gradient(frozen, attached, data), kept)


def test_recomputation_saves_memory():
    def saved_bytes(recompute: bool) -> int:
        frozen, _ = trainable()
        if recompute:
            frozen.model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sft_loss(frozen.model, batch(1))
        return total

    assert saved_bytes(True) < saved_bytes(False) / 5


def test_lora_dropout_in_training_only():
    """LoRA dropout changes training, and not sampling."""
    frozen, attached = trainable(0.5)
    data = batch(1)
    torch.manual_seed(1)
    one = gradient(frozen, attached, data)
    torch.manual_seed(2)
    assert not torch.equal(gradient(frozen, attached, data), one)
    frozen.model.eval()
    first, second = (sft_loss(frozen.model, data).objective.detach() for _ in range(2))
    assert torch.equal(first, second)


# Preservation, masks, priors, contrastive guidance: each against float64 arithmetic


def test_prior_is_the_model_without_lora():
    """The prior is the model without the LoRA, which is switched on again afterwards."""
    frozen, attached = trainable()
    data = batch(2)
    x = (1 - data.sigma.view(-1, 1, 1, 1)) * data.x0 + data.sigma.view(-1, 1, 1, 1) * data.noise
    before = float(sft_loss(frozen.model, data).plain)
    prior = prior_velocity(frozen.model, x, data.sigma, data.prompts)
    assert not prior.requires_grad
    expected = without_b(attached, lambda: raw_velocity(frozen, data, data.prompts))
    assert torch.allclose(prior.double(), expected, atol=1e-4)
    assert not torch.allclose(raw_velocity(frozen, data, data.prompts), expected, atol=1e-3)
    assert float(sft_loss(frozen.model, data).plain) == before


def test_preservation_loss():
    """Preservation is the mean square distance to the prior, for its own prompt."""
    frozen, attached = trainable()
    data = batch(2)
    held = [torch.randn(11, 64), torch.randn(35, 64)]
    loss = preservation_loss(frozen.model, data, held, 2.5)
    own = raw_velocity(frozen, data, held)
    prior = without_b(attached, lambda: raw_velocity(frozen, data, held))
    expected = float((own - prior).square().mean())
    assert float(loss.plain) == pytest.approx(expected, rel=1e-3)
    assert float(loss.objective.detach()) == pytest.approx(2.5 * expected, rel=1e-3)
    assert loss.name == "preservation"


def test_losses_share_no_memory():
    """The graphs of the loss and of preservation are never in memory together."""
    frozen, _ = trainable()
    data = with_extras(batch(1), preserve_prompts=[torch.randn(20, 64)])
    config = Config.model_validate({"name": "a", "data": [{"folder": "x"}], "preserve": {"kind": "blank"}})
    alive: dict[int, int] = {}
    most = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()
        if id(kept) not in alive:
            alive[id(kept)] = kept.numel()
            weakref.finalize(kept, alive.pop, id(kept), None)
            most[0] = max(most[0], sum(alive.values()))
        return kept

    def peak(parts: Iterator[Any]) -> int:
        alive.clear()
        most[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for loss in parts:
                loss.objective.backward()
        return most[0]

    one = peak(sft_loss(frozen.model, batch(1)) for _ in range(1))
    both = peak(losses(frozen.model, data, config))
    assert one > 10_000 and both <= one * 1.1
    names = [loss.name for loss in losses(frozen.model, data, config)]
    assert names == ["loss", "preservation"]
    assert [loss.name for loss in losses(frozen.model, batch(1), config)] == ["loss"]


def test_both_parts_reach_the_gradient():
    frozen, attached = trainable()
    held = [torch.randn(20, 64)]
    data = with_extras(batch(1), preserve_prompts=held)
    config = Config.model_validate(
        {"name": "a", "data": [{"folder": "x"}], "preserve": {"kind": "blank", "weight": 3.0}}
    )
    for loss in losses(frozen.model, data, config):
        loss.objective.backward()
    together = torch.cat([parameter.grad.flatten() for parameter in attached.parameters()])
    parts = torch.autograd.grad(preservation_loss(frozen.model, data, held, 1.0).objective, attached.parameters())
    own = gradient(frozen, attached, batch(1))
    expected = own + 3.0 * torch.cat([part.flatten() for part in parts])
    assert float((together - expected).norm() / expected.norm()) < 1e-4
    assert float((together - own).norm()) > 0.01 * float(own.norm())


def test_mask_weights():
    """A mask weights places; a sample counts the same, however little of it is trained."""
    frozen, _ = trainable()
    data = batch(2)
    masks = [torch.zeros(1, 8, 12), None]
    masks[0][:, :, :3] = 1.0
    weights = mask_weights(masks, [0.2, 0.7], data.x0.shape)
    assert weights is not None and torch.allclose(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    assert float(weights[0, 0, 0, 0] / weights[0, 0, 0, 11]) == pytest.approx(5.0)
    assert torch.equal(weights[1], torch.ones(1, 8, 12))
    error = raw_velocity(frozen, data, data.prompts) - (data.noise - data.x0).double()
    total = 0.0
    for index in range(2):
        square = error[index].square()
        if index == 0:
            inside, outside = square[:, :, :3].mean(), square[:, :, 3:].mean()
            mean = (0.25 * inside + 0.75 * 0.2 * outside) / (0.25 + 0.75 * 0.2)
        else:
            mean = square.mean()
        total += float(data.weight[index]) * float(mean)
    found = sft_loss(frozen.model, with_extras(data, mask=weights))
    assert float(found.objective.detach()) == pytest.approx(total / 2, rel=1e-4)


def test_mask_outside_is_held_to_the_prior():
    """The part outside of the mask is held to the prior."""
    frozen, attached = trainable()
    data = batch(2)
    mask = torch.zeros(1, 8, 12)
    mask[:, :, :3] = 1.0
    outside = outside_weights([mask, None], [0.5, 0.5], data.x0.shape)
    assert outside is not None and float(outside[1].abs().max()) == 0.0
    assert float(outside[0].mean()) == pytest.approx(0.5) and float(outside[0, 0, 0, 0]) == 0.0
    own = raw_velocity(frozen, data, data.prompts)
    prior = without_b(attached, lambda: raw_velocity(frozen, data, data.prompts))
    held = 0.5 * float((own[0] - prior[0])[:, :, 3:].square().mean())
    found = sft_loss(frozen.model, with_extras(data, outside=outside))
    plain = float(sft_loss(frozen.model, data).plain)
    assert float(found.plain) == pytest.approx(plain, rel=1e-6)
    assert float(found.objective.detach()) == pytest.approx(plain + float(data.weight[0]) * held / 2, rel=1e-4)
    assert held > 1e-5


@pytest.mark.parametrize(("masks", "weights"), [([None, None], [1.0, 1.0]), ([torch.ones(1, 8, 12), None], [0.0, 0.0])])
def test_mask_outside_without_weight(masks: list[Any], weights: list[float]):
    """If nothing outside of the mask is held, nothing is computed for it."""
    assert outside_weights(masks, weights, torch.Size((2, 16, 8, 12))) is None


def test_mask_missing_or_black():
    """No mask is no weight, and a black mask does not divide by zero."""
    assert mask_weights([None, None], [0.1, 0.1], torch.Size((2, 16, 8, 12))) is None
    black = mask_weights([torch.zeros(1, 8, 12)], [0.0], torch.Size((1, 16, 8, 12)))
    assert black is not None and float(black.abs().max()) == 0.0
    grey = mask_weights([torch.zeros(1, 8, 12)], [0.1], torch.Size((1, 16, 8, 12)))
    assert grey is not None and torch.allclose(grey, torch.ones(1, 1, 8, 12))


def test_prior_regularization_target():
    """Regularization by the prior has the prior as its target."""
    frozen, attached = trainable()
    data = batch(3)
    to_prior = torch.tensor([True, False, True])
    own = raw_velocity(frozen, data, data.prompts)
    prior = without_b(attached, lambda: raw_velocity(frozen, data, data.prompts))
    target = (data.noise - data.x0).double()
    target[to_prior] = prior[to_prior]
    expected = float((data.weight.double() * (own - target).square().mean(dim=(1, 2, 3))).mean())
    found = sft_loss(frozen.model, with_extras(data, to_prior=to_prior))
    assert float(found.objective.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("differential", [None, 2.0])
def test_contrastive_guidance_target(differential: float | None):
    """Contrastive guidance moves the target away from the empty prompt."""
    frozen, _ = trainable()
    data = batch(2)
    empty = torch.randn(8, 64)
    own = raw_velocity(frozen, data, data.prompts)
    unconditional = raw_velocity(frozen, data, [empty, empty])  # with the LoRA
    target = (data.noise - data.x0).double()
    moved = unconditional + 1.7 * (target - unconditional)
    scale = differential or 1.0
    expected = scale**2 * float((data.weight.double() * (own - moved).square().mean(dim=(1, 2, 3))).mean())
    guidance = GuidanceSettings(differential=differential, contrastive=1.7)
    found = sft_loss(frozen.model, with_extras(data, empty_prompt=empty), guidance)
    assert float(found.objective.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(found.plain) == pytest.approx(float(sft_loss(frozen.model, data).plain), rel=1e-6)


def test_prior_regularization_unguided():
    """Guidance does not move the target of samples that are held to the prior."""
    frozen, _ = trainable()
    data = batch(2)
    everyone = torch.tensor([True, True])
    held = sft_loss(frozen.model, with_extras(data, to_prior=everyone))
    extras = with_extras(data, to_prior=everyone, empty_prompt=torch.randn(8, 64))
    guided = sft_loss(frozen.model, extras, GuidanceSettings(contrastive=3.0))
    assert float(guided.objective.detach()) == pytest.approx(float(held.objective.detach()), rel=1e-6)
