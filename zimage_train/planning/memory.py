"""How much memory a training run takes, from sizes alone (torch-free).

The constants were counted on the real graph at the full width, storage by storage; tests count again. Attention is
taken as fused, which keeps no matrix of tokens by tokens.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from zimage_train.config.optimizers import OPTIMIZERS, OptimizerName
from zimage_train.config.schema import Config
from zimage_train.config.types import Quantization, RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import SampleOrder, TrainItem
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io.dtypes import bytes_per_number
from zimage_train.models.arch import IN_A_BLOCK, TransformerShape, image_tokens, padded_tokens
from zimage_train.models.pinned_memory import pinned_bytes
from zimage_train.planning.recompute_costs import RECOMPUTE_COSTS

LIVE = {"bf16": 18.3, "fp32": 24.3}
"""What comes on top in the backward of one block, which has by then computed again all that `none` keeps."""
SAMPLING = {"bf16": 31.9, "fp32": 63.3}
"""The peak of a forward pass that keeps nothing."""
DECODING = {"bf16": 1536, "fp32": 3073}
"""Bytes a pixel while a VAE of 128 channels at full size, as the published one is, decodes an image."""
VAE_CHANNELS = 128
VAE_WEIGHTS = 83_820_000
QUANTISED_BITS = {"fp8": 8, "int8": 8, "nf4": 4}
SCALE_BYTES, SCALE_BLOCK = 2, 64
SLOTS = 2
"""Blocks on the device for those that are streamed."""
CONTEXT_BYTES = 500_000_000
"""What CUDA and its libraries take for themselves."""
FRAGMENTATION = 0.08
"""What the allocator loses between its blocks, as a share of the rest: docs/memory.md has what was measured."""
MAX_CPU_PARAMETERS = 1_000_000_000
"""Parameters; a larger model is trained on a GPU or not at all."""
MAX_CAPTION_TOKENS = 512
TEMPLATE_TOKENS = 16
BYTES_PER_TOKEN = 3
"""Of UTF-8 text; English has more than 4."""


@dataclass(frozen=True)
class WeightPlacement:
    """How the frozen transformer is held: in its own precision or quantised, and how many blocks are streamed."""

    kind: Quantization | None = None
    streamed: int = 0


@dataclass(frozen=True)
class Workload:
    """What is trained and sampled, as far as memory and time go."""

    shape: TransformerShape
    dtype: str
    trained: int
    """Parameters of the LoRA."""
    optimizer: OptimizerName
    sizes: Counter[Bucket]
    """Samples of each size in an epoch."""
    batch_size: int
    """The most samples of a batch, unless `largest` says otherwise."""
    caption_tokens: int
    """Of the longest caption, judged by its length."""
    previews: tuple[SamplingRequest, ...]
    gpu: bool
    vae_channels: int = VAE_CHANNELS
    ema: bool = False
    extra_steps: int = 0
    """More passes forward and backward on each batch, one after the other: for preservation."""
    extra_forwards: float = 0.0
    """More passes forward only, on average."""
    rank: int = 16
    """Of the LoRA."""
    largest: Mapping[Bucket, int] | None = None
    """Samples of the largest batch of each size, where folders have batch sizes of their own."""
    passes: Mapping[Bucket, float] | None = None
    """How often a batch of each size comes, where regularization has a share of its own."""
    held_out: Bucket | None = None
    """The largest image that validation looks at."""
    previews_at_once: int = 1
    generated: tuple[SamplingRequest, ...] = ()
    """What the model draws before training, to be trained on it."""
    preview_lora_bytes: int = 0
    """Of the LoRAs that previews have besides."""

    def batch(self, size: Bucket) -> int:
        """The largest batch of `size`: never more than there are samples."""
        return min(self.sizes[size], self.batch_size) if self.largest is None else self.largest[size]

    def shares(self) -> Mapping[Bucket, float]:
        """Of all passes, those with a batch of each size."""
        passes = self.passes or {size: number / self.batch(size) for size, number in self.sizes.items() if number}
        return {size: number / math.fsum(passes.values()) for size, number in passes.items()}

    def tokens(self, size: Bucket) -> int:
        """Of the largest batch of `size`."""
        return (image_tokens(size.width, size.height) + padded_tokens(self.caption_tokens)) * self.batch(size)

    @property
    def max_tokens(self) -> int:
        """Of the largest batch of all."""
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
    """Return what `config` trains on the items of `order`, with a LoRA on `modules` of a transformer of `shape`."""
    items = order.items
    largest, passes, with_prior = _batches(order)
    preserves = config.preserve.kind is not None
    texts = {
        text
        for item in items
        for one in [order.longest_sample(item)]
        for text in (one.prompt, one.preserve_prompt)
        if text
    }
    return Workload(
        shape=shape,
        dtype=config.model.dtype,
        trained=sum(sum(shape.linears[module]) for module in modules) * config.lora.rank,
        optimizer=config.optimizer.name,
        sizes=Counter(item.size for item in items),
        batch_size=max(largest.values(), default=config.train.batch_size),
        caption_tokens=max(map(caption_tokens, texts), default=MAX_CAPTION_TOKENS if not items else TEMPLATE_TOKENS),
        previews=tuple(previews),
        gpu=gpu,
        ema=config.ema.decay is not None,
        rank=config.lora.rank,
        extra_steps=int(preserves),
        extra_forwards=preserves + (config.guidance.contrastive is not None) + with_prior,
        largest=largest,
        passes=passes,
        held_out=max((item.size for item in held_out), key=lambda size: size.width * size.height, default=None),
    )


def _batches(plan: SampleOrder) -> tuple[dict[Bucket, int], dict[Bucket, float], float]:
    """The largest batch of each size, how often one of each size comes, and in which share a prior is asked for."""
    largest: dict[Bucket, int] = {}
    passes: dict[Bucket, float] = {}
    with_prior = 0.0
    for stream, share in (
        (plan.concept, 1.0 - plan.effective_regularization_share),
        (plan.regularization, plan.effective_regularization_share),
    ):
        if stream is None or not stream.items:
            continue
        for (size, most), count in Counter((item.size, plan.batch_size_of(item)) for item in stream.items).items():
            largest[size] = max(largest.get(size, 0), min(count, most))
            passes[size] = passes.get(size, 0.0) + share * -(-count // most) / stream.micro_batches_per_epoch
        entries = (plan.entries[item.entry] for item in stream.items)
        asking = sum(entry.regularization == "prior" or entry.mask_prior > 0 for entry in entries)
        with_prior += share * asking / len(stream.items)
    return largest, passes, with_prior


def caption_tokens(prompt: str) -> int:
    """Tokens of a prompt with its template, on the high side for prose."""
    return min(TEMPLATE_TOKENS + len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN, MAX_CAPTION_TOKENS)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step, or of something else that goes on beside the frozen weights."""

    weights: int
    lora: int
    activations: int
    context: int

    @property
    def allocated(self) -> int:
        """What the allocator hands out: the part that a run can measure."""
        return self.weights + self.lora + self.activations

    @property
    def total(self) -> int:
        return self.allocated + self.context


def step_memory(job: Workload, form: WeightPlacement, mode: RecomputeMode, tokens: int) -> MemoryEstimate:
    """The peak of forward and backward of a batch of `tokens`."""
    kept, kept_by_none = (RECOMPUTE_COSTS[one].kept_bytes[job.dtype] for one in (mode, "none"))
    per_token = job.shape.n_layers * kept + kept_by_none - kept + LIVE[job.dtype]
    return _with_weights(job, form, int(per_token * job.shape.dim * tokens))


def max_tokens_within(job: Workload, form: WeightPlacement, mode: RecomputeMode, limit_bytes: float) -> int:
    """The largest batch that fits `limit_bytes`."""
    fixed, one = step_memory(job, form, mode, 0).total, step_memory(job, form, mode, 1000).total
    return max(int((limit_bytes - fixed) * 1000 / max(one - fixed, 1)), 0)


def preview_memory(job: Workload, form: WeightPlacement) -> MemoryEstimate:
    """The peak of the largest preview, of its sampling or of its decoding; or of a validation."""
    sampling = decoding = 0.0
    if job.held_out is not None:
        tokens = image_tokens(job.held_out.width, job.held_out.height) + padded_tokens(job.caption_tokens)
        sampling = SAMPLING[job.dtype] * job.shape.dim * tokens
    for one in (*job.previews, *job.generated):
        batch = job.previews_at_once * (2 if one.guidance > 0 else 1)
        longer = max(one.prompt, one.negative if one.guidance > 0 else "", key=len)
        tokens = image_tokens(one.width, one.height) + padded_tokens(caption_tokens(longer))
        sampling = max(sampling, SAMPLING[job.dtype] * job.shape.dim * tokens * batch)
        width = job.vae_channels / VAE_CHANNELS
        decoding = max(decoding, DECODING[job.dtype] * width * one.width * one.height)
    sampling += job.preview_lora_bytes
    if job.gpu and job.previews:
        decoding += VAE_WEIGHTS * bytes_per_number(job.dtype)
    return _with_weights(job, form, int(max(sampling, decoding)))


def _with_weights(job: Workload, form: WeightPlacement, activations: int) -> MemoryEstimate:
    weights = device_bytes(job, form)
    lora = int(job.trained * (4 + 4 + OPTIMIZERS[job.optimizer].state_bytes + 4 * job.ema))
    around = CONTEXT_BYTES + FRAGMENTATION * (weights + lora + activations) if job.gpu else 0
    return MemoryEstimate(weights, lora, activations, int(around))


def device_bytes(job: Workload, form: WeightPlacement) -> int:
    """Frozen weights on the device: all, or those of blocks that stay and of the ring for the others."""
    blocks_away = form.streamed - (SLOTS if form.streamed else 0)
    return model_bytes(job, form.kind) - blocks_away * block_bytes(job, form.kind)


def host_bytes(job: Workload, form: WeightPlacement) -> int:
    """Frozen weights in main memory; pinned, for a GPU."""
    block = block_bytes(job, form.kind)
    return pinned_bytes(form.streamed, block) if job.gpu else form.streamed * block


def model_bytes(job: Workload, kind: Quantization | None) -> int:
    """The whole frozen transformer."""
    return _bytes(job.shape, job.dtype, kind, "")


def block_bytes(job: Workload, kind: Quantization | None) -> int:
    """One of its layers."""
    return _bytes(job.shape, job.dtype, kind, "layers.0.")


@cache
def _bytes(shape: TransformerShape, dtype: str, kind: Quantization | None, prefix: str) -> int:
    return sum(_tensor_bytes(shape, dtype, name, kind) for name in shape.parameters if name.startswith(prefix))


def _tensor_bytes(shape: TransformerShape, dtype: str, name: str, kind: Quantization | None) -> int:
    size = shape.parameters[name]
    if kind is None or len(size) != 2 or not IN_A_BLOCK.match(name):
        return parameter_count(size) * bytes_per_number(dtype)
    rows, columns = size
    scales = rows * columns // math.gcd(columns, SCALE_BLOCK)
    return rows * columns * QUANTISED_BITS[kind] // 8 + scales * SCALE_BYTES


@dataclass(frozen=True)
class SettingChange:
    """A setting and the value to give it; `data.*` stands for every entry of `data`."""

    key: str
    value: int | float | str

    def __str__(self) -> str:
        return f"{self.key}: {self.value:.3g}" if isinstance(self.value, float) else f"{self.key}: {self.value}"


LighterWorkload = tuple[list[SettingChange], Workload]


def lighter_workloads(job: Workload) -> list[LighterWorkload]:
    """The job with ever more changes that make it lighter, each with the settings that make it so."""
    found: list[LighterWorkload] = []
    for rank, ranked in _changes(job, _smaller_rank(job)):
        for previews, drawn in _changes(ranked, [_smaller_previews(ranked, side) for side in (1024, 512)]):
            for batches, current in _changes(drawn, _smaller_batches(drawn)):
                changes = [*rank, *previews, *batches]
                found += [(changes, current)] if changes else []
    return found


def _changes(job: Workload, changes: list[LighterWorkload | None]) -> list[LighterWorkload]:
    return [([], job), *(change for change in changes if change is not None)]


def _smaller_rank(job: Workload) -> list[LighterWorkload | None]:
    least = min(job.rank, 16)
    smaller = replace(job, trained=job.trained * least // job.rank, rank=least)
    return [([SettingChange("lora.rank", least)], smaller)] if job.rank > least else []


def _smaller_previews(job: Workload, side: int) -> LighterWorkload | None:
    if all(max(one.width, one.height) <= side for one in job.previews):
        return None
    small = tuple(replace(one, width=min(one.width, side), height=min(one.height, side)) for one in job.previews)
    return [SettingChange("sample.width", side), SettingChange("sample.height", side)], replace(job, previews=small)


def _smaller_batches(job: Workload) -> list[LighterWorkload | None]:
    found: list[LighterWorkload | None] = []
    changes: list[SettingChange] = []
    current = job
    if job.batch_size > 1:
        changes, current = [SettingChange("train.batch_size", 1)], replace(job, batch_size=1, largest=None, passes=None)
        found.append((changes, current))
    for side in (768, 512):
        if max((size.width * size.height for size in current.sizes), default=0) > side**2:
            square = Counter({Bucket(side, side): current.sizes.total()})
            current = replace(current, sizes=square, largest=None, passes=None)
            found.append(([*changes, SettingChange("data.*.resolution", side)], current))
    return found


def parameters_of(shape: TransformerShape) -> int:
    """How many parameters the transformer has."""
    return sum(parameter_count(size) for size in shape.parameters.values())


def parameter_count(shape: tuple[int, ...]) -> int:
    """The number of elements of a tensor."""
    return math.prod(shape)
