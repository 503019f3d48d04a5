"""Steps to compare and to count: of the miniature, with numbers, and of the full model on the meta device."""

from dataclasses import replace
from types import ModuleType

import torch

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.lora import fused_block, targets
from zimage_train.lora.adapters import attach_adapter
from zimage_train.measure.counting import CountedStep, count_step, our_model
from zimage_train.models import checkpointing, region_ops
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import velocity

CPU = torch.device("cpu")
FULL = TransformerShape()


def trained(
    mode: str,
    kind: str | None = None,
    dropout: float = 0.0,
    streamed: int = 0,
    dtype: str = "fp32",
    groups: tuple[str, ...] = ("attention", "feed_forward"),
    lora: LoraSettings | None = None,
):
    """A step of the miniature whose blocks are fused where that is possible, and a LoRA that is not zero."""
    frozen, attached = unfused("none", kind, dropout, streamed, dtype, groups, lora)
    by_tokens = checkpointing.checkpoint_by_tokens(lambda tokens: mode, dropout > 0)
    fused_block.fuse_blocks(frozen.model, attached, frozen.offloader, lambda tokens: mode, by_tokens)
    return frozen, attached


def unfused(
    mode: str,
    kind: str | None = None,
    dropout: float = 0.0,
    streamed: int = 0,
    dtype: str = "fp32",
    groups: tuple[str, ...] = ("attention", "feed_forward"),
    lora: LoraSettings | None = None,
):
    """The same step, in which each block is diffusers' module."""
    frozen = load_frozen(mini.TURBO / "transformer", None, dtype, CPU, kind, streamed)
    kinds = [group for group in groups if "." not in group]
    modules = targets.select_modules(kinds, frozen.shape.linears) if kinds else []
    endings = tuple(group for group in groups if "." in group) or ("none",)
    modules += [name for name in frozen.shape.linears if name.startswith("layers.") and name.endswith(endings)]
    attached = attach_adapter(frozen.model, lora or LoraSettings(rank=4, dropout=dropout), modules, 1)
    zeros = (".B", ".w2", ".w2_b", ".gain", ".above")
    last = [view for name, view in attached.flat.views.items() if name.endswith(zeros)]
    for index, view in enumerate(last):
        view.data.normal_(generator=torch.Generator().manual_seed(index)).mul_(0.05)
    if mode != "none":
        frozen.model.enable_gradient_checkpointing(checkpointing.checkpoint_by_tokens(lambda tokens: mode, dropout > 0))
    return frozen, attached


def gradients(
    frozen, attached, captions: tuple[int, ...] = (5, 40), size: tuple[int, int] = (8, 8), seed: int = 5
) -> list[torch.Tensor]:
    """The loss and the gradient of every factor."""
    loss = loss_of(frozen, captions, size, seed)
    loss.backward()
    found = [loss.detach(), *(tensor.clone() for tensor in attached.flat.split(attached.flat.grads).values())]
    attached.flat.zero_grad()
    return found


def loss_of(frozen, captions: tuple[int, ...] = (5, 40), size: tuple[int, int] = (8, 8), seed: int = 5) -> torch.Tensor:
    """The loss; captions of different lengths are padded, and need a mask."""
    draw = torch.Generator().manual_seed(seed)
    frozen.model.train()
    torch.manual_seed(6)
    x = torch.randn(len(captions), 16, *size, generator=draw)
    dtype = frozen.model.dtype
    prompts = [torch.randn(length, frozen.shape.cap_feat_dim, generator=draw).to(dtype) for length in captions]
    prediction = velocity(frozen.model, x, torch.rand(len(captions), generator=draw), prompts)
    return prediction.square().mean()


def counted_step(
    mode: str,
    side: int,
    layers: int,
    kind: str | None = None,
    ops: ModuleType | None = region_ops,
    lora: LoraSettings | None = None,
) -> CountedStep:
    """The work of a step at the full width; without `ops`, of diffusers' blocks."""
    return count_step(our_model(replace(FULL, n_layers=layers), mode, kind, ops=ops, lora=lora), side)
