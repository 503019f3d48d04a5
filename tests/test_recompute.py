"""Recomputation: every mode keeps what it says, frees what it says, and changes no number."""

from dataclasses import replace

import pytest
import torch
from counting import Live, with_flash
from diffusers import ZImageTransformer2DModel

from zimage_train import mini
from zimage_train.config.values import RECOMPUTE_MODES, RecomputeMode
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.lora import targets
from zimage_train.lora.layers import _inject, attach_lora
from zimage_train.models import checkpointing, transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import velocity

CPU = torch.device("cpu")


def trained(mode: str, kind: str | None = None, dropout: float = 0.0, streamed: int = 0):
    frozen = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU, kind, streamed)
    modules = targets.select_modules(["attention", "feed_forward"], frozen.shape.linears)
    attached = attach_lora(frozen.model, modules, 4, None, dropout, 1)
    for index, b in enumerate(attached.b.values()):
        b.data.normal_(generator=torch.Generator().manual_seed(index)).mul_(0.05)
    if mode != "none":
        frozen.model.enable_gradient_checkpointing(checkpointing.by_tokens(lambda tokens: mode, dropout > 0))
    return frozen, attached


def gradients(frozen, attached, captions: tuple[int, ...] = (5, 40)) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    frozen.model.train()
    torch.manual_seed(6)
    x = torch.randn(len(captions), 16, 8, 8, generator=draw)
    prompts = [torch.randn(length, frozen.shape.cap_feat_dim, generator=draw) for length in captions]
    prediction = velocity(frozen.model, x, torch.rand(len(captions), generator=draw), prompts)
    loss = prediction.square().mean()
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in attached.parameters())]
    for parameter in attached.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", RECOMPUTE_MODES[1:])
def test_loss_and_gradients_are_the_same_bits(mode: str, dropout: float):
    wanted = gradients(*trained("none", dropout=dropout))
    found = gradients(*trained(mode, dropout=dropout))
    assert wanted[1].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_the_mode_follows_the_tokens_of_the_batch():
    asked: list[int] = []

    def mode_of(tokens: int) -> RecomputeMode:
        asked.append(tokens)
        return "full"

    frozen, attached = trained("none")
    frozen.model.enable_gradient_checkpointing(checkpointing.by_tokens(mode_of, False))
    gradients(frozen, attached)
    image, caption = 32, 64  # 4 x 4 patches and the longer of two captions, each padded to a multiple of 32
    assert set(asked) - {2 * image, 2 * caption} == {2 * (image + caption)}  # the rest are the refiners


FULL = TransformerShape()
KEPT_PER_TOKEN = {
    "elementwise": 7 * 3840 + 2 * 10240,  # input, q, k, v, attention, its projection, w2; w1 and w3
    "w1w3": 7 * 3840,
    "attention": 2 * 3840,
    "full": 3840,
}
"""Numbers in bf16 by the list in the module's docstring; attention's row sums come on top, 4 bytes a head."""


def step(mode: str, side: int, layers: int, kind: str | None = None) -> tuple[Live, int, int]:
    """Forward and backward at the full width on the meta device: bytes of the weights, and kept after the forward."""
    shape = replace(FULL, n_layers=layers)
    model: ZImageTransformer2DModel = transformer.empty_transformer(shape, torch.bfloat16, kind)
    with torch.device("meta"):
        modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
        _inject(model, dict.fromkeys(modules, 16), 1.0, 0.0)
        model.train()
        model.enable_gradient_checkpointing(checkpointing.by_tokens(lambda tokens: mode, False))

        def run() -> tuple[Live, int, int]:
            with Live() as live:
                for parameter in model.parameters():
                    live.watch(parameter)
                weights = live.now
                x, prompt = torch.empty(1, 16, side // 8, side // 8), torch.empty(64, 2560, dtype=torch.bfloat16)
                loss = velocity(model, x, torch.empty(1), [prompt]).square().mean()
                kept = live.now - weights
                loss.backward()
            return live, weights, kept

        return with_flash(run)


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("mode", RECOMPUTE_MODES[1:])
def test_a_block_of_the_full_model_keeps_what_the_mode_names_and_nothing_else(mode: str, side: int):
    tokens = (side // 16) ** 2 + 64
    kept = step(mode, side, 3)[2] - step(mode, side, 2)[2]
    row_sums = 0 if mode == "full" else 4 * FULL.n_heads * tokens
    wanted = 2 * KEPT_PER_TOKEN[mode] * tokens + row_sums
    assert kept == pytest.approx(wanted, rel=0.005)
