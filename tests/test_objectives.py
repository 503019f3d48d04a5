"""The step: its loss and gradient against independent float64 arithmetic, batching, checkpointing, dropout."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from zimage_train import mini
from zimage_train.assemble import Frozen, assemble
from zimage_train.lora import attach, names
from zimage_train.lora.attach import Attached
from zimage_train.training.objectives import Batch, sft_loss

CPU = torch.device("cpu")


def trainable(dropout: float = 0.0) -> tuple[Frozen, Attached]:
    """The miniature with a LoRA whose B is not zero, so that gradients reach A too."""
    frozen = assemble(mini.TURBO / "transformer", None, "fp32", CPU)
    modules = names.select(["attention", "feed_forward"], frozen.shape.linears)
    attached = attach.attach(frozen.model, modules, 4, None, dropout, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for b in attached.b.values():
            b.copy_(torch.randn(b.shape, generator=draw) * 0.02)
    frozen.model.train()
    return frozen, attached


def batch(size: int, lengths: tuple[int, ...] = (9, 40, 70, 3)) -> Batch:
    """Samples with captions of different padded lengths."""
    draw = torch.Generator().manual_seed(4)
    return Batch(
        x0=torch.randn(size, 16, 8, 12, generator=draw),
        noise=torch.randn(size, 16, 8, 12, generator=draw),
        sigma=torch.rand(size, generator=draw),
        weight=torch.rand(size, generator=draw) + 0.5,
        prompt_embeds=[torch.randn(length, 64, generator=draw) for length in lengths[:size]],
    )


def single(whole: Batch, index: int) -> Batch:
    cut = slice(index, index + 1)
    return Batch(whole.x0[cut], whole.noise[cut], whole.sigma[cut], whole.weight[cut], whole.prompt_embeds[cut])


def gradient(frozen: Frozen, attached: Attached, data: Batch, differential: float | None = None) -> torch.Tensor:
    grads = torch.autograd.grad(sft_loss(frozen.model, data, differential).objective, attached.parameters())
    return torch.cat([grad.flatten() for grad in grads])


def test_the_loss_is_the_weighted_mean_square_of_an_independent_calculation():
    frozen, _ = trainable()
    data = batch(3)
    total = 0.0
    for index in range(3):
        sigma = float(data.sigma[index])
        x = (1 - sigma) * data.x0[index].double() + sigma * data.noise[index].double()
        with torch.no_grad():
            raw = frozen.model(
                [x.float().unsqueeze(1)], torch.tensor([1 - sigma]), [data.prompt_embeds[index]], return_dict=False
            )[0][0]
        # The model predicts x0 - noise.
        error = raw.squeeze(1).double() - (data.x0[index].double() - data.noise[index].double())
        total += float(data.weight[index]) * float((error**2).mean())
    assert float(sft_loss(frozen.model, data, None).objective.detach()) == pytest.approx(total / 3, rel=1e-5)


def test_the_gradient_of_a_batch_is_the_mean_of_single_gradients_with_captions_of_any_length():
    frozen, attached = trainable()
    data = batch(4)
    together = gradient(frozen, attached, data)
    apart = torch.stack([gradient(frozen, attached, single(data, index)) for index in range(4)]).mean(dim=0)
    assert float((together - apart).norm() / apart.norm()) < 1e-4


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_differential_guidance_makes_the_gradient_exactly_that_much_larger(scale: float):
    frozen, attached = trainable()
    data = batch(2)
    plain, guided = gradient(frozen, attached, data), gradient(frozen, attached, data, scale)
    assert torch.allclose(guided, scale * plain, rtol=1e-4, atol=1e-7)
    loss = sft_loss(frozen.model, data, scale)
    assert float(loss.objective.detach()) == pytest.approx(scale**2 * float(loss.plain), rel=1e-5)
    assert float(loss.plain) == pytest.approx(float(sft_loss(frozen.model, data, None).objective.detach()), rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_activations_changes_no_gradient(dropout: float):
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
            sft_loss(frozen.model, batch(1), None)
        return total

    assert saved_bytes(True) < saved_bytes(False) / 5


def test_lora_dropout_changes_training_and_not_sampling():
    frozen, attached = trainable(0.5)
    data = batch(1)
    torch.manual_seed(1)
    one = gradient(frozen, attached, data)
    torch.manual_seed(2)
    assert not torch.equal(gradient(frozen, attached, data), one)
    frozen.model.eval()
    first, second = (sft_loss(frozen.model, data, None).objective.detach() for _ in range(2))
    assert torch.equal(first, second)
