"""Prediction of the memory that a training run takes, from sizes alone (torch-free).

The constants were counted on the real graph at full width, on the meta device, storage by storage;
tests/planning/test_memory.py counts again and allows 5 %. Attention is taken as fused, so it keeps no matrix of
tokens by tokens. Activations are proportional to tokens and to `dim`, so most constants are bytes per token and unit
of `dim`.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from zimage_train.config.lora import LoraSettings
from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName
from zimage_train.config.schema import Config
from zimage_train.config.slider import slider_passes
from zimage_train.config.types import Quantization, RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import SampleOrder, TrainItem
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io.dtypes import bytes_per_number
from zimage_train.lora.kronecker_shapes import KroneckerShape, shapes_of
from zimage_train.lora.module_shapes import NO_COSTS, ModuleCosts, module_costs, module_parameters
from zimage_train.lora.targets import ranks_of
from zimage_train.models.arch import (
    IN_A_BLOCK,
    MAX_PROMPT_TOKENS,
    TransformerShape,
    image_tokens,
    padded_tokens,
    scale_block_size,
)
from zimage_train.models.pinned_memory import DEVICE_SLOTS, pinned_bytes
from zimage_train.planning.recompute_costs import recompute_costs

FORWARD_BYTES = {"bf16": 31.9, "fp32": 63.3}
"""Peak of a forward pass that keeps nothing for a backward, as in sampling and validation, per token and `dim`."""
DECODING_BYTES = {"bf16": 1536, "fp32": 3073}
"""Bytes per pixel at the peak of decoding an image, for a VAE of `VAE_CHANNELS`."""
VAE_CHANNELS = 128
"""Width of the published VAE at full resolution."""
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
TEMPLATE_TOKENS = 16
"""Tokens of the chat template around a prompt, on the high side."""
BYTES_PER_TOKEN = 3
"""Lower bound on the bytes of UTF-8 per token of prose; English has more than 4."""


@dataclass(frozen=True)
class WeightPlacement:
    """How and where the frozen transformer is stored."""

    quantization: Quantization | None = None
    """None: the weights keep the dtype of the model."""
    streamed: int = 0
    """Number of blocks in main memory, which are copied to the device when they are needed."""


@dataclass(frozen=True)
class Workload:
    """The properties of a run that determine its memory and time."""

    shape: TransformerShape
    dtype: str
    trained: int
    """Number of parameters of the LoRA or LoKr."""
    optimizer: OptimizerName
    sizes: Counter[Bucket]
    """Number of items of each size in an epoch."""
    batch_size: int
    """Largest number of samples in a batch, unless `largest_batches` is given."""
    caption_tokens: int
    """Tokens of the longest caption, estimated from its length."""
    previews: tuple[SamplingRequest, ...]
    gpu: bool
    """Whether it runs on a GPU, which takes memory for CUDA and for fragmentation."""
    is_fused: bool = True
    """Whether the blocks of a step are fused; see `fuses_blocks`."""
    vae_channels: int = VAE_CHANNELS
    ema: bool = False
    pissa: bool = False
    """Whether the LoRA has as many fixed values as parameters, in `dtype`, and is exported with both."""
    extra_steps: int = 0
    """Additional forward and backward passes on each batch, in sequence, as for preservation."""
    extra_forwards: float = 0.0
    """Additional passes without a backward on each batch, on average."""
    rank: int = 16
    """Rank of a LoRA; 0 for one of several ranks, and for a LoKr, whose capacity is not a rank."""
    lokr: tuple[KroneckerShape, ...] = ()
    """Shapes of a LoKr's matrices, of each module in `layers`; a LoRA has none."""
    module_costs: ModuleCosts = NO_COSTS
    """What an adapter costs whose layers run as modules."""
    largest_batches: Mapping[Bucket, int] | None = None
    """Samples of the largest batch of each size, where data entries have batch sizes of their own."""
    batch_weights: Mapping[Bucket, float] | None = None
    """Relative number of batches of each size, where regularization images have a share of their own."""
    held_out: Bucket | None = None
    """Size of the largest validation image."""
    previews_at_once: int = 1
    generated: tuple[SamplingRequest, ...] = ()
    """Images that the model draws before training, to be trained on."""
    preview_lora_bytes: int = 0
    """Bytes of the LoRAs of `sample.extra_loras` and `train.beside`, which previews load besides the run's own."""

    def batch(self, size: Bucket) -> int:
        """Return the number of samples in the largest batch of `size`, which never exceeds the samples of that size."""
        if self.largest_batches is not None:
            return self.largest_batches[size]
        return min(self.sizes[size], self.batch_size)

    def shares(self) -> Mapping[Bucket, float]:
        """Return which fraction of all batches has each size."""
        weights = self.batch_weights
        if not weights:
            weights = {size: count / self.batch(size) for size, count in self.sizes.items() if count}
        total = math.fsum(weights.values())
        return {size: weight / total for size, weight in weights.items()}

    def tokens(self, size: Bucket) -> int:
        """Return the tokens of the largest batch of `size`, image and caption together."""
        return (image_tokens(size.width, size.height) + padded_tokens(self.caption_tokens)) * self.batch(size)

    @property
    def max_tokens(self) -> int:
        """Return the tokens of the largest batch of all sizes."""
        return max(map(self.tokens, self.sizes), default=0)


def make_workload(
    config: Config,
    shape: TransformerShape,
    modules: list[str],
    order: SampleOrder,
    previews: list[SamplingRequest],
    gpu: bool,
    held_out: Iterable[TrainItem] = (),
) -> Workload:
    """Return the workload of training on the items of `order`, with a LoRA on `modules` of a transformer of `shape`."""
    items = order.items
    largest_batches, batch_weights, prior_share = _batch_statistics(order)
    preserves = config.preserve.kind is not None
    slider_steps, slider_forwards = slider_passes(len(config.slider_prompts("")))

    # Captions of a batch are padded to the longest, so the longest of all decides. The same text belongs to an item of
    # each resolution, hence the set.
    texts: set[str] = set()
    for item in items:
        sample = order.longest_sample(item)
        texts.update(filter(None, (sample.prompt, sample.preserve_prompt, *config.slider_prompts(sample.prompt))))
    longest_caption = TEMPLATE_TOKENS if items else MAX_PROMPT_TOKENS
    if texts:
        longest_caption = max(map(caption_tokens, texts))

    return Workload(
        shape=shape,
        dtype=config.model.dtype,
        trained=adapter_parameters(config.lora, shape, modules),
        optimizer=config.optimizer.name,
        sizes=Counter(item.size for item in items),
        batch_size=max(largest_batches.values(), default=config.train.batch_size),
        caption_tokens=longest_caption,
        previews=tuple(previews),
        gpu=gpu,
        is_fused=fuses_blocks(config, modules, gpu),
        ema=config.ema.decay is not None,
        pissa=config.lora.start == "pissa",
        rank=0 if config.lora.type == "lokr" or config.lora.ranks else config.lora.rank or 0,
        lokr=tuple(_lokr_shapes(config.lora, shape, modules)),
        module_costs=module_costs(config.lora, shape.linears, modules),
        # Preservation has a batch of its own with a backward, and a forward of the frozen model as its target.
        extra_steps=preserves + slider_steps + config.method.has_pairs,
        extra_forwards=preserves + (config.guidance.contrastive is not None) + prior_share + slider_forwards,
        largest_batches=largest_batches,
        batch_weights=batch_weights,
        held_out=max((item.size for item in held_out), key=lambda size: size.width * size.height, default=None),
    )


def fuses_blocks(config: Config, modules: list[str], gpu: bool) -> bool:
    """Return whether the blocks of a training step are fused (`lora.fused_block`) and do not run as modules.

    Not with dropout, a LoRA on the modulations, or a kind of adapter that has no fused form; and on a GPU with Triton
    only, which torch brings along on Linux.
    """
    has_kernels = not gpu or sys.platform == "linux"
    is_fusible = config.lora.is_fusible and not config.lora.draws_masks
    return has_kernels and is_fusible and not any("adaLN" in module for module in modules)


def _batch_statistics(order: SampleOrder) -> tuple[dict[Bucket, int], dict[Bucket, float], float]:
    """Return the largest batch of each size, the share of batches of each size, and the share that needs a prior.

    A prior is a forward pass without the LoRA, for `regularization: prior` and `mask_prior`.
    """
    largest_batches: dict[Bucket, int] = {}
    batch_weights: dict[Bucket, float] = {}
    prior_share = 0.0
    regularization_share = order.effective_regularization_share
    streams = ((order.concept, 1.0 - regularization_share), (order.regularization, regularization_share))
    for stream, stream_share in streams:
        if stream is None or not stream.items:
            continue
        # A batch holds items of equal size and batch size.
        groups = Counter((item.size, order.batch_size_of(item)) for item in stream.items)
        for (size, batch_size), count in groups.items():
            batches = -(-count // batch_size)
            largest_batches[size] = max(largest_batches.get(size, 0), min(count, batch_size))
            weight = stream_share * batches / stream.micro_batches_per_epoch
            batch_weights[size] = batch_weights.get(size, 0.0) + weight
        with_prior = 0
        for item in stream.items:
            entry = order.entries[item.entry]
            with_prior += entry.regularization == "prior" or entry.mask_prior > 0
        prior_share += stream_share * with_prior / len(stream.items)
    return largest_batches, batch_weights, prior_share


def caption_tokens(prompt: str) -> int:
    """Return the estimated tokens of a prompt with its template, on the high side for prose."""
    # An estimate, because the tokenizer may not be downloaded yet and takes seconds to load.
    return min(TEMPLATE_TOKENS + len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN, MAX_PROMPT_TOKENS)


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


def adapter_parameters(settings: LoraSettings, shape: TransformerShape, modules: list[str]) -> int:
    """Return the number of parameters of the adapter that `settings` describe, on `modules`."""
    if settings.type == "lokr":
        return sum(kronecker.numel for kronecker in shapes_of(settings, shape.linears, modules).values())
    if settings.type != "lora":
        return module_parameters(settings, shape.linears, modules)
    return sum(lora_parameters(shape, [module], rank) for module, rank in ranks_of(settings, modules).items())


def _lokr_shapes(settings: LoraSettings, shape: TransformerShape, modules: list[str]) -> list[KroneckerShape]:
    if settings.type != "lokr":
        return []
    return list(shapes_of(settings, shape.linears, [name for name in modules if name.startswith("layers.")]).values())


def lora_parameters(shape: TransformerShape, modules: Iterable[str], rank: int) -> int:
    """Return the number of parameters of a LoRA on `modules`: A is (rank, in) and B is (out, rank)."""
    return rank * sum(sum(shape.linears[module]) for module in modules)


def parameters_of(shape: TransformerShape) -> int:
    """Return the number of parameters of the transformer."""
    return sum(parameter_count(size) for size in shape.parameters.values())


def parameter_count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of `shape`."""
    return math.prod(shape)
