"""Selective activation checkpointing: which results of a block's forward are saved, and which are recomputed.

Modes, from most to least memory: `none` saves all that autograd asks for; `elementwise` saves the results of matrix
products and attention, and recomputes norms, gates and activations; `w1w3` also recomputes the two wide products of the
feed forward; `attention` saves attention alone; `full` saves the block's input only. All modes give the same numbers.
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

ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
}


def _policy(mode: RecomputeMode, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide whether the result of `op` is saved; torch's selective checkpointing asks this for every operation."""
    # Attention is always saved: its cost grows with the square of the tokens, its result only with the tokens.
    is_saved = op in ATTENTION_OPS
    if op is frozen_linear and mode in ("elementwise", "w1w3"):
        x, weight = args[:2]
        # w1 and w3 alone have more outputs than inputs; their results are 8/3 as wide as the others. A packed nf4
        # weight has half its columns, so the width comes from x.
        is_wide = weight.shape[0] > x.shape[-1]
        is_saved = mode == "elementwise" or not is_wide
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_by_tokens(mode_of: Callable[[int], RecomputeMode], preserve_rng: bool) -> Callable[..., Tensor]:
    """Return the function to pass to `enable_gradient_checkpointing`: the mode follows from the tokens of the batch.

    `preserve_rng` is needed for dropout alone, since nothing else in a block is random.
    """

    def run(block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        mode = mode_of(x.shape[0] * x.shape[1])
        # Below the first block with a LoRA there is no gradient to compute, and nothing to save for it.
        has_backward = x.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
        if mode == "none" or not has_backward:
            return block(x, *args)
        context_fn = noop_context_fn
        if mode != "full":
            context_fn = partial(create_selective_checkpoint_contexts, partial(_policy, mode))
        return checkpoint(
            block,
            x,
            *args,
            use_reentrant=False,
            context_fn=context_fn,
            preserve_rng_state=preserve_rng,
            determinism_check="none",
        )

    return run
