"""Forward and backward of a transformer block with its LoRA, written out: few kernels, and only named results are kept.

The block is diffusers' own module, with its weights; only the way from its input to its output is written here. A stage
is a matrix product for all layers with the same input, attention, or a region of `models.regions`. The forward runs the
stages in order and keeps what the recompute mode names; the backward runs the stages again whose results are missing.
So every mode computes the same bits.
"""

from collections.abc import Callable
from itertools import chain
from types import ModuleType
from typing import Any, cast

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from zimage_train.config.types import RecomputeMode
from zimage_train.lora.layers import ADAPTER_NAME, LoraLayers
from zimage_train.lora.products import find_product
from zimage_train.models import region_ops
from zimage_train.models.arch import BLOCK_PRODUCTS
from zimage_train.models.attention import AttentionKernel, bias_of, choose_kernel
from zimage_train.models.offload import BlockOffloader
from zimage_train.optim.flat import FlatParameters

PRODUCTS = frozenset({"q", "k", "v", "y_attention", "y_feed_forward"})
WIDE_PRODUCTS = frozenset({"u", "w"})
ATTENTION = frozenset({"attention", "attention_rest"})
SMALL = frozenset({"inner_qkv", "inner_out", "inner_up", "inner_down", "inverse_down"})
"""The inputs of every B, which have the LoRA's rank as their width, and an inverse RMS."""
NORMS = frozenset(
    {"h_attention", "inverse_in", "q_rotated", "k_rotated", "inverse_q", "inverse_k", "x_middle", "h_feed_forward"}
) | {"inverse_attention", "inverse_middle", "activated"}
INPUTS = frozenset({"bias", "rope", "scale_attention", "gate_attention", "scale_feed_forward", "gate_feed_forward"})
"""What is always kept: it is small, or shared by all blocks."""
KEPT: dict[RecomputeMode, frozenset[str]] = {
    "none": PRODUCTS | WIDE_PRODUCTS | ATTENTION | SMALL | NORMS,
    "elementwise": PRODUCTS | WIDE_PRODUCTS | ATTENTION | SMALL,
    "w1w3": PRODUCTS | ATTENTION | SMALL,
    "attention": ATTENTION | {"inverse_down"},
    "full": frozenset({"inverse_down"}),
}
"""The results of a block that its backward finds again, by mode, beside its input x and `INPUTS`."""

Tape = dict[str, Any]
"""The results of a block by name."""


class FusedBlock:
    """The way of a training step through a block, forward and backward.

    Args:
        enter: called with the block and whether its backward begins, before its weights are used.
        ops: the module with the functions of `models.regions`.
    """

    def __init__(
        self,
        name: str,
        block: ZImageTransformerBlock,
        flat: FlatParameters,
        enter: Callable[[nn.Module, bool], None],
        ops: ModuleType = region_ops,
    ) -> None:
        self.block: Any = block
        self.ops, self._enter = ops, enter
        self._loras = _loras_of(block)
        names = [factor for factor in flat.start if factor.startswith(name)]
        begin = min((flat.start[factor] for factor in names), default=0)
        self.products = [find_product(name, block, group, flat.start, begin) for group in BLOCK_PRODUCTS]
        numel = sum(product.rank * product.layers[0].in_features for product in self.products)
        for product in self.products:
            for layer, rank in zip(product.layers, product.ranks, strict=True):
                numel += layer.out_features * rank
        assert numel == sum(flat.views[factor].numel() for factor in names), f"{name} has factors that are not served"
        self.factors: Parameter | None = flat.leaf(begin, (numel,)) if numel else None
        """The LoRA of the block as a single parameter, whose memory is that of the factors."""

    def __call__(
        self, x: Tensor, mask: Tensor | None, rope: Tensor, adaln: Tensor | None, mode: RecomputeMode
    ) -> Tensor:
        """Return the output of the block for x (b, t, dim).

        Args:
            mask: (b, t), False for the tokens that pad a shorter sample; None if there are none.
            rope: (b, t, head dim / 2), complex.
            adaln: (b, adaln dim), or None in the context refiner.
            mode: what the backward computes again.
        """
        return cast(Tensor, _BlockFunction.apply(self, x, self.factors, mask, torch.view_as_real(rope), adaln, mode))

    @property
    def has_its_lora(self) -> bool:
        """Return whether the block has the LoRA that it had when it was fused, and it is not switched off.

        Previews put another LoRA in its place for a while (`lora.swap`).
        """
        if any(layer.disable_adapters for layer in self._loras):
            return False
        return [id(layer) for layer in _loras_of(self.block)] == [id(layer) for layer in self._loras]

    def run_forward(
        self, x: Tensor, factors: Tensor | None, mask: Tensor | None, rope: Tensor, adaln: Tensor | None
    ) -> Tape:
        """Return the results of all stages."""
        self._enter(self.block, False)
        bias = bias_of(mask, self.block.attention.heads, x.dtype)
        tape: Tape = {"x": x, "bias": bias, "rope": rope} | self._modulation(adaln)
        copies = x.new_empty(0) if factors is None else factors.to(x.dtype)
        for stage, _ in STAGES:
            stage(self, tape, copies)
        return tape

    def recompute(self, tape: Tape, copies: Tensor) -> None:
        """Run the stages of which results are missing on `tape`."""
        for stage, names in STAGES:
            if any(name not in tape for name in names):
                stage(self, tape, copies)

    def run_backward(self, tape: Tape, grad: Tensor, factors: Tensor | None, needs_x: bool):
        """Return the gradients of x and of the factors, for `grad` of the output; the tape is emptied on the way."""
        self._enter(self.block, True)
        block, ops = self.block, self.ops
        copies = grad.new_empty(0) if factors is None else factors.to(grad.dtype)
        self.recompute(tape, copies)
        out = torch.empty_like(copies)
        qkv, project, up, down = self.products
        # Results are taken off the tape where they are used for the last time, so that their memory is free at once.
        take = tape.pop

        gy = ops.gated_residual_backward(
            grad, take("y_feed_forward"), block.ffn_norm2.weight, tape["gate_feed_forward"], take("inverse_down")
        )
        ga = down.backward([gy], take("activated"), take("inner_down"), copies, out)
        del gy
        gu, gw = ops.swiglu_backward(ga, take("u"), take("w"))
        del ga
        gh = up.backward([gu, gw], take("h_feed_forward"), take("inner_up"), copies, out)
        del gu, gw
        gx, gy = ops.residual_norm_backward(
            grad,
            gh,
            take("x_middle"),
            take("y_attention"),
            block.attention_norm2.weight,
            tape["gate_attention"],
            block.ffn_norm1.weight,
            tape["scale_feed_forward"],
            take("inverse_attention"),
            take("inverse_middle"),
        )
        del gh, grad
        attended = tape["attention"]
        go = project.backward([gy], attended.flatten(2), take("inner_out"), copies, out)
        del gy
        assert go is not None
        rotated_q, rotated_k, v = take("q_rotated"), take("k_rotated"), take("v")
        kernel, rest = take("attention_rest")
        gq, gk, gv = kernel.backward(
            go.view(attended.shape).transpose(1, 2),
            rotated_q.transpose(1, 2),
            rotated_k.transpose(1, 2),
            v.transpose(1, 2),
            tape["bias"],
            take("attention").transpose(1, 2),
            rest,
        )
        del go, attended, rotated_q, rotated_k, v, rest
        gq, gk = ops.rotated_norm_backward(
            gq.transpose(1, 2),
            gk.transpose(1, 2),
            take("q"),
            take("k"),
            block.attention.norm_q.weight,
            block.attention.norm_k.weight,
            tape["rope"],
            take("inverse_q"),
            take("inverse_k"),
        )
        grads = [gq.flatten(2), gk.flatten(2), gv.transpose(1, 2).flatten(2)]
        del gq, gk, gv
        gh = qkv.backward(grads, take("h_attention"), take("inner_qkv"), copies, out, needs_x)
        del grads
        if gh is not None:
            gx = ops.modulated_norm_backward(
                gh, gx, tape["x"], block.attention_norm1.weight, tape["scale_attention"], take("inverse_in")
            )
        return (gx if needs_x else None), (None if factors is None else out)

    def _modulation(self, adaln: Tensor | None) -> Tape:
        names = ("scale_attention", "gate_attention", "scale_feed_forward", "gate_feed_forward")
        if adaln is None:
            return dict.fromkeys(names)
        values = list(self.block.adaLN_modulation(adaln).unsqueeze(1).chunk(4, dim=2))
        for index in (0, 2):
            values[index] = 1.0 + values[index]
        for index in (1, 3):
            values[index] = values[index].tanh()
        return dict(zip(names, values, strict=True))

    # The stages, in order. Each reads and writes the tape; `copies` are the factors in the dtype of x.

    def _norm_in(self, tape: Tape, copies: Tensor) -> None:
        norm = self.block.attention_norm1
        tape["h_attention"], tape["inverse_in"] = self.ops.modulated_norm(
            tape["x"], norm.weight, tape["scale_attention"], norm.eps
        )

    def _project_qkv(self, tape: Tape, copies: Tensor) -> None:
        outputs, tape["inner_qkv"] = self.products[0].forward(tape["h_attention"], copies)
        heads = self.block.attention.heads
        tape["q"], tape["k"], tape["v"] = (output.unflatten(-1, (heads, -1)) for output in outputs)

    def _rotate(self, tape: Tape, copies: Tensor) -> None:
        attention = self.block.attention
        tape["q_rotated"], tape["k_rotated"], tape["inverse_q"], tape["inverse_k"] = self.ops.rotated_norm(
            tape["q"], tape["k"], attention.norm_q.weight, attention.norm_k.weight, tape["rope"], attention.norm_q.eps
        )

    def _attend(self, tape: Tape, copies: Tensor) -> None:
        q, k, v = (tape[name].transpose(1, 2) for name in ("q_rotated", "k_rotated", "v"))
        kernel: AttentionKernel = choose_kernel(q, k, v, tape["bias"])
        result, rest = kernel.forward(q, k, v, tape["bias"])
        tape["attention"], tape["attention_rest"] = result.transpose(1, 2), (kernel, rest)

    def _project_attention(self, tape: Tape, copies: Tensor) -> None:
        (tape["y_attention"],), tape["inner_out"] = self.products[1].forward(tape["attention"].flatten(2), copies)

    def _norm_middle(self, tape: Tape, copies: Tensor) -> None:
        block = self.block
        tape["x_middle"], tape["h_feed_forward"], tape["inverse_attention"], tape["inverse_middle"] = (
            self.ops.residual_norm(
                tape["x"],
                tape["y_attention"],
                block.attention_norm2.weight,
                tape["gate_attention"],
                block.ffn_norm1.weight,
                tape["scale_feed_forward"],
                block.ffn_norm1.eps,
            )
        )

    def _project_up(self, tape: Tape, copies: Tensor) -> None:
        (tape["u"], tape["w"]), tape["inner_up"] = self.products[2].forward(tape["h_feed_forward"], copies)

    def _activate(self, tape: Tape, copies: Tensor) -> None:
        tape["activated"] = self.ops.swiglu(tape["u"], tape["w"])

    def _project_down(self, tape: Tape, copies: Tensor) -> None:
        (tape["y_feed_forward"],), tape["inner_down"] = self.products[3].forward(tape["activated"], copies)

    def _add(self, tape: Tape, copies: Tensor) -> None:
        norm = self.block.ffn_norm2
        tape["output"], tape["inverse_down"] = self.ops.gated_residual(
            tape["x_middle"], tape["y_feed_forward"], norm.weight, tape["gate_feed_forward"], norm.eps
        )


STAGES: tuple[tuple[Callable[[FusedBlock, Tape, Tensor], None], tuple[str, ...]], ...] = (
    (FusedBlock._norm_in, ("h_attention", "inverse_in")),
    (FusedBlock._project_qkv, ("q", "k", "v", "inner_qkv")),
    (FusedBlock._rotate, ("q_rotated", "k_rotated", "inverse_q", "inverse_k")),
    (FusedBlock._attend, ("attention", "attention_rest")),
    (FusedBlock._project_attention, ("y_attention", "inner_out")),
    (FusedBlock._norm_middle, ("x_middle", "h_feed_forward", "inverse_attention", "inverse_middle")),
    (FusedBlock._project_up, ("u", "w", "inner_up")),
    (FusedBlock._activate, ("activated",)),
    (FusedBlock._project_down, ("y_feed_forward", "inner_down")),
    (FusedBlock._add, ("inverse_down",)),
)
"""The stages in order, with the results that the backward needs."""


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: FusedBlock,
        x: Tensor,
        factors: Tensor | None,
        mask: Tensor | None,
        rope: Tensor,
        adaln: Tensor | None,
        mode: RecomputeMode,
    ) -> Tensor:
        tape = block.run_forward(x, factors, mask, rope, adaln)
        output = tape.pop("output")
        if any(ctx.needs_input_grad):
            ctx.block = block
            ctx.tape = {name: value for name, value in tape.items() if name in KEPT[mode] or name in INPUTS}
            # Inputs go through autograd, which would not free them otherwise.
            ctx.save_for_backward(x, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        x, factors = ctx.saved_tensors
        tape, ctx.tape = ctx.tape | {"x": x}, None  # once taken, the graph holds nothing of it
        gx, gfactors = ctx.block.run_backward(tape, grad_outputs[0].contiguous(), factors, ctx.needs_input_grad[1])
        return None, gx, gfactors, None, None, None, None


def fuse_blocks(
    model: ZImageTransformer2DModel,
    lora: LoraLayers,
    offloader: BlockOffloader | None,
    mode_of: Callable[[int], RecomputeMode],
    unfused: Callable[..., Tensor],
    ops: ModuleType = region_ops,
) -> None:
    """Run the blocks of `model` fused while gradients are enabled, in the mode that `mode_of` has for a batch's tokens.

    `unfused` runs what fused blocks do not serve: dropout, and a LoRA on the modulation.
    """
    enter = (lambda block, is_backward: None) if offloader is None else offloader.enter
    fused: dict[int, FusedBlock] = {}
    for name, module in model.named_modules():
        if isinstance(module, ZImageTransformerBlock) and is_served(module):
            fused[id(module)] = FusedBlock(f"{name}.", module, lora.flat, enter, ops)

    def run(block: nn.Module, x: Tensor, mask: Tensor | None, rope: Tensor, *modulation: Any) -> Tensor:
        served = fused.get(id(block))
        if served is None or not served.has_its_lora:
            return unfused(block, x, mask, rope, *modulation)
        return served(x, mask, rope, modulation[0] if modulation else None, mode_of(x.shape[0] * x.shape[1]))

    model.enable_gradient_checkpointing(run)


def _loras_of(block: nn.Module) -> list[LoraLayer]:
    return [layer for layer in map(block.get_submodule, chain(*BLOCK_PRODUCTS)) if isinstance(layer, LoraLayer)]


def is_served(block: nn.Module) -> bool:
    """Return whether a block can be fused: its LoRA is on attention and feed forward alone, without dropout."""
    products = set(chain.from_iterable(BLOCK_PRODUCTS))
    for name, module in block.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        has_dropout = not isinstance(module.lora_dropout[ADAPTER_NAME], nn.Identity)
        if name not in products or has_dropout:
            return False
    return True
