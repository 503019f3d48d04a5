"""Forward and backward of a transformer block with its LoRA, written out: few kernels, and only named results are kept.

The block is diffusers' own module, with its weights; only the way from its input to its output is written here. A stage
is a matrix product for all layers with the same input, attention, or a region of `models.regions`. The forward runs the
stages in order and keeps what the recompute mode names; the backward runs the stages again whose results are missing.
So every mode computes the same bits.
"""

import operator
from collections.abc import Callable, Hashable
from itertools import chain
from types import ModuleType
from typing import Any, cast

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from zimage_train.config.types import RecomputeMode
from zimage_train.lora.kronecker import KroneckerLinear
from zimage_train.lora.layers import AdapterLayers, TrainedLinear
from zimage_train.lora.products import Product, find_product
from zimage_train.lora.tape import IN_BUFFER, INPUTS, KEPT, Layout, Tape
from zimage_train.models import region_ops
from zimage_train.models.arch import BLOCK_PRODUCTS
from zimage_train.models.attention import AttentionKernel, bias_of, choose_kernel
from zimage_train.models.offload import BlockOffloader
from zimage_train.optim.flat import FlatParameters


class FusedBlock:
    """The way of a training step through a block, forward and backward.

    Args:
        enter: called with the block and whether its backward begins, before its weights are used.
        layouts: of the buffers by shape, shared by all blocks; the first forward of a shape adds its own.
        ops: the module with the functions of `models.regions`.
    """

    def __init__(
        self,
        name: str,
        block: ZImageTransformerBlock,
        flat: FlatParameters,
        enter: Callable[[nn.Module, bool], None],
        layouts: dict[Hashable, Layout],
        ops: ModuleType = region_ops,
    ) -> None:
        self.block: Any = block
        self.ops, self._enter, self._layouts = ops, enter, layouts
        self._loras = _loras_of(block)
        names = [factor for factor in flat.start if factor.startswith(name)]
        begin = min((flat.start[factor] for factor in names), default=0)
        self.products = [find_product(name, block, group, flat.start, begin) for group in BLOCK_PRODUCTS]
        numel = sum(product.numel for product in self.products)
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
        now = _loras_of(self.block)
        return len(now) == len(self._loras) and all(map(operator.is_, now, self._loras))

    def run_forward(
        self,
        x: Tensor,
        factors: Tensor | None,
        mask: Tensor | None,
        rope: Tensor,
        adaln: Tensor | None,
        mode: RecomputeMode | None,
    ) -> Tape:
        """Return the results of all stages, those that `mode` keeps in one buffer; None: nothing is kept."""
        self._enter(self.block, False)
        key = (x.shape, x.dtype, mode, *(product.rank for product in self.products))
        tape = Tape(x.device, self._layouts.get(key))
        tape |= {"x": x, "bias": bias_of(mask, self.block.attention.heads, x.dtype), "rope": rope}
        tape |= self._modulation(adaln)
        copies = x.new_empty(0) if factors is None else factors.to(x.dtype)
        for stage, _ in STAGES:
            stage(self, tape, copies)
        if mode is not None and key not in self._layouts:
            self._layouts[key] = tape.layout_of(IN_BUFFER[mode])
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

        gy = torch.empty_like(grad)
        ops.gated_residual_backward(
            grad, take("y_feed_forward"), block.ffn_norm2.weight, tape["gate_feed_forward"], take("inverse_down"), gy=gy
        )
        ga = down.backward([gy], take("activated"), take("inner_down"), copies, out)
        assert ga is not None
        del gy
        gu, gw = torch.empty_like(ga), torch.empty_like(ga)
        ops.swiglu_backward(ga, take("u"), take("w"), gu=gu, gv=gw)
        del ga
        gh = up.backward([gu, gw], take("h_feed_forward"), take("inner_up"), copies, out)
        del gu, gw
        gx, gy = torch.empty_like(grad), torch.empty_like(grad)
        ops.residual_norm_backward(
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
            out=gx,
            gy=gy,
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
        q, k = take("q"), take("k")
        turned_gq, turned_gk, gq, gk = gq, gk, torch.empty_like(q), torch.empty_like(k)
        ops.rotated_norm_backward(
            turned_gq.transpose(1, 2),
            turned_gk.transpose(1, 2),
            q,
            k,
            block.attention.norm_q.weight,
            block.attention.norm_k.weight,
            tape["rope"],
            take("inverse_q"),
            take("inverse_k"),
            gq=gq,
            gk=gk,
        )
        grads = [gq.flatten(2), gk.flatten(2), gv.transpose(1, 2).flatten(2)]
        del gq, gk, gv, turned_gq, turned_gk, q, k
        gh = qkv.backward(grads, take("h_attention"), take("inner_qkv"), copies, out, needs_x)
        del grads
        if gh is not None:
            ops.modulated_norm_backward(
                gh, gx, tape["x"], block.attention_norm1.weight, tape["scale_attention"], take("inverse_in"), out=gx
            )
        grad_factors = None if factors is None else out
        return (gx if needs_x else None), grad_factors

    def _modulation(self, adaln: Tensor | None) -> dict[str, Tensor | None]:
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
        norm, x = self.block.attention_norm1, tape["x"]
        h, inverse = tape.new("h_attention", x.shape, x.dtype), tape.new_inverse("inverse_in", x)
        self.ops.modulated_norm(x, norm.weight, tape["scale_attention"], norm.eps, h=h, inverse=inverse)

    def _project_qkv(self, tape: Tape, copies: Tensor) -> None:
        self._project(self.products[0], tape, tape["h_attention"], "inner_qkv", ("q", "k", "v"), copies)
        heads = self.block.attention.heads
        for name in ("q", "k", "v"):
            tape[name] = tape[name].unflatten(-1, (heads, -1))

    def _rotate(self, tape: Tape, copies: Tensor) -> None:
        attention, q, k = self.block.attention, tape["q"], tape["k"]
        self.ops.rotated_norm(
            q,
            k,
            attention.norm_q.weight,
            attention.norm_k.weight,
            tape["rope"],
            attention.norm_q.eps,
            q_rotated=tape.new("q_rotated", q.shape, q.dtype),
            k_rotated=tape.new("k_rotated", k.shape, k.dtype),
            q_inverse=tape.new_inverse("inverse_q", q),
            k_inverse=tape.new_inverse("inverse_k", k),
        )

    def _attend(self, tape: Tape, copies: Tensor) -> None:
        q, k, v = (tape[name].transpose(1, 2) for name in ("q_rotated", "k_rotated", "v"))
        kernel: AttentionKernel = choose_kernel(q, k, v, tape["bias"])
        result, rest = kernel.forward(q, k, v, tape["bias"])
        tape.put("attention", result.transpose(1, 2))
        tape["attention_rest"] = (kernel, rest)

    def _project_attention(self, tape: Tape, copies: Tensor) -> None:
        attended = tape["attention"].flatten(2)
        self._project(self.products[1], tape, attended, "inner_out", ("y_attention",), copies)

    def _norm_middle(self, tape: Tape, copies: Tensor) -> None:
        block, x = self.block, tape["x"]
        self.ops.residual_norm(
            x,
            tape["y_attention"],
            block.attention_norm2.weight,
            tape["gate_attention"],
            block.ffn_norm1.weight,
            tape["scale_feed_forward"],
            block.ffn_norm1.eps,
            summed=tape.new("x_middle", x.shape, x.dtype),
            h=tape.new("h_feed_forward", x.shape, x.dtype),
            inverse=tape.new_inverse("inverse_attention", x),
            next_inverse=tape.new_inverse("inverse_middle", x),
        )

    def _project_up(self, tape: Tape, copies: Tensor) -> None:
        self._project(self.products[2], tape, tape["h_feed_forward"], "inner_up", ("u", "w"), copies)

    def _activate(self, tape: Tape, copies: Tensor) -> None:
        u = tape["u"]
        self.ops.swiglu(u, tape["w"], out=tape.new("activated", u.shape, u.dtype))

    def _project_down(self, tape: Tape, copies: Tensor) -> None:
        self._project(self.products[3], tape, tape["activated"], "inner_down", ("y_feed_forward",), copies)

    def _add(self, tape: Tape, copies: Tensor) -> None:
        norm, x = self.block.ffn_norm2, tape["x_middle"]
        self.ops.gated_residual(
            x,
            tape["y_feed_forward"],
            norm.weight,
            tape["gate_feed_forward"],
            norm.eps,
            summed=tape.new("output", x.shape, x.dtype),
            inverse=tape.new_inverse("inverse_down", x),
        )

    def _project(
        self, product: Product, tape: Tape, x: Tensor, inner: str, outputs: tuple[str, ...], copies: Tensor
    ) -> None:
        """Enter the `outputs` of a product of x, and the input of every B as `inner`."""
        tape[inner] = None
        if product.rank:
            tape.new(inner, (x.shape[0] * x.shape[1], product.rank), x.dtype)
        results = []
        for name, layer in zip(outputs, product.layers, strict=True):
            results.append(tape.new(name, (*x.shape[:-1], layer.out_features), x.dtype))
        product.forward(x, copies, results, tape[inner])


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
        has_backward = any(ctx.needs_input_grad)
        tape = block.run_forward(x, factors, mask, rope, adaln, mode if has_backward else None)
        output = tape.pop("output")
        if has_backward:
            ctx.block = block
            kept = Tape(x.device)
            for name, value in tape.items():
                if name in KEPT[mode] or name in INPUTS:
                    kept[name] = value
            ctx.tape = kept
            # Inputs go through autograd, which would not free them otherwise.
            ctx.save_for_backward(x, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        x, factors = ctx.saved_tensors
        tape, ctx.tape = ctx.tape, None  # once taken, the graph holds nothing of it
        tape["x"] = x
        gx, gfactors = ctx.block.run_backward(tape, grad_outputs[0].contiguous(), factors, ctx.needs_input_grad[1])
        return None, gx, gfactors, None, None, None, None


def fuse_blocks(
    model: ZImageTransformer2DModel,
    lora: AdapterLayers,
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
    layouts: dict[Hashable, Layout] = {}
    for name, module in model.named_modules():
        if isinstance(module, ZImageTransformerBlock) and is_served(module):
            fused[id(module)] = FusedBlock(f"{name}.", module, lora.flat, enter, layouts, ops)

    def run(block: nn.Module, x: Tensor, mask: Tensor | None, rope: Tensor, *modulation: Any) -> Tensor:
        served = fused.get(id(block))
        if served is None or not served.has_its_lora:
            return unfused(block, x, mask, rope, *modulation)
        return served(x, mask, rope, modulation[0] if modulation else None, mode_of(x.shape[0] * x.shape[1]))

    model.enable_gradient_checkpointing(run)


def _loras_of(block: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in map(block.get_submodule, chain(*BLOCK_PRODUCTS)) if isinstance(layer, BaseTunerLayer)]


def is_served(block: nn.Module) -> bool:
    """Return whether a block can be fused: a LoRA or LoKr on attention and feed forward alone, without dropout."""
    products = set(chain.from_iterable(BLOCK_PRODUCTS))
    for name, module in block.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, TrainedLinear | KroneckerLinear):
            return False
        draws_masks = isinstance(module, TrainedLinear) and module.draws_masks
        if name not in products or draws_masks:
            return False
    return True
