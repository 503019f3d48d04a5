"""Counts the work of a training step on the meta device, where nothing is computed: launches, bytes moved, bytes kept.

An operation that is not a view is a launch, and moves all its inputs and outputs. A region of a fused block is one
operation, as it is one kernel on a GPU. Matrix products and attention are counted apart, since arithmetic limits them
and not memory.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from zimage_train.config.lora import LoraSettings
from zimage_train.config.types import Quantization, RecomputeMode
from zimage_train.lora import fused_block, targets
from zimage_train.lora.adapters import attach_adapter
from zimage_train.models import checkpointing, linear, region_ops, transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.training.batches import Batch
from zimage_train.training.loss import sft_loss

RANK = 16
CAPTION_TOKENS = 64
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_scaled_mm"}
ATTENTION = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
"""Operations that allocate or describe memory, beside those whose result is a view."""

ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
MULTIPROCESSORS = 132
"""Of an H100. Other cards for this work have 60 to 170."""

Phase = Literal["forward", "backward", "optimizer"]


def _scaled_mm_on_meta(*args: Any, out: Tensor, **options: Any) -> Tensor:
    """Return `out`: torch computes products in fp8 into given memory on real devices only."""
    return out


torch.library.impl("aten::_scaled_mm.out", "Meta", _scaled_mm_on_meta)


@dataclass(frozen=True)
class Launch:
    """A kernel of a step."""

    phase: Phase
    name: str
    num_bytes: int
    """All that it reads and writes; an expanded dimension counts once."""

    @property
    def is_arithmetic(self) -> bool:
        return self.name in PRODUCTS or self.name in ATTENTION


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, now and at the most.

    A tensor that exists already counts once it is passed to `watch`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, num_bytes)

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.watch(tensor)
        if func is ATTENTION_BACKWARD:
            self.peak = max(self.peak, self.now + sum(attention_scratch(args[1])))
        return result


class CountedLaunches(LiveBytes):
    """Also records the launches; `phase` is that of the launches to come."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = "forward"
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear.frozen_linear:  # several kernels in one operation, so that checkpointing sees it as one
            with self:
                return linear.frozen_linear_kernels(*args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.rpartition("::")[2]
        if not _returns_view(func) and name not in NO_KERNEL:
            moved = [*_tensors((args, kwargs)), *_tensors(result)]
            self.launches.append(Launch(self.phase, name, sum(map(_moved_bytes, moved))))
        return result


def attention_scratch(q: Tensor) -> tuple[int, int]:
    """Return the bytes of what FlashAttention's backward in fixed order allocates for itself, for q (b, heads, t, d).

    It sums the gradient of q in as many buffers as there are multiprocessors for a head, and frees them at its end.
    """
    batch, heads, tokens, d = q.shape
    rows = -(-tokens // 128) * 128
    return 4 * batch * heads * rows, 4 * math.ceil(MULTIPROCESSORS / (batch * heads)) * batch * heads * rows * d


def _returns_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns if returned.alias_info is not None]
    return any(not alias.is_write for alias in aliases)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _moved_bytes(tensor: Tensor) -> int:
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


@contextmanager
def flash_attention() -> Iterator[None]:
    """Within the block, attention is a single operation, as on a GPU; on meta it would make a matrix of all tokens."""

    def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@dataclass(frozen=True)
class CountedStep:
    """The work of a step: its launches, and bytes at the end of the forward and at the peak."""

    launches: list[Launch]
    weight_bytes: int
    """The model with its LoRA and the LoRA's gradients, before the step."""
    kept_bytes: int
    """What the forward keeps for the backward."""
    peak_bytes: int
    """Bytes at the most, with those of the weights."""

    def select(self, *phases: Phase) -> "CountedStep":
        """Return the same with the launches of `phases` alone."""
        return replace(self, launches=[launch for launch in self.launches if launch.phase in phases])

    @property
    def moved_bytes(self) -> int:
        """Return the bytes that are moved outside matrix products and attention."""
        return sum(launch.num_bytes for launch in self.launches if not launch.is_arithmetic)


@dataclass(frozen=True)
class CountedModel:
    """A model on meta that is ready for a step, with what the optimizer does after it."""

    model: ZImageTransformer2DModel
    parameters: list[nn.Parameter]
    optimize: Callable[[], None] = field(default=lambda: None)


def our_model(
    shape: TransformerShape,
    mode: RecomputeMode,
    kind: Quantization | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ops: ModuleType | None = region_ops,
    lora: LoraSettings | None = None,
) -> CountedModel:
    """Return the model of a run, with an adapter on attention and feed forward: by default a LoRA of `RANK`.

    `ops` are the regions of its fused blocks, as one kernel each or as plain torch; None: its blocks are modules.
    """
    model = transformer.empty_transformer(shape, dtype, kind)
    transformer.allocate_transformer(model, torch.device("meta"))
    with torch.device("meta"):
        attached = attach_adapter(model, lora or LoraSettings(rank=RANK), _modules(shape), 0)
    unfused = checkpointing.checkpoint_by_tokens(lambda tokens: mode, False)
    model.enable_gradient_checkpointing(unfused)
    if ops is not None:
        fused_block.fuse_blocks(model, attached, None, lambda tokens: mode, unfused, ops)
    flat = attached.flat

    def optimize() -> None:
        flat.clip_grads(torch.linalg.vector_norm(flat.grads), 1.0)
        optimizer.step()
        averages.lerp_(flat.whole.detach(), 0.1)
        flat.zero_grad()

    with torch.device("meta"):
        optimizer = torch.optim.AdamW([flat.whole], foreach=True)
        averages = torch.empty_like(flat.whole)
    return CountedModel(model.train(), [flat.whole, *attached.parameters()], optimize)


def reference_model(shape: TransformerShape) -> CountedModel:
    """Return diffusers' model with peft's LoRA in bf16, as the usual training script has it."""
    with init_empty_weights():
        model = ZImageTransformer2DModel(**shape.config())
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_modules(shape), init_lora_weights=False)
    with torch.device("meta"):
        inject_adapter_in_model(config, model)
    parameters = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(torch.bfloat16)
            parameters.append(parameter)
    return CountedModel(model.train(), parameters)


def _modules(shape: TransformerShape) -> list[str]:
    return targets.select_modules(["attention", "feed_forward"], shape.linears)


def count_step(counted: CountedModel, side: int) -> CountedStep:
    """Count forward, backward and optimizer of a step on an image of `side` px with a caption of `CAPTION_TOKENS`."""
    with torch.device("meta"), flash_attention(), CountedLaunches() as counter:
        batch = Batch(
            x0=torch.empty(1, 16, side // 8, side // 8),
            noise=torch.empty(1, 16, side // 8, side // 8),
            sigma=torch.empty(1),
            weight=torch.empty(1),
            prompts=[torch.empty(CAPTION_TOKENS, 2560, dtype=counted.model.dtype)],
        )
        before = [*counted.model.parameters(), *counted.parameters]
        scratches = (getattr(module, "scratch", None) for module in counted.model.modules())
        before += [scratch for scratch in scratches if scratch is not None]
        for parameter in before:
            counter.watch(parameter)
            if parameter.grad is not None:
                counter.watch(parameter.grad)
        weight_bytes = counter.now
        counter.launches.clear()
        loss = sft_loss(counted.model, batch)
        kept_bytes = counter.now - weight_bytes
        counter.phase = "backward"
        loss.objective.backward()
        peak_bytes = counter.peak
        counter.phase = "optimizer"
        counted.optimize()
    return CountedStep(counter.launches, weight_bytes, kept_bytes, peak_bytes)


def comparison(sides: tuple[int, ...], shape: TransformerShape | None = None) -> dict[str, Any]:
    """Return the work of our step and of the reference by side; nothing is recomputed."""
    shape = shape or TransformerShape()
    rows = []
    for side in sides:
        ours, reference = count_step(our_model(shape, "none"), side), count_step(reference_model(shape), side)
        step, stock = ours.select("forward", "backward"), reference.select("forward", "backward")
        rows.append(
            {
                "side": side,
                "launches_ours": len(step.launches),
                "launches_reference": len(stock.launches),
                "bytes_ours": step.moved_bytes,
                "bytes_reference": stock.moved_bytes,
                "kept_ours": ours.kept_bytes,
                "kept_reference": reference.kept_bytes,
                "optimizer_launches_ours": len(ours.select("optimizer").launches),
                "optimizer_bytes_ours": ours.select("optimizer").moved_bytes,
            }
        )
    return {"rank": RANK, "caption_tokens": CAPTION_TOKENS, "dtype": "bf16", "counted": rows}
