"""What a block keeps of its forward pass for the backward, and what it computes a second time there.

From the most memory to the least: `none` keeps all that autograd asks for; `elementwise` keeps what products and
attention make, and computes norms, gates and activations again; `w1w3` gives up the two wide products of the feed
forward as well; `attention` keeps attention alone; `full` keeps the block's input only. The numbers come out the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from zimage_train.config.types import RecomputeMode
from zimage_train.models.linear import frozen_linear

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
}


def _keeps(mode: RecomputeMode, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What torch's selective checkpointing asks about every operation of a block."""
    kept = op in ATTENTION
    if op is frozen_linear and mode in ("elementwise", "w1w3"):
        x, weight = args[:2]
        is_wide = weight.shape[0] > x.shape[-1]
        kept = mode == "elementwise" or not is_wide
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def by_tokens(mode_of: Callable[[int], RecomputeMode], preserve_rng: bool) -> Callable[..., Tensor]:
    """What `enable_gradient_checkpointing` of the transformer takes: the mode follows the tokens of the batch.

    `preserve_rng` is for dropout alone: nothing else in a block is random.
    """

    def run(block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        mode = mode_of(x.shape[0] * x.shape[1])
        has_backward = x.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
        if mode == "none" or not has_backward:
            return block(x, *args)
        kept = noop_context_fn
        if mode != "full":
            kept = partial(create_selective_checkpoint_contexts, partial(_keeps, mode))
        return checkpoint(
            block,
            x,
            *args,
            use_reentrant=False,
            context_fn=kept,
            preserve_rng_state=preserve_rng,
            determinism_check="none",
        )

    return run
