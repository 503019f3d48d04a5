"""Prediction of the memory that a training run takes, from sizes alone (torch-free).

The constants were counted on the real graph at full width, on the meta device, storage by storage;
tests/planning/test_memory.py counts again and allows 5 %. Attention is taken as fused, so it keeps no matrix of
tokens by tokens. Activations are proportional to tokens and to `dim`, so most constants are bytes per token and unit
of `dim`.
"""

import math
from dataclasses import dataclass
from functools import cache

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.types import Quantization, RecomputeMode
from zimage_train.io.dtypes import bytes_per_number
from zimage_train.models.arch import (
    IN_A_BLOCK,
    TransformerShape,
    image_tokens,
    padded_tokens,
    scale_block_size,
)
from zimage_train.models.pinned_memory import DEVICE_SLOTS, pinned_bytes
from zimage_train.planning.recompute_costs import recompute_costs
from zimage_train.planning.workload import VAE_CHANNELS, Workload, caption_tokens

FORWARD_BYTES = {"bf16": 31.9, "fp32": 63.3}
"""Peak of a forward pass that keeps nothing for a backward, as in sampling and validation, per token and `dim`."""
DECODING_BYTES = {"bf16": 1536, "fp32": 3073}
"""Bytes per pixel at the peak of decoding an image, for a VAE of `VAE_CHANNELS`."""
VAE_WEIGHTS = 83_820_000
"""Number of parameters of the published VAE."""
QUANTIZED_BITS = {"fp8": 8, "fp8_fast": 8, "int8": 8, "nf4": 4}
SCALE_BYTES = 2
"""Scales of quantised weights are bf16."""
CONTEXT_BYTES = 500_000_000
"""Memory that CUDA and its libraries take for themselves; an estimate, which no run has measured."""
WORKSPACE_BYTES = 64 << 20
"""Workspaces of cuBLAS, and segments of the allocator for small tensors."""
GAP_BYTES = {True: 13, False: 125}
"""What the allocator holds in a step and cannot use, in bytes per token and `dim`: where blocks are fused, and not.

From a model of the allocator that replays steps of the full model; tests/planning/test_allocator.py does it again.
"""
PREVIEW_GAPS = 0.25
"""The same in a preview, as a share of its activations."""
UNCONFIRMED = 0.02
"""Share of what is allocated that is kept free until a GPU has confirmed the gaps."""
MAX_CPU_PARAMETERS = 1_000_000_000
"""Largest model that is trained on a CPU: the miniature passes, the published models would take weeks."""


@dataclass(frozen=True)
class WeightPlacement:
    """How and where the frozen transformer is stored."""

    quantization: Quantization | None = None
    """None: the weights keep the dtype of the model."""
    streamed: int = 0
    """Number of blocks in main memory, which are copied to the device when they are needed."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes on the device at the peak of a training step, a preview or a validation."""

    weights: int
    """The frozen transformer."""
    lora: int
    """The LoRA with gradient, optimizer state and EMA."""
    activations: int
    context: int
    """CUDA, workspaces and gaps between what is allocated; 0 without a GPU."""

    @property
    def allocated(self) -> int:
        """Return the bytes that torch's allocator hands out, the part that a run can measure."""
        return self.weights + self.lora + self.activations

    @property
    def total(self) -> int:
        return self.allocated + self.context


def step_memory(workload: Workload, placement: WeightPlacement, mode: RecomputeMode, tokens: int) -> MemoryEstimate:
    """Return the peak of forward and backward on a batch of `tokens` tokens in all."""
    costs = recompute_costs(workload.is_fused)
    kept, kept_by_none = (costs[name].kept_bytes[workload.dtype] for name in (mode, "none"))
    # The peak is at the start of the backward, in the last block: all other blocks hold what the mode keeps. The last
    # block has been recomputed, so it holds what `none` keeps, and the gradients of the backward on top.
    per_token = workload.shape.n_layers * kept + kept_by_none - kept + costs[mode].backward_bytes[workload.dtype]
    activations = int(per_token * workload.shape.dim * tokens)
    costs_of_kind, blocks = workload.module_costs, workload.shape.n_layers if mode == "none" else 1
    numbers = costs_of_kind.dense + blocks * costs_of_kind.kept * tokens
    activations += numbers * bytes_per_number(workload.dtype)
    return _with_weights(workload, placement, activations, gap_bytes(workload, tokens))


def gap_bytes(workload: Workload, tokens: int) -> int:
    """Return the bytes of a step on `tokens` tokens that the allocator holds and cannot use."""
    per_token = GAP_BYTES[workload.is_fused] * bytes_per_number(workload.dtype) // 2
    return per_token * workload.shape.dim * tokens


def max_tokens_within(workload: Workload, placement: WeightPlacement, mode: RecomputeMode, limit_bytes: float) -> int:
    """Return the tokens of the largest batch whose step fits `limit_bytes`; 0 if none does."""
    # Memory is linear in tokens. The slope is taken over 1000 of them, so that rounding to whole bytes is negligible.
    fixed = step_memory(workload, placement, mode, 0).total
    per_thousand = step_memory(workload, placement, mode, 1000).total - fixed
    return max(int((limit_bytes - fixed) * 1000 / max(per_thousand, 1)), 0)


def preview_memory(workload: Workload, placement: WeightPlacement) -> MemoryEstimate:
    """Return the peak of the largest preview, in sampling or in decoding, or of a validation if that takes more."""
    bytes_per_token = FORWARD_BYTES[workload.dtype] * workload.shape.dim
    sampling = decoding = 0.0
    if workload.held_out is not None:
        tokens = image_tokens(workload.held_out.width, workload.held_out.height)
        sampling = bytes_per_token * (tokens + padded_tokens(workload.caption_tokens))
    for request in (*workload.previews, *workload.generated):
        # With guidance the prompt and the negative prompt form a single batch, padded to the longer of the two.
        uses_guidance = request.guidance > 0
        batch = workload.previews_at_once * (2 if uses_guidance else 1)
        longest_prompt = max(request.prompt, request.negative if uses_guidance else "", key=len)
        tokens = image_tokens(request.width, request.height) + padded_tokens(caption_tokens(longest_prompt))
        sampling = max(sampling, bytes_per_token * tokens * batch)
        # Images are decoded one at a time, whatever was sampled together.
        relative_width = workload.vae_channels / VAE_CHANNELS
        decoding = max(decoding, DECODING_BYTES[workload.dtype] * relative_width * request.width * request.height)
    sampling += workload.preview_lora_bytes
    if workload.gpu and workload.previews:
        # The VAE is on the device while it decodes, and not during training.
        decoding += VAE_WEIGHTS * bytes_per_number(workload.dtype)
    activations = int(max(sampling, decoding))
    return _with_weights(workload, placement, activations, int(PREVIEW_GAPS * activations))


def _with_weights(workload: Workload, placement: WeightPlacement, activations: int, gaps: int) -> MemoryEstimate:
    """Return the estimate for `activations` bytes and `gaps`, with the frozen weights, the LoRA and the context."""
    weights = device_bytes(workload, placement)
    optimizer = OPTIMIZERS[workload.optimizer]
    # Per LoRA parameter: the fp32 weight, its fp32 gradient, the optimizer's state, and the fp32 copy of the EMA. The
    # temporaries of an update cannot have the memory of the activations, which captured steps keep.
    bytes_per_parameter = 4 + 4 + optimizer.state_bytes + optimizer.update_bytes + 4 * workload.ema
    lora = int(workload.trained * (bytes_per_parameter + bytes_per_number(workload.dtype) * workload.pissa))
    context = 0
    if workload.gpu:
        context = int(CONTEXT_BYTES + WORKSPACE_BYTES + gaps + UNCONFIRMED * (weights + lora + activations))
    return MemoryEstimate(weights, lora, activations, context)


def device_bytes(workload: Workload, placement: WeightPlacement) -> int:
    """Return the bytes of frozen weights on the device: the blocks that stay, and the slots that streamed ones use.

    A quantised model also has memory for its largest layer, unpacked.
    """
    # Every slot is allocated even if fewer blocks are streamed, so this can be negative.
    absent_blocks = placement.streamed - DEVICE_SLOTS if placement.streamed else 0
    quantization = placement.quantization
    scratch = 0 if quantization is None else _largest_layer(workload.shape) * bytes_per_number(workload.dtype)
    return model_bytes(workload, quantization) + scratch - absent_blocks * block_bytes(workload, quantization)


def host_bytes(workload: Workload, placement: WeightPlacement) -> int:
    """Return the bytes of streamed blocks in main memory, with the rounding of pinned memory if there is a GPU."""
    block = block_bytes(workload, placement.quantization)
    return pinned_bytes(placement.streamed, block) if workload.gpu else placement.streamed * block


def model_bytes(workload: Workload, quantization: Quantization | None) -> int:
    """Return the bytes of the whole frozen transformer."""
    return _parameter_bytes(workload.shape, workload.dtype, quantization, "")


def block_bytes(workload: Workload, quantization: Quantization | None) -> int:
    """Return the bytes of a block in the transformer's `layers`, which are the blocks that can be streamed."""
    return _parameter_bytes(workload.shape, workload.dtype, quantization, "layers.0.")


@cache  # the planner needs the same few values for every placement, batch and mode
def _parameter_bytes(shape: TransformerShape, dtype: str, quantization: Quantization | None, prefix: str) -> int:
    names = [name for name in shape.parameters if name.startswith(prefix)]
    return sum(_tensor_bytes(shape, dtype, name, quantization) for name in names)


@cache
def _largest_layer(shape: TransformerShape) -> int:
    """Return the number of weights of the largest linear layer in a block."""
    return max(outputs * inputs for name, (outputs, inputs) in shape.linears.items() if IN_A_BLOCK.match(name))


def _tensor_bytes(shape: TransformerShape, dtype: str, name: str, quantization: Quantization | None) -> int:
    size = shape.parameters[name]
    if quantization is None or len(size) != 2 or not IN_A_BLOCK.match(name):
        return parameter_count(size) * bytes_per_number(dtype)
    rows, columns = size
    if quantization == "fp8_fast":  # a single scale in fp32
        return rows * columns + 4
    scales = rows * columns // scale_block_size(columns)
    return rows * columns * QUANTIZED_BITS[quantization] // 8 + scales * SCALE_BYTES


def parameters_of(shape: TransformerShape) -> int:
    """Return the number of parameters of the transformer."""
    return sum(parameter_count(size) for size in shape.parameters.values())


def parameter_count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of `shape`."""
    return math.prod(shape)
