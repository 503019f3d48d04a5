"""Steps to compare and to count: of the miniature, with numbers, and of the full model on the meta device."""

from dataclasses import replace

import torch
from diffusers import ZImageTransformer2DModel

from zimage_train import mini
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.lora import targets
from zimage_train.lora.layers import _inject, attach_lora
from zimage_train.models import checkpointing, transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import velocity

from counting import Live, with_flash

CPU = torch.device("cpu")
FULL = TransformerShape()


def trained(mode: str, kind: str | None = None, dropout: float = 0.0, streamed: int = 0):
    frozen = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU, kind, streamed)
    modules = targets.select_modules(["attention", "feed_forward"], frozen.shape.linears)
    attached = attach_lora(frozen.model, modules, 4, None, dropout, 1)
    for index, b in enumerate(attached.b.values()):
        b.data.normal_(generator=torch.Generator().manual_seed(index)).mul_(0.05)
    if mode != "none":
        frozen.model.enable_gradient_checkpointing(checkpointing.checkpoint_by_tokens(lambda tokens: mode, dropout > 0))
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
    found = [loss.detach(), *(tensor.clone() for tensor in attached.flat.split(attached.flat.grads).values())]
    attached.flat.zero_grad()
    return found


def counted_step(mode: str, side: int, layers: int, kind: str | None = None) -> tuple[Live, int, int]:
    """Forward and backward at the full width on the meta device: bytes of the weights, and kept after the forward."""
    shape = replace(FULL, n_layers=layers)
    model: ZImageTransformer2DModel = transformer.empty_transformer(shape, torch.bfloat16, kind)
    with torch.device("meta"):
        modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
        _inject(model, dict.fromkeys(modules, 16), 1.0, 0.0).flat.allocate_grads()
        model.train()
        model.enable_gradient_checkpointing(checkpointing.checkpoint_by_tokens(lambda tokens: mode, False))

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
